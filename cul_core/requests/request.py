"""The request of one unlearning step, as a frozen value with JSON form and hash."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from ..base.config import Config, check_number, check_object, stable_hash
from ..base.errors import ConfigError, brief_repr
from ..concepts.concept import LONGEST_PROMPT, Concept, check_count, check_text
from ..methods import METHODS
from ..models.sampling import SamplerConfig
from ..models.weight_roles import role_of
from ..parts.part import Cost, Part
from ..parts.training_config import TrainingConfig
from ..regularizers import REGULARIZERS

_MOST_PROMPTS = 100_000
MOST_ANCHORS = 10_000


@dataclass(frozen=True)
class Request:
    """One unlearning step: targets, method, regularizers, training settings and anchors.

    Args:
        concepts: targets, forgotten together in this step.
        method: config of a registered method.
        regularizers: configs of registered regularizers; their hooks run in this order.
        training: iterations, batch size, learning rate, parameter group, seed.
        retain: concepts to retain.
        anchor_prompts: prompts whose images, sampled by the pretrained model, serve as anchors.
        anchor_count: number of anchor latents; prompts repeat in turn.
        anchor_sampler: how anchor latents are sampled.
        anchor_seed: seed of the anchor latents; runs with different training seeds can share it.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or there is no target or anchor prompt.
        ConceptError: a target cannot be forgotten as it is described.
    """

    concepts: tuple[Concept, ...]
    method: Config
    regularizers: tuple[Config, ...] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    retain: tuple[Concept, ...] = ()
    anchor_prompts: tuple[str, ...] = ()
    anchor_count: int = 100
    anchor_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    anchor_seed: int = 0

    def __post_init__(self):
        if not self.concepts:
            raise ConfigError("The request names no concept; give at least one target.")
        for name, kind in (
            ("concepts", Concept),
            ("retain", Concept),
            ("regularizers", Config),
            ("anchor_prompts", str),
        ):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
                raise ConfigError(
                    f"{name} of the request is {brief_repr(values)}; give a tuple of type {kind.__name__}."
                )
        for name, kind in (("training", TrainingConfig), ("anchor_sampler", SamplerConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(
                    f"{name} of the request is {brief_repr(getattr(self, name))}; give a {kind.__name__}."
                )
        check_count("names to forget", self.concepts)
        check_count("names to keep", self.retain)
        check_count("anchor prompts", self.anchor_prompts, _MOST_PROMPTS)
        check_number("anchor_count", self.anchor_count, 1, MOST_ANCHORS, int)
        check_number("anchor_seed", self.anchor_seed, 0, 2**64 - 1, int)
        for concept in self.concepts:
            concept.check_forgettable()
        for prompt in self.anchor_prompts:
            check_text("anchor prompt", prompt, LONGEST_PROMPT)
        if not self.anchor_prompts:
            raise ConfigError(
                "The request has no anchor prompts; give some captions of images that must stay."
            )
        METHODS.of(self.method)
        for config in self.regularizers:
            REGULARIZERS.of(config)

    @property
    def role(self) -> str:
        """Role of the weights that the step changes."""
        return METHODS.of(self.method).cls.role or role_of(self.training.group)

    def parts(self) -> tuple[Part, ...]:
        """New parts of a step, the method's first, then the regularizers' in their order."""
        regularizers = (REGULARIZERS.of(config).cls(config) for config in self.regularizers)
        return (METHODS.of(self.method).cls(self.method), *regularizers)

    def costs(self, previous: Sequence[Concept] = ()) -> list[Cost]:
        """Cost of each of `parts` in one update, after steps that forgot `previous`."""
        captions = len(set(self.anchor_prompts))
        return [part.cost(self.training, self.concepts, previous, captions) for part in self.parts()]

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which `from_json` makes an equal request."""
        return json.loads(self._json)

    @cached_property
    def _json(self) -> str:
        values = {
            "concepts": [concept.to_json() for concept in self.concepts],
            "method": self.method.to_json(),
            "regularizers": [config.to_json() for config in self.regularizers],
            "training": self.training.to_json(),
            "retain": [concept.to_json() for concept in self.retain],
            "anchor_prompts": list(self.anchor_prompts),
            "anchor_count": self.anchor_count,
            "anchor_sampler": self.anchor_sampler.to_json(),
            "anchor_seed": self.anchor_seed,
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """The request of `to_json`'s values; raises ConfigError or ConceptError if they are not valid."""
        check_object("request", values, [field.name for field in fields(cls)])
        for name in ("concepts", "regularizers", "retain", "anchor_prompts"):
            if not isinstance(values[name], list | tuple):
                raise ConfigError(f"{name} of the request is {brief_repr(values[name])}; give a list.")
        return cls(
            concepts=tuple(map(Concept.from_json, values["concepts"])),
            method=METHODS.from_json(values["method"]),
            regularizers=tuple(map(REGULARIZERS.from_json, values["regularizers"])),
            training=TrainingConfig.from_json(values["training"]),
            retain=tuple(map(Concept.from_json, values["retain"])),
            anchor_prompts=tuple(values["anchor_prompts"]),
            anchor_count=values["anchor_count"],
            anchor_sampler=SamplerConfig.from_json(values["anchor_sampler"]),
            anchor_seed=values["anchor_seed"],
        )

    @cached_property
    def hash(self) -> str:
        """Stable hash of all settings."""
        return stable_hash(self.to_json())


def effort(request: Mapping[str, Any]) -> str:
    """How the step of a request's JSON is made, for users: 'in closed form', or '200 iterations'."""
    entry = METHODS.find(request["method"]["name"])
    if entry is not None and entry.cls.is_closed_form:
        return "in closed form"
    return f"{request['training']['iterations']} iterations"
