"""Errors that reach users: one sentence with what is wrong, the offending value, and how to mend it."""

import reprlib
from typing import Any

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def brief_repr(value: Any) -> str:
    """`repr` of a value, shortened for an error message: about 120 characters of a text."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a huge {type(value).__name__}"


class CulError(Exception):
    """Base of all errors this library raises on purpose."""


class ConceptError(CulError):
    """A concept is invalid, or cannot be forgotten as it is described."""


class ConfigError(CulError):
    """A setting has an invalid value, or names something unknown."""


class ModelError(CulError):
    """A model file cannot be read, or its architecture is not supported."""


class CheckpointError(CulError):
    """A result cannot be written, or a written file is damaged."""


class TrainingError(CulError):
    """Training of a step failed; its input model is unchanged."""


class MemoryShortError(CulError):
    """The device ran out of memory in a step; its input model is unchanged, and the step can resume."""


class Cancelled(CulError):
    """The caller cancelled the step; its input model is unchanged."""
