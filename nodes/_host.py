"""Everything the nodes ask of the host: devices and memory, progress, cancelling, native models, sampling."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from ..cul_core.base.errors import ModelError, brief_repr
from ..cul_core.models.discrete_process import DiscreteProcess
from ..cul_core.models.flow_process import FlowProcess
from ..cul_core.models.free_memory import is_out_of_memory
from ..cul_core.models.noise_process import NoiseProcess
from ..cul_core.output.lora import patch_names
from ._types import LoadedModel

PREVIEW_SIDE_PX = 1024


def load_native(path: Path) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) as the stock loader gives them.

    Raises:
        ModelError: it gives none.
    """
    try:
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path),
            output_vae=True,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"ComfyUI cannot load {path.name!r} ({brief_repr(reason)}); choose an unmodified checkpoint."
        ) from error
    return model, clip, vae


_HISTORY = "continual_unlearning"
"""Key of a MODEL's attachment; the host's clones carry it along."""


@dataclass(frozen=True)
class _Edited:
    """What a MODEL with edits carries: the model that it shows, and the patch of its edits by the host's names."""

    loaded: LoadedModel
    patch: Mapping[str, tuple]

    def others(self, model: Any) -> dict[str, list[tuple]]:
        """The patches of a MODEL without this one, by the host's names."""
        others = {
            name: [patch for patch in patches if patch[1] is not self.patch.get(name)]
            for name, patches in model.patches.items()
        }
        return {name: patches for name, patches in others.items() if patches}


def native(loaded: LoadedModel) -> tuple[Any, Any, Any]:
    """(MODEL with all edits as one patch on the source's weights, CLIP, VAE).

    A MODEL that the model was taken from keeps all else that it carries; the patch takes its former one's place.
    """
    patched = (loaded.model if loaded.carrier is None else loaded.carrier).clone()
    if loaded.carrier is not None:
        patched.patches = patched.get_attachment(_HISTORY).others(patched)
    edits, names = loaded.value.edits, patch_names(loaded.value)
    patch = {name: ("diff", (edits[ours],)) for ours, name in names.items()}
    done = patched.add_patches(patch, loaded.strength)
    if missing := patch.keys() - set(done):
        raise ModelError(
            f"The host's model has no weight {min(missing)!r}, so the edit cannot be applied; load the "
            "checkpoint again."
        )
    patched.set_attachments(_HISTORY, _Edited(replace(loaded, carrier=None), patch))
    return patched, loaded.clip, loaded.vae


def has_history(model: Any) -> bool:
    """Whether a MODEL comes from one of our nodes, whatever stock nodes have added to it."""
    return model.get_attachment(_HISTORY) is not None


def with_history(model: Any) -> LoadedModel:
    """The model that a MODEL carries.

    Raises:
        ModelError: it carries none, or it was merged with another model since.
    """
    if not has_history(model):
        raise ModelError(
            "The MODEL has no history: none of this pack's nodes has made it. Put Forget, or Unlearn From MODEL, "
            "in front of this node."
        )
    if any(isinstance(patch[1], list) or patch[2] != 1 for patch in _added(model)):
        raise ModelError(
            "The MODEL was merged with another one after it forgot, so only a part of what was forgotten is in "
            "it; merge first, and put Forget behind the merge."
        )
    return replace(model.get_attachment(_HISTORY).loaded, carrier=model)


def has_additions(loaded: LoadedModel) -> bool:
    """Whether other nodes have added patches, such as LoRAs, to the MODEL that a model was taken from."""
    return loaded.carrier is not None and next(_added(loaded.carrier), None) is not None


def _added(model: Any) -> Iterator[tuple]:
    """Patches of a MODEL with history that neither its source has nor are its edits."""
    edited = model.get_attachment(_HISTORY)
    for name, patches in edited.others(model).items():
        yield from patches[len(edited.loaded.model.patches.get(name, ())) :]


def require_weights_only(model: Any, clip: Any) -> None:
    """Refuse what neither training would see nor a checkpoint could hold; behind the node that asks, all of
    it works as ever.

    Raises:
        ModelError: the MODEL or the CLIP carries more than weights and patches of weights.
    """
    found = [*_beside_weights(model), *_beside_weights(clip.patcher)]
    if clip.layer_idx is not None:
        found.append("CLIP Set Last Layer")
    if found:
        raise ModelError(
            f"The MODEL or CLIP carries more than weights and LoRAs ({', '.join(dict.fromkeys(found))}), "
            "which training cannot see; connect this node in front of the nodes that add it, and those "
            "behind its outputs."
        )


