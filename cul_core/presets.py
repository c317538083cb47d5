"""Named combinations of method, regularizers and training settings, so that two words are enough to forget something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .concepts import Concept
from .config import Config, TrainingConfig
from .errors import ConfigError
from .methods.conabl import ConAblConfig
from .regularizers.projection import ProjectionConfig
from .regularizers.weight_anchor import L1SPConfig, L2SPConfig
from .training import Request


@dataclass(frozen=True)
class Preset:
    """A way to run one step, with a line that says when to use it."""

    description: str
    method: Config
    regularizers: tuple[Config, ...]
    training: TrainingConfig

    def request(self, concepts: Sequence[Concept], *, retain: Sequence[Concept], anchor_prompts: Sequence[str], seed: int,
                anchor_seed: int = 0) -> Request:  # fmt: skip
        return Request(
            concepts=tuple(concepts), method=self.method, regularizers=self.regularizers, training=replace(self.training, seed=seed),
            retain=tuple(retain), anchor_prompts=tuple(anchor_prompts), anchor_seed=anchor_seed,
        )  # fmt: skip


PRESETS = {
    "plain": Preset(
        "Concept Ablation as its authors' code does it, with nothing to hold the rest: the baseline that collapses.",
        ConAblConfig(**ConAblConfig.REFERENCE), (), TrainingConfig(),
    ),
    "recommended": Preset(
        "Concept Ablation towards the pretrained model's anchors, with update projection in damped coordinates: forgets as much, "
        "keeps what was listed and nearly all that was not.",
        ConAblConfig(teacher="pretrained"), (ProjectionConfig(decoys=300, damping=3e-5),),
        TrainingConfig(learning_rate=6e-4, schedule="linear"),
    ),
    "projection": Preset(
        "The paper's gradient projection as its authors' code does it.",
        ConAblConfig(**ConAblConfig.REFERENCE), (ProjectionConfig(**ProjectionConfig.REFERENCE),), TrainingConfig(),
    ),
    "l1sp": Preset("The paper's L1-SP, as a term of the loss.", ConAblConfig(**ConAblConfig.REFERENCE),
                   (L1SPConfig(anchor="start", form="penalty"),), TrainingConfig()),
    "l2sp": Preset("The paper's L2-SP, as a term of the loss.", ConAblConfig(**ConAblConfig.REFERENCE),
                   (L2SPConfig(anchor="start", form="penalty"),), TrainingConfig()),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
