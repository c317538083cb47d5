"""`HostNetwork`: a MODEL, CLIP and VAE that the host has loaded, as the core's `Network`.

The host's weights are never changed. A trained weight W is a branch beside its layer: layer(x) + layer'(x), where
layer' has the weights W - W0. So it makes no difference how the host stores, patches or offloads its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import comfy.model_management as memory
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_map

from ..cul_core.base.bounded_cache import BoundedCache
from ..cul_core.base.errors import ModelError, brief_repr
from ..cul_core.base.last_result import LastResult
from ..cul_core.files.safetensors_format import is_finite
from ..cul_core.models.discrete_process import DiscreteProcess
from ..cul_core.models.families.flow import ATTENTION, UNKNOWN
from ..cul_core.models.family import Family
from ..cul_core.models.network import Network
from ..cul_core.models.source import Source, finite
from ..cul_core.models.text_conditioning import Conditioning
from ..cul_core.models.weight_roles import keys_with_role
from . import _host
from ._types import LoadedModel

try:
    import comfy_kitchen as kernels
    from comfy_kitchen.backends.eager import rope as plain_rope
except ImportError:  # an older host, which has none
    plain_rope = None

logger = logging.getLogger(__name__)
_PREFIX = "model.diffusion_model."
_PROMPTS = 64
"""Largest number of prompts that are encoded in one pass."""
_CACHED_BYTES = 512 << 20
_TRAINING_MEMORY = 4
"""Activations of a prediction with gradients, as a multiple of what the host plans for one without; a guess."""

_BRANCHES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]] = {
    nn.Linear: lambda layer, x, weight, bias: functional.linear(x, weight, bias),
    nn.Conv2d: lambda layer, x, weight, bias: layer._conv_forward(x, weight, bias),
    nn.GroupNorm: lambda layer, x, weight, bias: functional.group_norm(
        x, layer.num_groups, weight, bias, layer.eps
    ),
    nn.LayerNorm: lambda layer, x, weight, bias: functional.layer_norm(
        x, layer.normalized_shape, weight, bias, layer.eps
    ),
    nn.RMSNorm: lambda layer, x, weight, bias: functional.rms_norm(
        x, layer.normalized_shape, weight, layer.eps
    ),
}
"""Layer -> its output for other weights; all are linear in the weights."""
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class _Raw(nn.Module):
    """Takes the place of the host's `model_sampling`, so that its model gives out the raw prediction."""

    def __init__(self, sampling: nn.Module, is_discrete: bool):
        super().__init__()
        self._sampling, self._is_discrete = (sampling,), is_discrete  # in a tuple: not as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._sampling[0], name)

    def calculate_input(self, times: Tensor, latents: Tensor) -> Tensor:
        return latents

    def timestep(self, times: Tensor) -> Tensor:
        return times if self._is_discrete else self._sampling[0].timestep(times)

    def calculate_denoised(self, times: Tensor, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction


def _make_trainable(module: nn.Module) -> None:
    """Give a module's parameters and buffers tensors that autograd may save: those that the host made in
    inference mode are replaced by normal ones of the same memory."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and type(tensor.data) is Tensor and tensor.is_inference():
                    same = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
                        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
                    )
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(same, requires_grad=False) if is_parameter else same


class HostNetwork(Network):
    """A MODEL, CLIP and VAE of the host, which loads, patches and unloads them as it does for sampling.

    Call `close` after the last use.

    Args:
        family: of the model.
        source: of its exact weights W0; None if no weights are asked for.
        model: MODEL without edits.
        clip: CLIP that belongs to it.
        vae: VAE that belongs to it; None without one.
    """

    def __init__(self, family: Family, source: Source | None, model: Any, clip: Any, vae: Any):
        self.family, self.clip, self.vae = family, clip, vae
        self._source, self._model = source, model
        self._net = model.model.diffusion_model
        self._layers = {
            f"{_PREFIX}{name}.{leaf}": (layer, leaf)
            for name, layer in self._net.named_modules()
            if isinstance(layer, tuple(_BRANCHES))
            for leaf in ("weight", "bias")
            if getattr(layer, leaf, None) is not None
        }
        self._slots: dict[str, nn.Parameter] = {}
        self._exact: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._prompts: BoundedCache[Conditioning] = BoundedCache(lambda conditioning: conditioning.nbytes)
        self._shared_rows: int | None = None
        self._checkpointed: list[nn.Module] = []
        self._open = ExitStack()
        self._prepare()

    @property
    def device(self) -> torch.device:
        return self._model.load_device

    @property
    def dtype(self) -> torch.dtype:
        """fp32, the dtype of the trained weights; the host chooses that of its own weights and activations."""
        return torch.float32

    # --- the host's model

    def _prepare(self) -> None:
        model = self._model.model
        # fused kernels have no backward pass
        if hasattr(memory, "in_training"):
            self._change(memory, "in_training", True)
        if plain_rope is not None:
            for name, function in vars(plain_rope).items():
                if name.endswith(("_rope", "_rope1", "_half", "_half1")) and hasattr(kernels, name):
                    self._change(kernels, name, function)
        if self.computes_in == torch.float16:  # gradients would underflow
            is_bf16 = memory.should_use_bf16(self.device)
            self._change(model, "manual_cast_dtype", torch.bfloat16 if is_bf16 else torch.float32)
            for layer in self._net.modules():
                if hasattr(layer, "comfy_cast_weights"):
                    self._change(layer, "comfy_cast_weights", True)
        if not isinstance(self.process, DiscreteProcess):
            _copy_before_norms(self._net, self._open)
        of_layers: dict[nn.Module, dict[str, str]] = {}
        for key, (layer, leaf) in self._layers.items():
            of_layers.setdefault(layer, {})[leaf] = key
        for layer, keys in of_layers.items():
            self._open.callback(layer.register_forward_hook(partial(self._branch, keys)).remove)

    @property
    def computes_in(self) -> torch.dtype:
        """Dtype of the host's activations."""
        model = self._model.model
        return model.get_dtype() if model.manual_cast_dtype is None else model.manual_cast_dtype

    def _change(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the host until `close`."""
        was = vars(owner).get(name, owner)
        setattr(owner, name, value)
        self._open.callback(
            partial(delattr, owner, name) if was is owner else partial(setattr, owner, name, was)
        )

    def close(self) -> None:
        """Leave the host's model as it was."""
        self.set_checkpointing(False)
        self._open.close()
        self._exact.clear()
        self._prompts.clear()

    def _load(self, count: int) -> None:
        """Let the host load the model, with room for a prediction of `count` images."""
        needed = self._model.memory_required([count, *self.family.latent_shape])
        needed *= _TRAINING_MEMORY if torch.is_grad_enabled() else 1
        memory.load_models_gpu([self._model], memory_required=needed)
        _make_trainable(self._net)

    # --- weights

    def weights(self, role: str) -> dict[str, nn.Parameter]:
        """Checkpoint key -> fp32 parameter; outside `with_weights` it has no values, see `exact`.

        Only weights of linear layers, convolutions and norms can be trained.
        """
        return {key: self._slot(key) for key in keys_with_role(self.family, role, self._layers)}

    def _slot(self, key: str) -> nn.Parameter:
        if key not in self._slots:
            layer, leaf = self._layers[key]
            empty = torch.full((), torch.nan, device=self.device).expand(getattr(layer, leaf).shape)
            self._slots[key] = nn.Parameter(empty, requires_grad=False)
        return self._slots[key]

    def exact(self, keys: Sequence[str]) -> dict[str, Tensor]:
        if missing := [key for key in keys if key not in self._exact]:
            for key, tensor in self._source.read(missing):
                self._exact[key] = finite(self._source.name, key, tensor).to(self.device)
        return {key: self._exact[key] for key in keys}

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        self.exact(list(weights))
        before = {key: (self._slot(key).data, self._held.get(key)) for key in weights}
        try:
            for key, weight in weights.items():
                self._held[key] = self._slots[key].data = weight.to(self.device, torch.float32)
            yield
        finally:
            for key, (data, held) in before.items():
                self._slots[key].data = data
                self._held.pop(key)
                if held is not None:
                    self._held[key] = held

    def _branch(self, keys: Mapping[str, str], layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        changes = {leaf: change for leaf, key in keys.items() if (change := self._change_of(key)) is not None}
        if not changes:
            return output
        x, weight, bias = inputs[0], changes.get("weight"), changes.get("bias")
        if weight is None:
            weight = torch.zeros(layer.weight.shape, dtype=x.dtype, device=x.device)
        compute = next(branch for kind, branch in _BRANCHES.items() if isinstance(layer, kind))
        return output + compute(layer, x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _change_of(self, key: str) -> Tensor | None:
        """W - W0; None where W is W0."""
        held, exact = self._held.get(key), self._exact.get(key)
        if held is None or held.data_ptr() == exact.data_ptr():
            return None
        return self._slots[key] - exact

    # --- text

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Conditioning:
        if grad:
            return self.encode_rows(prompts, ())
        missing = sorted(prompt for prompt in set(prompts) if prompt not in self._prompts)
        for start in range(0, len(missing), _PROMPTS):
            part = missing[start : start + _PROMPTS]
            with torch.no_grad():
                encoded = self._encoded_together(part)
            for prompt, conditioning in zip(part, encoded, strict=True):
                self._check_encoded(prompt, conditioning)
                self._prompts.put(prompt, conditioning.to("cpu"))
        encoded = {prompt: self._prompts.get(prompt) for prompt in dict.fromkeys(prompts)}
        batch = Conditioning.cat(encoded[prompt] for prompt in prompts).to(self.device)
        self._prompts.shrink(_CACHED_BYTES)
        return batch

    def _check_encoded(self, prompt: str, conditioning: Conditioning) -> None:
        """Raises ModelError for an encoded prompt that is not finite, as a damaged word's row makes it."""
        if not is_finite(conditioning.text):
            raise ModelError(
                f"The CLIP of {self.family.display_name} is damaged: its text rows of {brief_repr(prompt)} hold "
                "NaN or infinite values; load another one."
            )

    def _encoded_together(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Each prompt encoded: in one pass where a family reads no more of CLIP than the rows of one encoder.

        The host's CLIP takes a long prompt in sections and encodes them as one batch; here every prompt is one.
        """
        kinds = self.family.text_encoders
        tokens = [self.clip.tokenize(prompt) for prompt in prompts]
        sections = [parts for of_prompt in tokens for parts in of_prompt.values()]
        if len(kinds) != 1 or kinds[0].is_pooled or {len(parts) for parts in sections} != {1}:
            return [self._encoded(prompt) for prompt in prompts]
        (encoder,) = tokens[0]
        text = self.clip.encode_from_tokens({encoder: [parts[0] for parts in sections]})
        return [Conditioning(rows.clone()) for rows in text.view(len(prompts), -1, text.shape[-1]).split(1)]

    def _encoded(self, prompt: str) -> Conditioning:
        values = dict(self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_dict=True))
        text, pooled = values.pop("cond").clone(), values.pop("pooled_output", None)
        return Conditioning(
            text, None if pooled is None else pooled.clone(), None, (values,) if values else None
        )

    @torch.no_grad()
    def rows_read(self, rows: Tensor) -> Tensor:
        if not self.family.text_norm:
            return rows
        self._load(1)
        norm = self._net.get_submodule(self.family.text_norm)
        return norm(rows.to(self.device, self.computes_in)).to(rows)

    def _embeddings(self) -> list[nn.Module]:
        """Token embeddings of the text encoders, in their order."""
        memory.load_models_gpu([self.clip.patcher])
        _make_trainable(self.clip.cond_stage_model)
        encoders = [
            part.transformer for part in self.clip.cond_stage_model.modules() if hasattr(part, "transformer")
        ]
        return [encoder.get_input_embeddings() for encoder in encoders]

    def token_rows(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        embeddings = self._embeddings()
        rows: list[list[Tensor]] = [[] for _ in embeddings]

        def take(own: list[Tensor], module: nn.Module, inputs: tuple, output: Tensor) -> None:
            own.append(output.detach().clone())

        with ExitStack() as hooks, torch.no_grad():
            for embedding, own in zip(embeddings, rows, strict=True):
                hooks.callback(embedding.register_forward_hook(partial(take, own)).remove)
            for prompt in prompts:
                self._encoded(prompt)
        return tuple(map(torch.cat, rows))

    def encode_rows(self, prompts: Sequence[str], rows: Sequence[Tensor]) -> Conditioning:
        number = 0
        with ExitStack() as hooks:
            _copy_before_norms(self.clip.cond_stage_model, hooks)
            for embedding, own in zip(self._embeddings(), rows, strict=False):
                put = lambda module, inputs, output, own=own: own[number : number + 1].to(output)  # noqa: E731
                hooks.callback(embedding.register_forward_hook(put).remove)
            parts = []
            for number, prompt in enumerate(prompts):  # noqa: B007  (`put` reads it)
                parts.append(self._encoded(prompt))
        return Conditioning.cat(parts).to(self.device)

    def _token_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt's text rows, from the text encoder that made them, without padding at the end."""
        encoder, without_rows = self._row_tokens
        parts = self.clip.tokenize(prompt)[encoder]
        ids = [int(token[0]) for part in parts for token in part][without_rows:]
        while len(ids) > 1 and ids[-1] == ids[-2]:
            ids.pop()
        return ids

    @cached_property
    def _row_tokens(self) -> tuple[str, int]:
        """(text encoder of the text rows, number of its first tokens, those of a template, that have no rows).

        Where several encoders' rows stand one after the other, it is the first.
        """
        rows = self.encode([""]).text.shape[1]
        counts = {encoder: sum(map(len, parts)) for encoder, parts in self.clip.tokenize("").items()}
        encoder = next((name for name, count in counts.items() if count == rows), next(iter(counts)))
        return encoder, max(counts[encoder] - rows, 0)

    def tokens(self, prompt: str) -> tuple[int, ...]:
        return tuple(self._token_ids(prompt)[self.content(prompt)])

    def content(self, prompt: str) -> slice:
        ids, empty = self._token_ids(prompt), self._token_ids("")
        if ids == empty:
            empty = self._token_ids("a")
        limit = min(len(ids), len(empty))
        start = next((i for i in range(limit) if ids[i] != empty[i]), limit)
        after = next((i for i in range(limit - start) if ids[-1 - i] != empty[-1 - i]), limit - start)
        return slice(start, len(ids) - after)

    def words(self, least_letters: int = 3) -> list[str]:
        whole = re.compile(rf"(?:[\u2581\u0120]([a-z]{{{least_letters},}})|([a-z]{{{least_letters},}})</w>)")
        tokenizers = vars(self.clip.tokenizer).values()
        vocabulary = next((part.inv_vocab for part in tokenizers if hasattr(part, "inv_vocab")), None)
        if vocabulary is None:
            raise ModelError(
                f"The tokenizer of {self.family.display_name} does not tell its words; choose a preset or settings "
                "without decoys."
            )
        found = (whole.fullmatch(vocabulary[number]) for number in sorted(vocabulary))
        words = (match[1] or match[2] for match in found if match)
        return [word for word in words if word not in self.withheld_words]

    @property
    def shared_rows(self) -> int:
        """Number of leading rows in which the encodings of two prompts agree."""
        if self._shared_rows is None:
            one, other = (self.encode([prompt]).text[0] for prompt in ("", "a"))
            count = min(len(one), len(other))
            differs = (one[:count] != other[:count]).any(1).tolist()
            self._shared_rows = differs.index(True) if True in differs else 0
        return self._shared_rows

    # --- prediction

    def predict(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        self._load(len(latents))
        model, times = self._model.model, times.expand(len(latents)).float()
        sampling = model.model_sampling
        inputs = latents[:, :, None] if self.family.has_frames else latents
        outputs: dict[int, Tensor] = {}
        try:
            model.model_sampling = _Raw(sampling, isinstance(self.process, DiscreteProcess))
            self._model.pre_run()
            for rows, conditions in self._groups(inputs, conditioning):
                predicted = model.apply_model(inputs[rows], times[rows], **conditions)
                predicted = predicted[:, :, 0] if self.family.has_frames else predicted
                outputs.update(zip(rows, predicted.to(latents.dtype), strict=True))
        finally:
            self._model.cleanup()
            model.model_sampling = sampling
        return torch.stack([outputs[row] for row in range(len(latents))])

    def _groups(
        self, latents: Tensor, conditioning: Conditioning
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """(rows, the host's model conditions) of what the host can compute at once."""
        groups: list[tuple[list[int], list[dict[str, Any]]]] = []
        for row in range(len(latents)):
            conditions = self._conditions(latents[row : row + 1], conditioning[row])
            for rows, members in groups:
                first = members[0]
                if first.keys() == conditions.keys() and all(
                    first[name].can_concat(value) and first[name].size() == value.size()
                    for name, value in conditions.items()
                ):
                    rows.append(row)
                    members.append(conditions)
                    break
            else:
                groups.append(([row], [conditions]))
        for rows, (first, *others) in groups:
            yield (
                rows,
                {name: value.concat([other[name] for other in others]) for name, value in first.items()},
            )

    def _conditions(self, latents: Tensor, prompt: Conditioning) -> dict[str, Any]:
        """Model conditions of one image, as the host's sampler makes them of a prompt."""
        text = prompt.text if prompt.mask is None else prompt.text[:, prompt.mask[0]]
        made = self._model.model.extra_conds(
            cross_attn=text,
            pooled_output=prompt.pooled,
            **(prompt.extra[0] if prompt.extra else {}),
            noise=latents,
            device=self.device,
            width=self.family.image_size_px,
            height=self.family.image_size_px,
            prompt_type="positive",
        )
        return {
            name: value.process_cond(batch_size=1, device=self.device, area=None)
            for name, value in made.items()
        }

    def text_readers(self) -> list[nn.Module]:
        keys = keys_with_role(self.family, "text_readers", self._layers)
        return list(dict.fromkeys(self._layers[key][0] for key in keys))

    # --- memory

    def set_checkpointing(self, is_on: bool, checkpoint: Callable[..., object] | None = None) -> None:
        """Recompute blocks in the backward pass, each from copies of its inputs, to which it may add in place."""
        for block in self._checkpointed:
            del block.forward
        self._checkpointed = self._blocks() if is_on else []
        save = checkpoint or partial(torch_checkpoint.checkpoint, use_reentrant=False)
        for block in self._checkpointed:

            def run(forward: Callable, *inputs: Any, **named: Any) -> Any:
                inputs, named = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (inputs, named))
                return forward(*inputs, **named)

            block.forward = partial(save, partial(run, block.forward))

    def _blocks(self) -> list[nn.Module]:
        """The outermost modules whose class is called a block."""
        found: dict[str, nn.Module] = {}
        for name, module in self._net.named_modules():
            if type(module).__name__.endswith("Block") and not any(
                name.startswith(f"{outer}.") for outer in found
            ):
                found[name] = module
        return list(found.values())

    # --- images

    def with_autoencoder(self) -> Any:
        return super().with_autoencoder() if self.vae is None else nullcontext()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return super().decode(latents)
        images = _host.decoded(self._model, self.vae, latents)
        return images.movedim(-1, 1).to(latents.device)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.vae is None:
            return super().encode_images(images, generator)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.set_state(generator.get_state())  # of the VAE's posterior
            latents = self._model.model.process_latent_in(self.vae.encode(images.movedim(1, -1)))
            generator.set_state(torch.random.default_generator.get_state())
        return (latents[:, :, 0] if self.family.has_frames else latents).to(images.device)


def _copy_before_norms(module: nn.Module, until: ExitStack) -> None:
    """Give norms copies of their inputs: the host's transformers add in place to what a norm has kept for its
    gradient."""
    for layer in module.modules():
        if isinstance(layer, _NORMS):
            until.callback(layer.register_forward_pre_hook(_copied).remove)


def _copied(layer: nn.Module, inputs: tuple) -> tuple | None:
    x = inputs[0]
    return (x.clone(), *inputs[1:]) if torch.is_grad_enabled() and x.requires_grad else None


class HostNetworks:
    """The network of one model that the host has loaded; see `cul_core.models.network.Networks`."""

    def __init__(self, loaded: LoadedModel):
        self._loaded, self._network = loaded, None
        self.last_result = LastResult()

    def get(self, source: Source, device: Any = None, dtype: Any = None) -> HostNetwork:
        """The network, wherever the host has it and in the host's precision.

        Raises:
            ModelError: the source is of another model, or has changed since it was opened.
        """
        loaded = self._loaded
        if source.sha256 != loaded.value.source.sha256:
            raise ModelError(f"{source.name!r} is not the model that is loaded; load it again.")
        if self._network is None:
            source.require_unchanged()
            self._network = HostNetwork(loaded.value.family, source, loaded.model, loaded.clip, loaded.vae)
            logger.info("took %s for training in %s", source.name, self._network.computes_in)
        return self._network

    def free(self) -> None:
        if self._network is not None:
            self._network.close()
        self._network = None
        self.last_result.clear()


def unknown_family(model: Any, clip: Any) -> Family:
    """A family for a MODEL that none describes: its geometry and process by the host, its roles by tracing what
    the layers' inputs depend on.

    Raises:
        ModelError: the process is not one that can be trained.
    """
    latents = model.model.latent_format
    family = Family(
        "unknown",
        type(model.model).__name__,
        signature=(0, 0),
        latent_shape=(latents.latent_channels, *[1024 // getattr(latents, "spacial_downscale_ratio", 8)] * 2),
        latent_scale=1.0,
        image_size_px=1024,
        sampling_batch=1,
        prefix=_PREFIX,
        roles={"all": ""},
        recognize=lambda *_: False,
        process=_host.process_of(model),
        recipe=UNKNOWN,
        is_known=False,
        has_frames=getattr(latents, "latent_dimensions", 2) == 3,
    )
    small = replace(family, latent_shape=(latents.latent_channels, 16, 16))
    network = HostNetwork(small, None, model, clip, None)
    try:
        readers, of_text = _traced(network)
    finally:
        network.close()
    roles = {"text_readers": readers, "text_inputs": readers, "reads_text": of_text}
    patterns = {role: rf"^({'|'.join(map(re.escape, keys))})$" for role, keys in roles.items() if keys}
    return replace(family, roles={**patterns, "attention": rf"{ATTENTION}.*\.weight$", "all": ""})


@torch.no_grad()
def _traced(network: HostNetwork) -> tuple[list[str], list[str]]:
    """(matrices whose inputs are the text rows themselves, those whose inputs depend on the text alone).

    The first are the second where no layer's input is the text itself, as behind a norm.
    """
    keys = {
        layer: key
        for key, (layer, leaf) in network._layers.items()
        if leaf == "weight" and isinstance(layer, nn.Linear)
    }
    text = network.encode(["a cat", "a dog"])
    noise = torch.randn(2, *network.family.latent_shape, generator=torch.Generator().manual_seed(0))
    noise, times = noise.to(network.device), network.process.draw_times(2, torch.Generator().manual_seed(0))
    times = times.to(network.device)

    def inputs(image: int, prompt: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def take(layer: nn.Module, values: tuple) -> None:
            found.setdefault(keys[layer], values[0].detach().clone())

        with ExitStack() as hooks:
            for layer in keys:
                hooks.callback(layer.register_forward_pre_hook(take).remove)
            network.predict(noise[image : image + 1], times[image], text[prompt])
        return found

    base, other_text, other_image = inputs(0, 0), inputs(0, 1), inputs(1, 0)

    def is_same(key: str, other: Mapping[str, Tensor]) -> bool:
        return key in other and torch.equal(base[key], other[key])

    of_text = [key for key in base if not is_same(key, other_text) and is_same(key, other_image)]
    rows = text[0].text[0]
    raw = [
        key
        for key in of_text
        if base[key].shape[-1] == rows.shape[-1] and torch.equal(base[key].flatten(0, -2).to(rows), rows)
    ]
    return raw or of_text, of_text