def _beside_weights(patcher: Any) -> Iterator[str]:
    options = dict(patcher.model_options)
    yield from options.pop("transformer_options", {})
    yield from options
    yield from (name for name in patcher.object_patches if name != "manual_cast_dtype")  # the loader's own
    for kind in ("weight_wrapper_patches", "injections", "additional_models", "hook_patches", "forced_hooks"):
        if getattr(patcher, kind, None):
            yield kind
    yield from (str(kind) for kind, keyed in getattr(patcher, "wrappers", {}).items() if any(keyed.values()))


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by checkpoint key of a MODEL's network, whatever it is."""
    return {f"model.{name}": tuple(tensor.shape) for name, tensor in model.model.state_dict().items()}


def weights_of(model: Any, clip: Any | None, vae: Any | None) -> dict[str, torch.Tensor]:
    """All weights, LoRAs applied, under the keys and in the precision in which the host's own node would save
    them.

    Recent hosts apply a LoRA when the tensor is moved to the CPU; older ones have done so on the device. Without
    CLIP and VAE they are the network's alone.
    """
    is_lazy = hasattr(model, "state_dict_for_saving")
    patchers = [model] if clip is None else [model, clip.load_model()]
    memory.load_models_gpu(patchers, **({} if is_lazy else {"force_patch_weights": True}))
    text = None
    if clip is not None:
        text = clip.state_dict_for_saving() if hasattr(clip, "state_dict_for_saving") else clip.get_sd()
    save = model.state_dict_for_saving if is_lazy else model.model.state_dict_for_saving
    weights = save(text, None if vae is None else vae.get_sd())
    if "v_pred" in weights and getattr(model.get_model_object("model_sampling"), "zsnr", False):
        weights["ztsnr"] = torch.tensor([])  # the host's save node adds it, not its model
    return weights


def process_of(model: Any) -> NoiseProcess:
    """The noise process of a MODEL.

    Raises:
        ModelError: it is of another kind than those that can be trained.
    """
    kind, sampling = model.model.model_type.name, model.model.model_sampling
    if kind in _PREDICTED:
        process = DiscreteProcess(_PREDICTED[kind], bool(getattr(sampling, "zsnr", False)))
        abar = 1 / (sampling.sigmas.cpu() ** 2 + 1)
        if abar.shape == process.alphas_cumprod.shape and (abar - process.alphas_cumprod).abs().max() < 1e-3:
            return process
        kind = f"{kind} with another noise schedule"
    if kind in ("FLOW", "FLUX"):
        middle = float(sampling.percent_to_sigma(0.5))  # s / (s + 1)
        return FlowProcess(middle / (1 - middle))
    raise ModelError(
        f"The MODEL predicts {kind}, which cannot be trained; choose a model that predicts noise, velocity "
        "or flow."
    )


_PREDICTED = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}


def file_of(model: Any) -> Path | None:
    """The file from which the host has loaded a MODEL, or another patcher, that no LoRA has changed; None where it
    does not say."""
    made_by = getattr(model, "cached_patcher_init", None)
    if made_by is None or model.patches:
        return None
    first = made_by[1][0] if made_by[1] else None
    path = Path(first) if isinstance(first, str) else None
    return path if path is not None and path.suffix == ".safetensors" and path.is_file() else None


def text_identity(clip: Any) -> str:
    """A hash that is equal for CLIPs that encode alike, with their LoRAs: of one sentence's rows, to 0.01."""
    tokens = clip.tokenize("a portrait of a cat in the style of Van Gogh")
    with normal_tensors(), torch.no_grad():
        rows = clip.encode_from_tokens(tokens, return_dict=True)["cond"]
    hundredths = (rows.float().cpu() * 100).round() + 0.0  # no negative zeros
    return hashlib.sha256(hundredths.numpy().tobytes()).hexdigest()


@contextmanager
def normal_tensors() -> Iterator[None]:
    """The executor runs nodes in inference mode, whose tensors can never be trained on; within this block it
    is off."""
    with torch.inference_mode(False):
        yield


@contextmanager
def training_device(release: Callable[[], None]) -> Iterator[torch.device]:
    """The device to train on, after the host has unloaded its models from it; `release` then lets ours go."""
    device = memory.get_torch_device()
    memory.free_memory(1e30, device)
    try:
        yield device
    finally:
        release()
        gc.collect()
        memory.soft_empty_cache()


