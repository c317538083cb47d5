"""Errors that reach users: one sentence that says what is wrong, with the offending value and how to mend
it."""

import reprlib
from typing import Any

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def brief_repr(value: Any) -> str:
    """`repr` for an error, cut so that a sentence stays one whatever it is about."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a huge {type(value).__name__}"


class CulError(Exception):
    """Base of all errors this library raises on purpose."""


class ConceptError(CulError):
    """A concept cannot be forgotten as it was described."""


class ConfigError(CulError):
    """A setting has a value that cannot work, or names something unknown."""


class ModelError(CulError):
    """A model file cannot be read, or is of a kind that is not supported."""


class CheckpointError(CulError):
    """A result could not be written, or a written one is damaged."""


class TrainingError(CulError):
    """A step went wrong while training; its input model is untouched."""


class MemoryShortError(CulError):
    """The device's memory is too short for a step; its input model is untouched, and it can go on later."""


class Cancelled(CulError):
    """The caller asked the step to stop; its input model is untouched."""
