"""Socket types and what travels through them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.v0_0_2 import io

from ..cul_core.base.config import Config
from ..cul_core.concepts.parsing import ConceptList
from ..cul_core.history.unlearn_model import UnlearnModel

CulModel = io.Custom("CUL_MODEL")
Concepts = io.Custom("CUL_CONCEPTS")
Method = io.Custom("CUL_METHOD")
Regularizers = io.Custom("CUL_REGULARIZERS")
Training = io.Custom("CUL_TRAINING")
Scores = io.Custom("CUL_SCORES")


@dataclass(frozen=True)
class LoadedModel:
    """What a CUL_MODEL socket carries, and a MODEL with history beside its weights.

    Args:
        value: the edits and their history.
        model: the host's MODEL of its source, without the edits.
        clip: CLIP of its source.
        vae: VAE of its source; None without one.
        strength: factor of the edits where the model is drawn with or saved.
        carrier: the MODEL with history that this was taken from, with what other nodes have added to it.
    """

    value: UnlearnModel
    model: Any
    clip: Any
    vae: Any
    strength: float = 1.0
    carrier: Any = field(default=None, repr=False)

    def with_value(self, value: UnlearnModel) -> LoadedModel:
        return replace(self, value=value)

    @cached_property
    def at_strength(self) -> UnlearnModel:
        """The value with its edits times `strength`: what the model draws with."""
        if self.strength == 1:
            return self.value
        return replace(
            self.value, edits={key: edit * self.strength for key, edit in self.value.edits.items()}
        )

    def get_ram_usage(self) -> int:
        """Bytes held; recent hosts evict cached results by this."""
        return self.value.nbytes()


CARRIED = {
    "CUL_MODEL": LoadedModel,
    "CUL_CONCEPTS": ConceptList,
    "CUL_METHOD": Config,
    "CUL_REGULARIZERS": tuple,
    "CUL_TRAINING": dict,
    "CUL_SCORES": tuple,
    "MODEL": ModelPatcher,
    "CLIP": CLIP,
    "VAE": VAE,
    "STRING": str,
    "BOOLEAN": bool,
    "INT": int,
    "FLOAT": float,
}
"""What the sockets and widgets of our nodes carry."""


def model_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """An input for a CUL_MODEL, or for a MODEL with history."""
    return io.MultiType.Input(name, [CulModel, io.Model], optional=optional, tooltip=tooltip)


def model_outputs() -> list:
    """The four outputs of every node that makes a model."""
    return [
        CulModel.Output(
            display_name="cul_model",
            tooltip="The model with what it has forgotten so far. Feeds the next Unlearn Step, Compare, "
            "Evaluate, Drift Map and the save nodes.",
        ),
        io.Model.Output(
            display_name="model", tooltip="The same model for ordinary nodes: KSampler, LoRA loaders, merges."
        ),
        io.Clip.Output(
            display_name="clip",
            tooltip="The checkpoint's text encoder, for CLIP Text Encode. Unlearning does not change it.",
        ),
        io.Vae.Output(
            display_name="vae", tooltip="The checkpoint's VAE, for VAE Decode. Unlearning does not change it."
        ),
    ]
