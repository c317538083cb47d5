"""Model families as data: geometry, noise process, roles of weights, text encoders, and how to train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .noise_process import DiscreteProcess, NoiseProcess

_CONFIGS = Path(__file__).parent / "configs"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """How a step trains on a family for which the presets' own values, tuned on MiniCanvas, do not fit.

    Args:
        iterations: optimizer updates of one step.
        batch_size: anchor latents per update.
        learning_rate: the optimizer's own, after any scaling by the batch.
        anchor_count: images by the pretrained model that a step trains on.
        anchor_steps: sampling steps of each.
        anchor_guidance: their classifier-free guidance scale.
    """

    iterations: int
    batch_size: int
    learning_rate: float
    anchor_count: int
    anchor_steps: int
    anchor_guidance: float


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders, and what of its output the network reads.

    Args:
        prefix: of its tensors in a checkpoint.
        config: name of its file of constructor arguments.
        is_open_clip: whether the checkpoint has OpenCLIP's layout of it.
        skips_last: use the penultimate hidden state without the final layer norm (clip skip 2); else the last
            one with it.
        pads_with_zero: pad with token 0 after the end token instead of with the end token.
        is_pooled: whether its projected vector of the whole prompt is read too.
    """

    prefix: str
    config: str = "text_encoder"
    is_open_clip: bool = False
    skips_last: bool = False
    pads_with_zero: bool = False
    is_pooled: bool = False


@dataclass(frozen=True)
class Captions:
    """Caption templates from which anchor prompts are made; see `concepts.captions`.

    Args:
        for_styles: templates of images in no style, with `{subject}`.
        subjects: what stands in them.
        for_others: templates for what any other target becomes, with `{anchor}`.
    """

    for_styles: tuple[str, ...]
    subjects: tuple[str, ...]
    for_others: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        name: key in files and presets, such as `sd1`.
        display_name: what users see.
        signature: (first width, width of the text rows), which tells families of one layout apart.
        latent_shape: channels, height, width of the latents the model was trained on.
        latent_scale: model-space latents = autoencoder latents x this.
        image_size_px: side of the decoded image.
        sampling_batch: images per prediction when sampling; part of what fixes an image's last bits.
        process: how images become noise, and what the network predicts.
        prefix: of the network's tensors in a checkpoint.
        roles: role of weights -> regular expression that finds it in their checkpoint keys.
        recognize: whether a checkpoint with these shapes, of this file name, is of the family; raises
            ModelError for one that is and cannot be edited.
        variant: the family as a checkpoint has it, from its header and a function that reads a tensor.
        folder: constructor arguments and maybe the tokenizer; None for the one in this package.
        ships_tokenizer: whether the folder holds the tokenizer; the caller gives its folder otherwise.
        has_decoder: whether a tiny autoencoder is loaded too; callers decode latents with their own
            otherwise.
        recipe: training values instead of the presets' own.
        closed_vocabulary: whether the text encoder knows no words but those that are one token.
        text_encoders: the network reads their rows side by side.
        captions: templates of its own for anchor prompts.
        classifier: makes what classifies its images (`audits.classification.Classifier`), where that exists.
        is_small: whether it fits any memory, and is too small to gain by `frozen_layers`.
    """

    name: str
    display_name: str
    signature: tuple[int, int]
    latent_shape: tuple[int, int, int]
    latent_scale: float
    image_size_px: int
    sampling_batch: int
    prefix: str
    roles: Mapping[str, str] = field(hash=False)
    recognize: Callable[[Family, Shapes, str], bool]
    process: NoiseProcess = DiscreteProcess()
    variant: Callable[[Family, Mapping[str, dict], Callable[[str], Any]], Family] = lambda family, *_: family
    folder: Path | None = None
    ships_tokenizer: bool = False
    has_decoder: bool = False
    recipe: Recipe | None = None
    closed_vocabulary: bool = False
    text_encoders: tuple[TextEncoder, ...] = ()
    captions: Captions | None = None
    is_small: bool = False
    classifier: Callable[[], Any] | None = None

    def config(self, part: str) -> dict[str, Any]:
        """Constructor arguments of `unet`, of a text encoder or of `vae`."""
        return json.loads((self.config_folder / f"{part}.json").read_text(encoding="utf-8"))

    def has_config(self, part: str) -> bool:
        """Whether the package knows these arguments."""
        return (self.config_folder / f"{part}.json").is_file()

    @property
    def config_folder(self) -> Path:
        """Folder of the constructor arguments."""
        return self.folder or _CONFIGS / self.name

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer in this package; None if it is not here."""
        return self.config_folder / "tokenizer" if self.ships_tokenizer else None


FAMILIES: dict[str, Family] = {}
"""Registered families by name."""


def register(family: Family) -> Family:
    """Adds a family to those that are recognized."""
    FAMILIES[family.name] = family
    return family


def supported(families: Iterable[Family] | None = None) -> str:
    """Their display names, for error messages."""
    return ", ".join(family.display_name for family in families or FAMILIES.values())
