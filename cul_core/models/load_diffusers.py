"""Offline loading of a `DiffusersNetwork` from one .safetensors file, and the map of its checkpoint keys."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from ..base.last_result import LastResult
from ..files.safetensors_format import OpenedFile, opened
from .build_diffusers import build_text_encoder, build_unet, require_diffusers
from .diffusers_network import DiffusersNetwork
from .families.unet_layout import UNET_PREFIX, VAE_PREFIX
from .family import Family, TextEncoder
from .recognize import family_in
from .sd_layout import autoencoder_shapes
from .source import FileSource, finite
from .text_layout import TURNED, is_read_whole, prefix_in, text_shapes

logger = logging.getLogger(__name__)
_VAE_PARTS = tuple(VAE_PREFIX + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
_VAE_REMEDY = (
    "choose a checkpoint with a VAE, or load it and a fitting VAE with ComfyUI's own loaders and connect "
    "both to Unlearn From MODEL"
)


def unet_key_map(checkpoint_names: list[str], unet_config: dict) -> dict[str, str]:
    """Diffusers parameter name -> checkpoint key of a UNet.

    diffusers' own converter maps names in place of tensors.

    Args:
        checkpoint_names: all keys of the checkpoint.
        unet_config: constructor arguments of the UNet.

    Raises:
        ModelError: the keys do not match the family's layout one to one.
    """
    # not public: used only here
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = {name: name for name in checkpoint_names if name.startswith(UNET_PREFIX)}
    mapped = convert_ldm_unet_checkpoint(dict(names), dict(unet_config))
    if sorted(mapped.values()) != sorted(names):
        raise ModelError("the UNet's tensors do not match its family's layout one to one")
    return mapped


def checkpoint_key_map(path: Path) -> dict[str, str]:
    """Diffusers parameter name -> checkpoint key, of a checkpoint file's UNet."""
    with opened(path) as file, _naming(path):
        return unet_key_map(file.keys(), _unet_config(family_in(file)))


@lru_cache(maxsize=8)
def _unet_config(family: Family) -> Mapping[str, Any]:
    """All constructor arguments of the family's UNet, including those left at diffusers' defaults."""
    return build_unet(family).config


