"""Early stopping: measure UA and RA during training, keep the best weights, decide when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ConfigError, TrainingError
from ..models.network import Network
from ..parts.training_config import TrainingConfig

Measure = Callable[[Network, Callable[[], None]], tuple[float, float] | None]
"""(network with the current weights, check) -> (UA, RA) in percent: unlearning and retain accuracy.

`check` raises Cancelled if the caller wants to stop. None means not measured, which ends the step with an
error. A stored step is found by its request alone, so a measurement may depend on nothing but the model.
"""


class EarlyStopping:
    """Early stopping that keeps a copy of the best weights (CUIG, simultaneous setting).

    It measures every `evaluate_every` updates and after the last. Best = highest min(UA, `stop_at_ua`), then
    highest RA, then earliest. It stops when UA reaches `stop_at_ua`, or when UA has set no new maximum for
    `patience` updates.

    Args:
        training: settings of the step; `evaluate_every` 0 turns early stopping off.
        measure: how to measure.

    Raises:
        ConfigError: early stopping is on and there is no `measure`.
    """

    def __init__(self, training: TrainingConfig, measure: Measure | None):
        if training.evaluate_every and measure is None:
            raise ConfigError(
                f"The step is to be measured every {training.evaluate_every} updates (evaluate_every), but "
                "there is nothing to measure this model with; set it to 0."
            )
        self._training, self._measure = training, measure
        self._highest, self._rose_at, self._rank = -math.inf, 0, (-math.inf, -math.inf)
        self.weights: dict[str, Tensor] | None = None
        self.figures: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """State for `restore`: the best weights and figures so far."""
        return {
            "highest": self._highest,
            "rose_at": self._rose_at,
            "rank": list(self._rank),
            "weights": self.weights,
            "figures": dict(self.figures),
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._highest, self._rose_at, self._rank = state["highest"], state["rose_at"], tuple(state["rank"])
        self.weights = state["weights"] and {
            name: weight.to(device) for name, weight in state["weights"].items()
        }
        self.figures = state["figures"]

    def is_time(
        self,
        iteration: int,
        network: Network,
        parameters: Mapping[str, Tensor],
        check: Callable[[], None],
    ) -> bool:
        """Whether to stop after update `iteration`; measures first if a measurement is due.

        Raises:
            TrainingError: the measurement gave no two finite percentages.
        """
        training = self._training
        if not training.evaluate_every or (
            iteration % training.evaluate_every and iteration != training.iterations
        ):
            return False
        measured = self._measure(network, check)
        if measured is None or not all(map(math.isfinite, measured)):
            raise TrainingError(
                f"The measurement after iteration {iteration} of {training.iterations} gave {measured} "
                "instead of two percentages, so nobody knows when to stop; set evaluate_every to 0."
            )
        ua, ra = measured
        if ua > self._highest:
            self._highest, self._rose_at = ua, iteration
        if (rank := (min(ua, training.stop_at_ua), ra)) > self._rank:
            self._rank = rank
            self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            self.figures = {"best_iteration": iteration, "best_ua": ua, "best_ra": ra}
        self.figures["last_iteration"] = iteration
        return ua >= training.stop_at_ua or iteration - self._rose_at >= training.patience