def raise_if_cancelled() -> None:
    """Raises the host's own exception when the user pressed Cancel; it must never be swallowed."""
    memory.throw_exception_if_processing_interrupted()


def should_stop() -> bool:
    raise_if_cancelled()
    return False


_MARKUP = str.maketrans({letter: f"&#{ord(letter)};" for letter in "&<>\"'[]:."})
_MOST_SHOWN = 20_000


def _as_html(text: str) -> str:
    """Text as the page has to get it, which shows it as HTML and makes links of what looks like one; history
    may be a stranger's."""
    return (text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}...").translate(_MARKUP)


class Progress:
    """Progress bar, preview image and the line of text on the node that is running."""

    def __init__(self, total: int):
        self._bar, self._total = comfy.utils.ProgressBar(total), total
        context = get_executing_context()
        self._node, self._told = context.node_id if context else None, 0.0

    def update(self, done: int, preview: Image.Image | None = None) -> None:
        image = ("JPEG", preview, PREVIEW_SIDE_PX) if preview is not None else None
        self._bar.update_absolute(done, self._total, image)

    def say(self, text: str, now: bool = True) -> None:
        """Text under the node's widgets; with `now` false, at most four times a second."""
        if self._node is not None and (now or time.monotonic() - self._told > 0.25):
            self._told = time.monotonic()
            PromptServer.instance.send_progress_text(_as_html(text), self._node)


def to_image_tensor(image: Image.Image) -> torch.Tensor:
    """An image as the host's IMAGE, (1, h, w, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]


def to_images(images: torch.Tensor) -> list[Image.Image]:
    """The host's IMAGE (b, h, w, 3) as Pillow images."""
    return [Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()) for image in images]


@torch.no_grad()
def preview(loaded: LoadedModel, latents: torch.Tensor) -> list[Image.Image] | str:
    """Pictures of model-space latents (b, c, h, w) by the host's VAE beside a model in training, or why there
    are none.

    One at a time, in tiles when memory does not suffice; the VAE leaves the device again.
    """
    if loaded.vae is None:
        return "no VAE is connected"
    try:
        images = [decoded(loaded.model, loaded.vae, latent) for latent in latents.split(1)]
        return to_images(torch.cat(images))
    except memory.InterruptProcessingException:
        raise
    except Exception as error:  # whatever a VAE cannot do, it must not cost the training
        return f"the VAE failed ({type(error).__name__})"
    finally:
        memory.free_memory(1e30, memory.get_torch_device())
        memory.soft_empty_cache()


def decoded(model: Any, vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The host's IMAGE (b, h, w, 3) of model-space latents (b, c, h, w), in tiles when memory does not suffice."""
    if getattr(model.model.latent_format, "latent_dimensions", 2) == 3:
        latents = latents[:, :, None]  # of videos, here with one frame
    latents = model.model.process_latent_out(latents)
    try:
        return one_frame(vae.decode(latents))
    except memory.OOM_EXCEPTION:
        pass  # the exception holds tensors: they go before the next attempt
    memory.soft_empty_cache()
    return one_frame(vae.decode_tiled(latents, tile_x=32, tile_y=32, overlap=8))


def one_frame(images: torch.Tensor) -> torch.Tensor:
    """Images (b, h, w, 3) of what a VAE gives, which for one of videos is (b, 1, h, w, 3)."""
    return images.flatten(0, 1) if images.ndim == 5 else images


def sample(
    model: Any,
    clip: Any,
    vae: Any,
    side: int,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    negative: str = "",
) -> Iterator[Image.Image]:
    """One image of `side` pixels per prompt by the host's own sampler, all from the same seed."""
    import nodes as stock  # the host's module of that name, not this package

    if vae is None:
        raise ModelError(
            "The model came without a VAE, so no image can be drawn; connect one to Forget or Unlearn From MODEL."
        )
    encode, empty = stock.CLIPTextEncode().encode, stock.EmptyLatentImage().generate
    (refused,) = encode(clip, negative)
    for prompt in prompts:
        (latent,) = empty(side, side)
        (wanted,) = encode(clip, prompt)
        (latent,) = stock.common_ksampler(
            model, seed, steps, cfg, sampler, scheduler, wanted, refused, latent
        )
        yield to_images(one_frame(vae.decode(latent["samples"])))[0]


def samplers() -> tuple[list[str], list[str]]:
    """(names of samplers, names of schedulers) that the host offers."""
    import comfy.samplers

    return list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)
