"""Going on where a step was stopped: all that its next update depends on, as one tree of tensors and JSON
values."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..base.errors import CheckpointError, MemoryShortError, TrainingError, brief_repr
from ..history.step_record import FORMAT, library_versions
from .master_weights import MasterWeights

logger = logging.getLogger(__name__)
State = dict[str, Any]
"""Nested dicts (with text as keys), lists and tuples of tensors, text, numbers, truth values and None."""


class StateStore(Protocol):
    """Where the state of a step stays while it trains. A state that cannot be kept never fails the step."""

    def load(self, origin: Mapping[str, Any]) -> State | None:
        """The state that an earlier run of this step left, if its `origin` is this one: another would give
        other bits."""

    def offer(self, state: Callable[[], State]) -> None:
        """Keep the state if it is time to."""

    def save(self, state: State) -> None:
        """Keep it now."""

    def save_if_quick(self, state: State) -> None:
        """Keep it now unless that takes long: somebody who has cancelled waits for it."""


class Resumable(Protocol):
    """A part of a step: a method, a regularizer, early stopping."""

    def state(self) -> State:
        """What updates have changed in it; tensors may be its own."""

    def restore(self, state: State, device: torch.device) -> None:
        """Go on from a state; it owns the tensors from here on, which are on the CPU. The step trains on
        `device`."""


class Loop:
    """How far a step is, and how it goes on from where it was stopped, to the same bits.

    A step may be stopped within an update, while a teacher draws, or while it is measured after one: weights
    are whole then, but the parts may have moved on. So these are noted between updates (`mark`), and a step
    that goes on does the rest once more. From `change` to the next mark nothing is whole; a step that is
    stopped there keeps what it last wrote.

    Args:
        masters: what is trained, and its optimizer.
        generator: the one that updates draw from.
        parts: whatever else updates change.
        state_store: where the state stays, if anywhere.
    """

    def __init__(
        self,
        masters: MasterWeights,
        generator: torch.Generator,
        parts: Sequence[Resumable],
        state_store: StateStore | None,
    ):
        self._masters, self._generator, self._parts, self._keeper = masters, generator, parts, state_store
        self.iteration, self.losses, self.terms = 0, [], {}
        self.earlier_seconds, self._begun = 0.0, time.monotonic()
        self._marked: State | None = None
        self._origin = {
            "device": masters.device.type,
            "dtype": str(masters.dtype),
            "versions": library_versions(),
            "format": FORMAT,  # names of the weights
        }

    @property
    def seconds(self) -> float:
        """Time that its updates have taken, in earlier runs too."""
        return self.earlier_seconds + time.monotonic() - self._begun

    def change(self) -> None:
        self._marked = None

    def advance(self, loss: float, terms: dict[str, float]) -> None:
        """An update is done."""
        self.iteration += 1
        self.losses.append(loss)
        self.terms = terms
        self._mark()
        if self._keeper is not None:
            self._keeper.offer(self._state)

    @contextmanager
    def kept(self, iterations: int) -> Iterator[None]:
        """Begins where an earlier run was stopped, and keeps the state if the block is.

        Raises:
            TrainingError: the state is not one of this step.
        """
        if self._keeper is not None and (state := self._keeper.load(self._origin)) is not None:
            self._restore(state)
            logger.info("resumed at iteration %d of %d", self.iteration, iterations)
        self._mark()
        try:
            yield
        except TrainingError:
            raise
        except (MemoryShortError, torch.OutOfMemoryError):
            if self._keeper is not None and self._is_whole:
                self._keeper.save(self._state())
            raise
        except BaseException:  # Cancelled, an interrupt, the host's own exception
            if self._keeper is not None and self._is_whole:
                self._keeper.save_if_quick(self._state())
            raise

    @property
    def _is_whole(self) -> bool:
        """Whether there is a state to go on from: an update is done, and none is half done."""
        return self._marked is not None and self.iteration > 0

    def _mark(self) -> None:
        self._marked = {
            "generator": self._generator.get_state(),
            "parts": [part.state() for part in self._parts],
        }

    def _state(self) -> State:
        return {
            "iteration": self.iteration,
            "losses": self.losses,
            "terms": self.terms,
            "seconds": self.seconds,
            **self._marked,
            "origin": self._origin,
            "masters": self._masters.state(),
        }

    def _restore(self, state: State) -> None:
        try:
            self.iteration, self.losses, self.terms = state["iteration"], state["losses"], state["terms"]
            self.earlier_seconds = state["seconds"]
            self._masters.restore(state["masters"])
            self._generator.set_state(state["generator"])
            for part, values in zip(self._parts, state["parts"], strict=True):
                part.restore(values, self._masters.device)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainingError(
                f"The state that an earlier run of this step left does not fit it ({error!r}); it is thrown "
                "away, so run the step again."
            ) from error


_MARKS = {"tensor", "tuple", "plain"}
"""Keys that say, alone in an object of JSON, what it stands for.

"tensor" has a tensor's name, "tuple" a list, and "plain" a dict that itself has one of these keys alone.
"""


def split(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """(the tree as JSON, in which tensors are `{"tensor": name}`; the tensors by name).

    A name is the way to its tensor, as a JSON pointer (RFC 6901).

    Raises:
        CheckpointError: something in the tree would not come back from a file as it is.
    """
    if isinstance(tree, Tensor):
        return {"tensor": path}, {path: tree}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree, {}
    if isinstance(tree, dict):
        return _split_dict(tree, path)
    if not isinstance(tree, list | tuple):
        raise CheckpointError(
            f"The state at {path!r} is a {type(tree).__name__}, which its file cannot hold; make it of "
            "dicts, lists, tuples, tensors, text and numbers."
        )
    parts = [split(value, f"{path}/{number}") for number, value in enumerate(tree)]
    values = [plain for plain, _ in parts]
    tensors = {name: tensor for _, found in parts for name, tensor in found.items()}
    return ({"tuple": values} if isinstance(tree, tuple) else values), tensors


def _split_dict(tree: dict[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values, tensors = {}, {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"The state at {path!r} has the key {brief_repr(key)}; give it text as keys."
            )
        values[key], found = split(value, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")
        tensors |= found
    return ({"plain": values} if _mark_of(values) else values), tensors


def joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `split` took apart."""
    if isinstance(plain, list):
        return [joined(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    mark = _mark_of(plain)
    if mark == "tensor":
        return tensors[plain["tensor"]]
    if mark == "tuple":
        return tuple(joined(plain["tuple"], tensors))
    values = plain["plain"] if mark == "plain" else plain
    return {key: joined(value, tensors) for key, value in values.items()}


def _mark_of(plain: dict[str, Any]) -> str | None:
    """The one key of an object, if it is one of `_MARKS`."""
    return next(iter(plain)) if len(plain) == 1 and plain.keys() <= _MARKS else None
