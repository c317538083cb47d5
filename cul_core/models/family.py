"""Model families as data: geometry, noise process, roles of weights, text encoders, and training recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .discrete_process import DiscreteProcess
from .noise_process import NoiseProcess

_DISTILLED_STEPS = 8
"""Sampling steps that suit models distilled to 1, 2, 4 or 8."""
_CONFIGS = Path(__file__).parent / "configs"
Shapes = Mapping[str, tuple[int, ...]]
"""Checkpoint key -> shape."""


@dataclass(frozen=True)
class Recipe:
    """A family's training values, in place of the presets' own, which are tuned on MiniCanvas.

    Args:
        iterations: optimizer updates of one step.
        batch_size: anchor latents per update.
        learning_rate: the optimizer's own, after any scaling by the batch size.
        anchor_count: anchor images, sampled from the pretrained model.
        anchor_steps: sampling steps of an anchor image.
        anchor_guidance: classifier-free guidance scale of the anchor images.
        is_guess: whether nobody has published or tuned such values for the family.
    """

    iterations: int
    batch_size: int
    learning_rate: float
    anchor_count: int
    anchor_steps: int
    anchor_guidance: float
    is_guess: bool = False


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders, and the output of it that the network reads.

    Args:
        prefix: key prefix of its tensors in a checkpoint.
        config: name of the file with its constructor arguments, without the ending.
        is_open_clip: whether its tensors have OpenCLIP's layout in the checkpoint.
        skips_last: use the penultimate hidden state without the final layer norm (clip skip 2); else the last
            one with it.
        pads_with_zero: pad with token 0 after EOS instead of with EOS.
        is_pooled: whether the network also reads its pooled, projected vector of the prompt.
        other_prefixes: key prefixes that its tensors have in other files.
    """

    prefix: str
    config: str = "text_encoder"
    is_open_clip: bool = False
    skips_last: bool = False
    pads_with_zero: bool = False
    is_pooled: bool = False
    other_prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Captions:
    """Caption templates for anchor prompts; see `concepts.captions`.

    Args:
        for_styles: templates of images in no style, with `{subject}`.
        subjects: phrases that replace `{subject}`.
        for_others: templates for what any other target becomes, with `{anchor}`.
    """

    for_styles: tuple[str, ...]
    subjects: tuple[str, ...]
    for_others: tuple[str, ...]


def predicting_velocity(family: Family, ends_in_noise: bool) -> Family:
    """The family's variant that predicts the velocity, with the same images."""
    return replace(
        family,
        display_name=f"{family.display_name} (v-prediction)",
        process=DiscreteProcess("v_prediction", ends_in_noise),
    )


def distilled(family: Family) -> Family:
    """The family's variant that is distilled to few steps without guidance, as Turbo and Lightning are."""
    recipe = family.recipe and replace(family.recipe, anchor_steps=_DISTILLED_STEPS, anchor_guidance=1.0)
    return replace(
        family, display_name=f"{family.display_name} (distilled)", recipe=recipe, is_distilled=True
    )


@dataclass(frozen=True)
class Family:
    """One model architecture.

    Args:
        name: key in files and presets, such as `sd1`.
        display_name: name that users see.
        signature: (first width, width of the text rows), which differs between families of one layout.
        latent_shape: (c, h, w) of the latents the model was trained on.
        latent_scale: the network's latents are the autoencoder's latents times this.
        image_size_px: side of the decoded image.
        sampling_batch: images per prediction when sampling; it affects an image's last bits.
        process: noise process, including what the network predicts.
        prefix: key prefix of the network's tensors in a checkpoint.
        roles: role of weights -> regular expression that matches their checkpoint keys.
        recognize: whether a checkpoint with these shapes, of this file name, is of the family; raises
            ModelError for one of the family that cannot be edited.
        variant: the family's variant in a checkpoint, from its header and a function that reads a tensor.
        velocity: the family's variant that predicts the velocity; its schedule has zero terminal SNR or not.
        folder: folder of constructor arguments, maybe with the tokenizer; None for this package's own.
        ships_tokenizer: whether the folder holds the tokenizer; otherwise the caller gives a tokenizer.
        has_decoder: whether a tiny autoencoder is loaded with the network; otherwise callers decode latents.
        recipe: training values in place of the presets' own; None for the presets'.
        closed_vocabulary: whether the text encoder knows only words that are one token.
        text_encoders: text encoders, whose rows the network reads side by side.
        captions: caption templates for anchor prompts; None for the common ones.
        classifier: makes the classifier of its images (`audits.classification.Classifier`); None without one.
        text_norm: name, within the network, of the norm between text rows and text readers; empty for none.
        has_frames: whether the network's latents have a frame axis, (b, c, 1, h, w), as those of videos have.
        is_known: whether its roles and latents are of a table, and not found by tracing.
        is_small: whether the network fits any memory and is too small to gain by `frozen_layers`.
        is_distilled: whether the checkpoint is distilled to few sampling steps without guidance.
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
    velocity: Callable[[Family, bool], Family] = predicting_velocity
    folder: Path | None = None
    ships_tokenizer: bool = False
    has_decoder: bool = False
    recipe: Recipe | None = None
    closed_vocabulary: bool = False
    text_encoders: tuple[TextEncoder, ...] = ()
    captions: Captions | None = None
    text_norm: str = ""
    has_frames: bool = False
    is_known: bool = True
    is_small: bool = False
    classifier: Callable[[], Any] | None = None
    is_distilled: bool = False

    def config(self, part: str) -> dict[str, Any]:
        """Constructor arguments of `unet`, of a text encoder or of `vae`."""
        return json.loads((self.config_folder / f"{part}.json").read_text(encoding="utf-8"))

    def has_config(self, part: str) -> bool:
        """Whether the family's folder has constructor arguments of that part."""
        return (self.config_folder / f"{part}.json").is_file()

    @property
    def config_folder(self) -> Path:
        """Folder of the constructor arguments."""
        return self.folder or _CONFIGS / self.name

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the family's own tokenizer; None if the caller has to give one."""
        return self.config_folder / "tokenizer" if self.ships_tokenizer else None


FAMILIES: dict[str, Family] = {}
"""Registered families by name."""


def register(family: Family) -> Family:
    """Register a family, so that its checkpoints are recognized; returns the family."""
    FAMILIES[family.name] = family
    return family


def supported(families: Iterable[Family] | None = None) -> str:
    """Display names of the families, by default of all registered ones, for error messages."""
    return ", ".join(family.display_name for family in families or FAMILIES.values())
