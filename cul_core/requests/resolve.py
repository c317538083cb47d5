"""Resolve a preset, a model family and the caller's overrides to a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base.config import Config
from ..base.errors import ConfigError, brief_repr
from ..concepts.captions import anchor_prompts
from ..concepts.concept import Concept
from ..methods import METHODS
from ..models.family import Family
from .presets import Preset, preset
from .request import Request


@dataclass(frozen=True)
class Overrides:
    """Values that replace a preset's; None or an empty mapping keeps the preset's.

    Args:
        method: replaces the preset's method.
        regularizers: replace the preset's; an empty tuple means no regularizer.
        training: settings of `TrainingConfig` by name, and `anchor_count`, `anchor_steps` and
            `anchor_guidance`.
        parts: registered name -> settings by name, for a method or regularizer that the preset has.
        anchor_prompts: replace the family's captions.
        seed: of everything random in the step but its anchor images.
        anchor_seed: of the anchor images.
    """

    method: Config | None = None
    regularizers: tuple[Config, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    anchor_prompts: tuple[str, ...] | None = None
    seed: int = 0
    anchor_seed: int = 0


def adapt(chosen: str | Preset, family: Family, overrides: Overrides) -> Preset:
    """The preset with the family's values, then with the overrides.

    A trained method in the place of a closed-form one takes everything else from the preset `trained`.

    Raises:
        ConfigError: there is no such preset or setting, or the preset lacks a part that has overrides.
    """
    adapted = preset(chosen) if isinstance(chosen, str) else chosen
    if _is_trained(overrides.method) and not _is_trained(adapted.method):
        adapted = preset("trained")
    adapted = adapted.for_family(family)
    if overrides.method is not None:
        adapted = replace(adapted, method=overrides.method)
    if overrides.regularizers is not None:
        adapted = replace(adapted, regularizers=overrides.regularizers)
    names = [part.registry_name for part in (adapted.method, *adapted.regularizers)]
    for name, values in overrides.parts.items():
        if name not in names:
            setting, value = next(iter(values.items()))
            raise ConfigError(
                f"{setting} is {brief_repr(value)}, which needs {name!r}, and the preset has only "
                f"{', '.join(names)}; leave it out, or choose a preset with {name!r}."
            )

    def changed(part: Config) -> Config:
        return replace(part, **overrides.parts.get(part.registry_name, {}))

    adapted = replace(
        adapted, method=changed(adapted.method), regularizers=tuple(map(changed, adapted.regularizers))
    )
    return adapted.with_settings(overrides.training)


def _is_trained(method: Config | None) -> bool:
    return method is not None and not METHODS.of(method).cls.is_closed_form


def resolve(
    chosen: str | Preset,
    family: Family,
    targets: Sequence[Concept],
    keep: Sequence[Concept] = (),
    overrides: Overrides | None = None,
) -> Request:
    """The request that forgets `targets` and retains `keep`.

    Args:
        chosen: a preset, or the name of one.
        family: of the model.
        targets: concepts to forget together.
        keep: concepts to retain.
        overrides: values that replace the preset's.

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
