"""The one way to a request: a preset, as a model family has it, with what the caller wants otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base.config import Config
from ..base.errors import ConfigError, brief_repr
from ..concepts.captions import anchor_prompts
from ..concepts.concept import Concept
from ..models.family import Family
from .presets import Preset, preset
from .request import Request


@dataclass(frozen=True)
class Overrides:
    """What a caller wants otherwise than a preset says; None and empty mean as the preset says.

    Args:
        method: takes the place of the preset's.
        regularizers: take the place of the preset's; an empty tuple means none at all.
        training: settings of `TrainingConfig` by name, and `anchor_count` and `anchor_steps`.
        parts: registered name -> settings of that method or regularizer by name, where the preset has it.
        anchor_prompts: captions in the place of the family's own.
        seed: everything random of the step derives from it.
        anchor_seed: everything random of its anchor images does.
    """

    method: Config | None = None
    regularizers: tuple[Config, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    anchor_prompts: tuple[str, ...] | None = None
    seed: int = 0
    anchor_seed: int = 0


def adapt(chosen: str | Preset, family: Family, overrides: Overrides) -> Preset:
    """The preset as the family has it, with everything replaced that is wanted otherwise.

    Raises:
        ConfigError: no such preset or setting, or settings of a part that the preset does not have.
    """
    found = (preset(chosen) if isinstance(chosen, str) else chosen).for_family(family)
    if overrides.method is not None:
        found = replace(found, method=overrides.method)
    if overrides.regularizers is not None:
        found = replace(found, regularizers=overrides.regularizers)
    names = [part.registry_name for part in (found.method, *found.regularizers)]
    for name, values in overrides.parts.items():
        if name not in names:
            setting, value = next(iter(values.items()))
            raise ConfigError(
                f"{setting} is {brief_repr(value)}, which needs {name!r}, and the preset has only "
                f"{', '.join(names)}; leave it out, or choose a preset with {name!r}."
            )

    def changed(part: Config) -> Config:
        return replace(part, **overrides.parts.get(part.registry_name, {}))

    found = replace(found, method=changed(found.method), regularizers=tuple(map(changed, found.regularizers)))
    return found.with_settings(overrides.training)


def resolve(
    chosen: str | Preset,
    family: Family,
    targets: Sequence[Concept],
    keep: Sequence[Concept] = (),
    overrides: Overrides | None = None,
) -> Request:
    """The request that forgets `targets` and declares `keep` as to be kept.

    Args:
        chosen: name of a preset, or one.
        family: of the model.
        targets: forgotten together.
        keep: declared as to be kept.
        overrides: what is wanted otherwise.

    Raises:
        ConceptError: a target cannot be forgotten as it is described.
        ConfigError: see `adapt`.
    """
    overrides = overrides or Overrides()
    prompts = overrides.anchor_prompts
    return adapt(chosen, family, overrides).request(
        targets,
        retain=keep,
        anchor_prompts=anchor_prompts(family, targets) if prompts is None else prompts,
        seed=overrides.seed,
        anchor_seed=overrides.anchor_seed,
    )
