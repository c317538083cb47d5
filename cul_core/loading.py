"""From one .safetensors file to a `ModelBundle`, offline, and the map between diffusers names and checkpoint keys."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .bundle import ModelBundle
from .errors import ModelError
from .families import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX, Family, family_of
from .safetensor_files import opened, read_header

_DIFFUSERS = ((0, 33), (0, 40))  # tested from the first up to, not including, the second; pyproject.toml says the same


@dataclass(frozen=True)
class Source:
    """The file a model comes from; `sha256` is over the whole file. Equal contents are the same source wherever they lie."""

    path: Path
    size: int
    sha256: str


def source_of(path: Path) -> Source:
    """Identify a file by content; the hash is computed once per (path, size, modification time).

    Raises:
        ModelError: the file is missing, cut short or no safetensors file.
    """
    read_header(path)
    status = path.stat()
    return Source(path, status.st_size, _sha256(path.resolve(), status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def detect_family(path: Path) -> Family:
    """The family of a checkpoint file (see `families.family_of`)."""
    header, _, _ = read_header(path)
    return family_of({name: tuple(entry["shape"]) for name, entry in header.items()}, path.name)


def unet_key_map(checkpoint_names: list[str], unet_config: dict) -> dict[str, str]:
    """Diffusers parameter name -> checkpoint key, by running diffusers' own converter on names instead of tensors."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # not public: used only here

    names = {name: name for name in checkpoint_names if name.startswith(UNET_PREFIX)}
    mapped = convert_ldm_unet_checkpoint(dict(names), dict(unet_config))
    if sorted(mapped.values()) != sorted(names):
        raise ModelError("the UNet's tensors do not match its family's layout one to one")
    return mapped


def checkpoint_key_map(path: Path) -> dict[str, str]:
    """`unet_key_map` of a checkpoint file."""
    header, _, _ = read_header(path)
    return unet_key_map(list(header), _build_unet(detect_family(path)).config)


def require_diffusers() -> None:
    """Raises ModelError with the command that mends it when diffusers is missing or of a version that was not tested."""
    try:
        found = version("diffusers")
    except PackageNotFoundError:
        found = None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found or "")[:2])
    if found is None or not _DIFFUSERS[0] <= numbers < _DIFFUSERS[1]:
        state = "is not installed" if found is None else f"has version {found}"
        bounds = ">={}.{},<{}.{}".format(*_DIFFUSERS[0], *_DIFFUSERS[1])
        raise ModelError(f'The package diffusers {state}, where {bounds} is needed; run in this Python environment: '
                         f'pip install "diffusers{bounds}"')  # fmt: skip


def _build_unet(family: Family) -> nn.Module:
    require_diffusers()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(family.config("unet"))


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Give a module built on the meta device its weights, in `dtype`; every name must be there and no other."""
    try:
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the {type(module).__name__} weights are incomplete or of another shape") from error
    return module.eval().requires_grad_(False)


def load_bundle(path: Path, dtype: torch.dtype = torch.float32) -> ModelBundle:
    """Load UNet, text encoder, tokenizer and autoencoder of a checkpoint; takes nothing from the network.

    Raises:
        ModelError: unreadable file, unsupported architecture, missing tensors, or diffusers is not installed.
    """
    try:
        return _load_bundle(path, detect_family(path), dtype)
    except ModelError as error:
        if path.name in str(error):
            raise
        raise ModelError(f"{path.name!r} does not fit its family: {error}; choose an unmodified checkpoint.") from error


def _load_bundle(path: Path, family: Family, dtype: torch.dtype) -> ModelBundle:
    unet = _build_unet(family)
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with opened(path) as file:
        names = list(file.keys())
        unet_names = unet_key_map(names, unet.config)
        _fill(unet, {ours: file.get_tensor(key) for ours, key in unet_names.items()}, dtype)
        text = CLIPTextModel(CLIPTextConfig(**family.config("text_encoder")))
        level = "text_model." if any(name.startswith("text_model.") for name in text.state_dict()) else ""
        prefix = f"{TEXT_PREFIX}text_model."
        wanted = text.state_dict().keys()
        found = {level + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        _fill(text, {ours: file.get_tensor(key) for ours, key in found.items() if ours in wanted}, dtype)
        autoencoder = _load_tiny_autoencoder(file, names, dtype)
    tokenizer = CLIPTokenizer.from_pretrained(str(family.tokenizer_folder))
    return ModelBundle(family, unet, text, tokenizer, autoencoder)


def tiny_autoencoder_key(name: str) -> str:
    """Checkpoint key of an `AutoencoderTiny` tensor; the host's decoder has its clamp at index 0."""
    part, _, index, rest = name.split(".", 3)
    shift = 1 if part == "decoder" else 0
    return f"{VAE_PREFIX}taesd_{part}.{int(index) + shift}.{rest}"


def _load_tiny_autoencoder(file: safe_open, names: list[str], dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        autoencoder = AutoencoderTiny()
    keys = {name: tiny_autoencoder_key(name) for name in autoencoder.state_dict()}
    if missing := set(keys.values()) - set(names):
        raise ModelError(f"the autoencoder tensor {min(missing)!r} is missing")
    return _fill(autoencoder, {name: file.get_tensor(key) for name, key in keys.items()}, dtype)


class BundleCache:
    """Keeps the bundle of one source, the last used; `free` gives its memory back."""

    def __init__(self):
        self._slot: tuple[str, ModelBundle] | None = None

    def get(self, source: Source, device: torch.device | str = "cpu") -> ModelBundle:
        if self._slot is None or self._slot[0] != source.sha256:
            self._slot = None
            if source_of(source.path).sha256 != source.sha256:
                raise ModelError(f"{source.path.name!r} has changed since the model was opened; open it again.")
            self._slot = (source.sha256, load_bundle(source.path))
        bundle = self._slot[1]
        return bundle if bundle.device == torch.device(device) else bundle.to(device)

    def free(self) -> None:
        self._slot = None