def text_tensors(kind: TextEncoder, tensors: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """Weights of a text encoder by transformers' names, from a checkpoint's tensors; others are left out.

    The `text_model.` level of a name is optional on both sides: old files and new transformers lack it.
    diffusers' own converter splits and renames OpenCLIP's tensors.
    """
    prefix = prefix_in(kind, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for turned in TURNED:
        if prefix + turned in tensors:
            tensors.setdefault(f"{prefix}text_projection", tensors.pop(prefix + turned).T.contiguous())
    if kind.is_open_clip and f"{prefix}token_embedding.weight" in tensors:
        # not public: used only here
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        tensors = convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)
    elif kind.is_pooled:
        tensors["text_projection.weight"] = tensors.pop(f"{prefix}text_projection").T.contiguous()
    level = "text_model."
    ours = {name.removeprefix(level): name for name in encoder.state_dict()}
    theirs = {
        name.removeprefix(prefix).removeprefix("transformer.").removeprefix(level): tensor
        for name, tensor in tensors.items()
    }
    return {ours[inner]: tensor for inner, tensor in theirs.items() if inner in ours}


def _fill(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A module built on the meta device, filled with exactly its weights in `dtype`, frozen."""
    try:
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors}, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the {type(module).__name__} weights are incomplete or of another shape") from error
    return module.eval().requires_grad_(False)


def load_tokenizer(family: Family, folder: Path | str | None = None) -> object:
    """The tokenizer of a family, with EOS padding.

    Args:
        family: a family; its own tokenizer is used if it has one.
        folder: folder of CLIP's `vocab.json` and `merges.txt`, or of a `tokenizer.json`, for families without
            their own.

    Raises:
        ModelError: no folder is given, or its tokenizer is not that of the family's text encoder.
    """
    folder = family.tokenizer_folder or folder
    wanted = "a folder that holds CLIP's vocab.json and merges.txt"
    if folder is None:
        raise ModelError(
            f"{family.display_name} needs CLIP's tokenizer, which does not come with this package; give "
            f"{wanted} (--tokenizer on the command line)."
        )
    if not (Path(folder) / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (Path(folder) / name).is_file():
                raise ModelError(f"The tokenizer folder {str(folder)!r} has no {name}; give {wanted}.")
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # its parser raises bare Exceptions
        raise ModelError(
            f"The tokenizer in {str(folder)!r} cannot be read ({error}); give {wanted}."
        ) from error
    config = family.config("text_encoder")
    tokens = [config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")]
    actual = [len(tokenizer.get_vocab()), tokenizer.bos_token_id, tokenizer.eos_token_id]
    if actual != tokens:
        raise ModelError(
            f"The tokenizer in {str(folder)!r} has {actual[0]} tokens, start {actual[1]} and end "
            f"{actual[2]}, where {family.display_name} has {tokens[0]}, {tokens[1]} and {tokens[2]}; give "
            f"{wanted}."
        )
    tokenizer.pad_token = tokenizer.eos_token  # Stable Diffusion 2's copy pads with another token
    return tokenizer


def load_network(
    path: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer_folder: Path | str | None = None,
    prediction: str = "auto",
) -> DiffusersNetwork:
    """The network of a checkpoint file: UNet, text encoders, tokenizer and, for small families, autoencoder.

    Nothing is downloaded.

    Args:
        path: checkpoint of a supported family.
        dtype: the UNet's dtype in memory, whatever the file's is; the rest is fp32.
        tokenizer_folder: see `load_tokenizer`; ignored for families with their own tokenizer.
        prediction: see `detect_family`.

    Raises:
        ModelError: the file is unreadable, its architecture unsupported or its tensors incomplete, or the
            tokenizer or diffusers is missing.
    """
    with opened(path) as file:
        family = family_in(file, prediction)
        unet, tokenizer = build_unet(family), load_tokenizer(family, tokenizer_folder)
        with _naming(path):
            return _load_network(path, file, family, unet, tokenizer, dtype)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a file's contents within the block are raised with the file's name."""
    try:
        yield
    except ModelError as error:
        if path.name in str(error):
            raise
        raise ModelError(
            f"{path.name!r} does not fit its family: {error}; choose an unmodified checkpoint."
        ) from error
    # diffusers' converters raise these for unknown names
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path.name!r} does not fit its family: its tensors have unexpected names or shapes; choose an "
            "unmodified checkpoint."
        ) from error


def _load_network(
    path: Path, file: OpenedFile, family: Family, unet: nn.Module, tokenizer: object, dtype: torch.dtype
) -> DiffusersNetwork:
    names = file.keys()
    keys = unet_key_map(names, unet.config)
    # a generator: only one tensor at a time is in memory in both dtypes
    _fill(
        unet,
        ((ours, finite(file.name, key, file.get_tensor(key), dtype)) for ours, key in keys.items()),
        dtype,
    )
    autoencoder = _load_tiny_autoencoder(file, names) if family.has_decoder else None
    to_open, missing = None, ""
    if autoencoder is None and family.has_config("vae"):
        missing = _missing_autoencoder(file, family)
        to_open = None if missing else partial(load_autoencoder, path, family.config("vae"))
    # families small enough to load a decoder keep their text encoders in memory
    reopen = None if family.has_decoder else partial(load_text_encoders, path, family)
    encoders = _text_encoders(file, family)
    read = partial(_read_exactly, path)
    return DiffusersNetwork(
        family, unet, encoders, tokenizer, autoencoder, keys, to_open, reopen, read, path.name, missing
    )


def _missing_autoencoder(file: OpenedFile, family: Family) -> str:
    """Why the checkpoint's autoencoder cannot be opened, as a sentence; "" if it can."""
    header = file.header
    if not any(name.startswith(VAE_PREFIX) for name in header):
        return f"{file.name!r} has no VAE; {_VAE_REMEDY}."
    for inner, shape in autoencoder_shapes(family.config("vae")).items():
        name = VAE_PREFIX + inner
        found = header[name]["shape"] if name in header else None
        if found is None or math.prod(found) != math.prod(shape):
            what = "lacks" if found is None else f"has the shape {found} in"
            return f"{file.name!r} {what} {name!r} of its VAE, which is {shape}; {_VAE_REMEDY}."
    return ""


