"""Resume a stopped step to the same bits: its state as one tree of tensors and JSON values."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..base.errors import CheckpointError, MemoryShortError, TrainingError, brief_repr
from ..history.step_record import FORMAT, library_versions

if TYPE_CHECKING:
    from .master_weights import MasterWeights

logger = logging.getLogger(__name__)
State = dict[str, Any]
"""Nested dicts with string keys, lists and tuples of tensors, strings, numbers, booleans and None."""


class StateStore(Protocol):
    """Stores the state of a step while it trains. A failed write never fails the step."""

    def load(self, origin: Mapping[str, Any]) -> State | None:
        """The state of an earlier run of this step; None if there is none or its `origin` differs.

        `origin` has device, dtype and versions: a state of another origin would give other bits.
        """

    def offer(self, state: Callable[[], State]) -> None:
        """Write the state if a write is due."""

    def save(self, state: State) -> None:
        """Write the state now."""

    def save_if_quick(self, state: State) -> None:
        """Write the state now unless that takes long: a user who cancelled is waiting."""


class Resumable(Protocol):
    """Anything with state that updates change: a method, a regularizer, early stopping."""

    def state(self) -> State:
        """The state that updates have changed; tensors need not be copied."""

    def restore(self, state: State, device: torch.device) -> None:
        """Restore a state, whose tensors are on the CPU and pass to this object.

        Args:
            state: from `state` of an earlier run.
            device: on which the step trains.
        """


class Loop:
    """Progress of a step, with its state between updates for resuming to the same bits.

    A step may be stopped within an update (while a teacher samples) or during a measurement. The weights are
    then those after the last update, but the state of generator and parts may have advanced. Their state is
    therefore noted after every update, and a resumed step repeats the rest. From `change` until the next note
    the weights themselves are inconsistent; a step stopped there resumes from the last written state.

    Args:
        masters: master weights and optimizer.
        generator: source of the updates' random numbers.
        parts: everything else that updates change.
        state_store: stores the state; None keeps none.
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
        """Time that the updates have taken, in earlier runs too."""
        return self.earlier_seconds + time.monotonic() - self._begun

    def change(self) -> None:
        """Note that an update begins to change the weights."""
        self._marked = None

    def advance(self, loss: float, terms: dict[str, float]) -> None:
        """Note that an update is done, with its total loss and named terms."""
        self.iteration += 1
        self.losses.append(loss)
        self.terms = terms
        self._mark()
        if self._keeper is not None:
            self._keeper.offer(self._state)

    @contextmanager
    def resumable(self, iterations: int) -> Iterator[None]:
        """Resume from an earlier run's state on entry; write the state if the block is interrupted.

        Raises:
            TrainingError: the stored state does not fit this step.
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
        """Whether there is a consistent state to resume from: some update is done, and none half done."""
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
"""Keys that mark a JSON object with this one key as an encoded value.

"tensor" holds a tensor's name, "tuple" a tuple's items, "plain" a dict whose only key is one of these.
"""


def split(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """(the tree as JSON with `{"tensor": name}` for tensors, the tensors by name).

    A name is the tensor's path in the tree as a JSON pointer (RFC 6901).

    Raises:
        CheckpointError: the tree holds a value that a file cannot restore.
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
    tensors = {name: tensor for _, named in parts for name, tensor in named.items()}
    return ({"tuple": values} if isinstance(tree, tuple) else values), tensors


def _split_dict(tree: dict[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values, tensors = {}, {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"The state at {path!r} has the key {brief_repr(key)}; give it text as keys."
            )
        values[key], named = split(value, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")
        tensors |= named
    return ({"plain": values} if _mark_of(values) else values), tensors


def joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree of `split`'s JSON values and tensors."""
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
    """The only key of a JSON object if it is one of `_MARKS`, else None."""
    return next(iter(plain)) if len(plain) == 1 and plain.keys() <= _MARKS else None
