"""Errors that reach users: one sentence that says what is wrong, with the offending value and how to mend it."""


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


class Cancelled(CulError):
    """The caller asked the step to stop; its input model is untouched."""