def _read_exactly(path: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """Checkpoint key -> the file's tensor in fp32, on the CPU."""
    with opened(path) as file:
        return {key: file.get_tensor(key).float() for key in keys}


def load_text_encoders(path: Path, family: Family) -> tuple[nn.Module, ...]:
    """The family's text encoders from a checkpoint, in fp32 on the CPU.

    Prompts are encoded only once, so fp32 costs little.

    Raises:
        ModelError: the file is unreadable, or a tensor is missing or of another shape.
    """
    with _naming(path), opened(path) as file:
        return _text_encoders(file, family)


def _text_encoders(file: OpenedFile, family: Family) -> tuple[nn.Module, ...]:
    encoders = []
    for kind in family.text_encoders:
        encoder = build_text_encoder(family, kind)
        config, tensors = family.config(kind.config), {}
        for key in text_shapes(kind, config, file.keys()):
            # converted as it is read, so that only one tensor is in memory in both dtypes
            tensor = file.get_tensor(key).float()
            tensors[key] = finite(file.name, key, tensor) if is_read_whole(kind, config, key) else tensor
        encoders.append(_fill(encoder, text_tensors(kind, tensors, encoder).items()))
    return tuple(encoders)


def load_autoencoder(path: Path, config: dict) -> nn.Module:
    """Stable Diffusion's autoencoder from a checkpoint, in fp32 on the CPU.

    Args:
        path: the checkpoint.
        config: constructor arguments of `AutoencoderKL`.

    Raises:
        ModelError: the file is unreadable, or a tensor is missing or of another shape.
    """
    with _naming(path), opened(path) as file:
        return _kl_autoencoder(
            {
                name: finite(path, name, file.get_tensor(name))
                for name in file.keys()
                if name.startswith(_VAE_PARTS)
            },
            config,
        )


def _kl_autoencoder(tensors: dict[str, Tensor], config: dict) -> nn.Module:
    require_diffusers()
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint  # not public: used only here

    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(config)
    return _fill(autoencoder, convert_ldm_vae_checkpoint(tensors, config).items())


def tiny_autoencoder_key(name: str) -> str:
    """Checkpoint key of an `AutoencoderTiny` tensor; ComfyUI's decoder begins with its clamp as layer 0."""
    part, _, index, rest = name.split(".", 3)
    shift = 1 if part == "decoder" else 0
    return f"{VAE_PREFIX}taesd_{part}.{int(index) + shift}.{rest}"


def _load_tiny_autoencoder(file: OpenedFile, names: list[str]) -> nn.Module:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        autoencoder = AutoencoderTiny()
    keys = {name: tiny_autoencoder_key(name) for name in autoencoder.state_dict()}
    if missing := set(keys.values()) - set(names):
        raise ModelError(f"the autoencoder tensor {min(missing)!r} is missing")
    return _fill(autoencoder, ((name, file.get_tensor(key)) for name, key in keys.items()))


class NetworkCache:
    """Cache of the network of the source that was used last.

    `last_result` caches a result that a part computed with that network.

    Args:
        tokenizer_folder: tokenizer for families without their own; see `load_tokenizer`.
        withheld_words: of every network; see `Network`.
    """

    def __init__(
        self, tokenizer_folder: Path | str | None = None, withheld_words: frozenset[str] = frozenset()
    ):
        self._tokenizer_folder, self._withheld_words = tokenizer_folder, withheld_words
        self._slot: tuple[str, DiffusersNetwork] | None = None
        self.last_result = LastResult()

    def get(
        self, source: FileSource, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DiffusersNetwork:
        """The network of a source on a device, its UNet in `dtype`.

        Raises:
            ModelError: the file has changed since it was opened; or see `load_network`.
        """
        key = f"{source.identity} {dtype}"
        if self._slot is None or self._slot[0] != key:
            self.free()
            source.require_unchanged()
            begun = time.monotonic()
            network = load_network(source.path, dtype, self._tokenizer_folder, source.prediction)
            network.withheld_words = self._withheld_words
            self._slot = (key, network)
            logger.info("loaded %s for training in %.1f s", source.path.name, time.monotonic() - begun)
        network, device = self._slot[1], torch.empty(0, device=device).device  # with its number
        return network if network.device == device else network.to(device)

    def free(self) -> None:
        """Drop the cached network and result, so that their memory can be freed."""
        self._slot = None
        self.last_result.clear()
