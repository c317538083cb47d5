"""Everything the nodes ask of the host: devices and memory, progress, cancelling, native models, sampling."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

from ..cul_core.errors import ModelError, shown
from ..cul_core.export import patch_names
from ._types import LoadedModel

PREVIEW_SIDE_PX = 1024


def load_native(path: Path) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) as the stock loader gives them.

    Raises:
        ModelError: it gives none.
    """
    try:
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=True, output_clip=True, embedding_directory=folder_paths.get_folder_paths("embeddings")
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"ComfyUI cannot load {path.name!r} ({shown(reason)}); choose an unmodified checkpoint.") from error
    return model, clip, vae


def clip_tokenizer() -> Path:
    """The host's copy of CLIP's tokenizer, for families whose own does not come with this pack."""
    return Path(comfy.sd.__file__).parent / "sd1_tokenizer"


def native(loaded: LoadedModel) -> tuple[Any, Any, Any]:
    """(MODEL with all edits as one patch on the source's weights, CLIP, VAE)."""
    edits, names = loaded.value.edits, patch_names(loaded.value)
    patched = loaded.model.clone()
    done = patched.add_patches({name: ("diff", (edits[ours],)) for ours, name in names.items()})
    if missing := set(names.values()) - set(done):
        raise ModelError(f"The host's model has no weight {min(missing)!r}, so the edit cannot be applied; load the checkpoint again.")
    return patched, loaded.clip, loaded.vae


@contextmanager
def normal_tensors() -> Iterator[None]:
    """The executor runs nodes in inference mode, whose tensors can never be trained on; within this block it is off."""
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
    """Text as the page has to get it, which shows it as HTML and makes links of what looks like one; history may be a stranger's."""
    return (text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}...").translate(_MARKUP)


class Progress:
    """Progress bar, preview picture and the line of text on the node that is running."""

    def __init__(self, total: int):
        self._bar, self._total = comfy.utils.ProgressBar(total), total
        context = get_executing_context()
        self._node, self._told = context.node_id if context else None, 0.0

    def update(self, done: int, preview: Image.Image | None = None) -> None:
        picture = ("JPEG", preview, PREVIEW_SIDE_PX) if preview is not None else None
        self._bar.update_absolute(done, self._total, picture)

    def say(self, text: str, now: bool = True) -> None:
        """Text under the node's widgets; with `now` false, at most four times a second."""
        if self._node is not None and (now or time.monotonic() - self._told > 0.25):
            self._told = time.monotonic()
            PromptServer.instance.send_progress_text(_as_html(text), self._node)


def to_image_tensor(picture: Image.Image) -> torch.Tensor:
    """A picture as the host's IMAGE, (1, h, w, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """The host's IMAGE (b, h, w, 3) as pictures."""
    return [Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()) for image in images]


@torch.no_grad()
def decode(loaded: LoadedModel, latents: torch.Tensor) -> list[Image.Image]:
    """Model-space latents (b, c, h, w) as pictures, by the host's VAE."""
    return to_pictures(loaded.vae.decode(loaded.model.model.process_latent_out(latents)))


def sample(loaded: LoadedModel, prompts: Sequence[str], *, seed: int, steps: int, cfg: float, sampler: str, scheduler: str,
           negative: str = "") -> Iterator[Image.Image]:  # fmt: skip
    """One picture per prompt by the host's own sampler, all from the same seed, at the size the model was trained on."""
    import nodes as stock  # the host's module of that name, not this package

    model, clip, vae = native(loaded)
    side = loaded.value.family.image_size_px
    encode, empty = stock.CLIPTextEncode().encode, stock.EmptyLatentImage().generate
    (refused,) = encode(clip, negative)
    for prompt in prompts:
        (latent,) = empty(side, side)
        (wanted,) = encode(clip, prompt)
        (latent,) = stock.common_ksampler(model, seed, steps, cfg, sampler, scheduler, wanted, refused, latent)
        yield to_pictures(vae.decode(latent["samples"]))[0]


def samplers() -> tuple[list[str], list[str]]:
    """(names of samplers, names of schedulers) that the host offers."""
    import comfy.samplers

    return list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)
