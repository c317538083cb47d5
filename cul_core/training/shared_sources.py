"""Anchor images and stored states of a step on several processes: the first has them, and gives them to
all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .data_parallel import Processes
from .resume import State, StateStore


class SharedAnchors:
    """Anchor latents that the first process takes or draws, for all processes; see `AnchorSource`."""

    def __init__(self, source: Any, processes: Processes):
        self._source, self._processes = source, processes

    def anchor_latents(self, *arguments: Any, **named: Any) -> Tensor:
        return self._processes.told(lambda: self._source.anchor_latents(*arguments, **named))


class SharedStates:
    """The state that the first process reads and writes, for all processes; see `StateStore`."""

    def __init__(self, store: StateStore | None, processes: Processes):
        self._store, self._processes = store, processes

    def load(self, origin: Mapping[str, Any]) -> State | None:
        return self._processes.told(lambda: self._store.load(origin) if self._store is not None else None)

    def offer(self, state: Callable[[], State]) -> None:
        if self._store is not None:
            self._store.offer(state)

    def save(self, state: State) -> None:
        if self._store is not None:
            self._store.save(state)

    def save_if_quick(self, state: State) -> None:
        if self._store is not None:
            self._store.save_if_quick(state)
