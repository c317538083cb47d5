"""fp32 master weights and AdamW state for a network that may compute in lower precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import TrainingError
from ..parts.training_config import TrainingConfig
from .data_parallel import Processes

_FIRST_SCALE, _GROWS_AFTER, _MOST_OVERFLOWS = 2.0**16, 1000, 20


class LossScale:
    """Dynamic loss scale for fp16 (Micikevicius et al., arXiv 1710.03740); always 1 unless `is_needed`.

    The scale is a power of two. It is halved when a gradient overflows and doubled after 1000 updates without
    overflow, which keeps small gradients from underflowing.
    """

    def __init__(self, is_needed: bool):
        self.is_needed, self.value = is_needed, _FIRST_SCALE if is_needed else 1.0
        self._good = self._overflows = 0

    def note(self, is_finite: bool) -> None:
        """Adapt the scale to whether the last update's gradients were finite.

        Raises:
            TrainingError: gradients overflowed in 20 updates in a row.
        """
        if is_finite:
            self._good, self._overflows = self._good + 1, 0
            if self._good % _GROWS_AFTER == 0:
                self.value *= 2
            return
        self._good, self._overflows, self.value = 0, self._overflows + 1, self.value / 2
        if self._overflows >= _MOST_OVERFLOWS:
            raise TrainingError(
                f"The gradients overflowed fp16 in {self._overflows} updates in a row; choose bfloat16 or "
                "float32."
            )


class MasterWeights:
    """fp32 master weights of a network's trained parameters, with their gradients and AdamW state.

    For an fp32 network the master weights are its own parameters. Otherwise the network's parameters are
    rounded copies, renewed after every update. With `is_offloaded`, master weights, moments and gradients
    rest in the CPU's memory and move to the device one tensor at a time.

    Args:
        parameters: key -> parameter of the network, which holds the step's start in the network's dtype.
        start: key -> the step's start in fp32.
        training: settings of the optimizer.
        is_offloaded: see above; ignored for an fp32 network.
        processes: that train together; their gradients are added up.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        start: Mapping[str, Tensor],
        training: TrainingConfig,
        is_offloaded: bool,
        processes: Processes | None = None,
    ):
        self._processes = processes or Processes()
        first = next(iter(parameters.values()))
        self._copies, self.device, self.dtype = parameters, first.device, first.dtype
        self.are_own = first.dtype == torch.float32
        self.is_offloaded = is_offloaded and not self.are_own
        self._storage_device = torch.device("cpu") if self.is_offloaded else self.device
        if self.are_own:
            self.weights: Mapping[str, nn.Parameter] = parameters
        else:
            self.weights = {
                name: nn.Parameter(start[name].to(self._storage_device, copy=True)) for name in parameters
            }
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.scale = LossScale(first.dtype == torch.float16)
        self._gradients: dict[str, Tensor] = {}
        self._arrived: dict[str, Tensor] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block, gradients of the network's parameters are collected for `keep` and `gather`."""
        handles = []
        try:
            for name, copy in self._copies.items():
                copy.requires_grad_(True)
                handles.append(copy.register_post_accumulate_grad_hook(partial(self._take, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for copy in self._copies.values():
                copy.requires_grad_(False)
                copy.grad = None

    def _take(self, name: str, copy: nn.Parameter) -> None:
        self._arrived[name], copy.grad = copy.grad.to(self._storage_device, torch.float32), None

    def keep(self) -> None:
        """Accumulate the gradients that arrived since the last `keep` or `forget`."""
        for name, gradient in self._arrived.items():
            if name in self._gradients:
                self._gradients[name] += gradient
            else:
                self._gradients[name] = gradient
        self._arrived.clear()

    def forget(self) -> None:
        """Drop the gradients that arrived since then, because their backward pass broke off."""
        self._arrived.clear()
        for copy in self._copies.values():
            copy.grad = None

    def gather(self) -> bool:
        """Whether the gradients are finite; gives every master weight the gradient of the unscaled loss.

        If a gradient overflowed in fp16, all gradients are dropped and the caller skips this update.

        Raises:
            TrainingError: see `LossScale.note`.
        """
        is_finite = True
        for name, weight in self.weights.items():
            gradient = self._gradients.pop(name, None)
            gradient = torch.zeros_like(weight) if gradient is None else gradient
            self._processes.add_up(gradient)
            # the gradient of a penalty, which is a function of the master weights
            if not self.are_own and weight.grad is not None:
                gradient += weight.grad
            if self.scale.is_needed:
                gradient /= self.scale.value
                is_finite = is_finite and bool(torch.isfinite(gradient).all())
            weight.grad = gradient
        if self.scale.is_needed:
            self.scale.note(is_finite)
        if not is_finite:
            self.optimizer.zero_grad()
        return is_finite

    @contextmanager
    def on_device(self, name: str) -> Iterator[nn.Parameter]:
        """Within the block a master weight, its gradient and moments are on the device.

        At the end of the block the network's rounded copy is renewed.
        """
        weight = self.weights[name]
        if self._storage_device != self.device:
            self._move(weight, self.device)
        try:
            yield weight
        finally:
            if not self.are_own:
                self._copies[name].data.copy_(weight.data)
            if self._storage_device != self.device:
                self._move(weight, self._storage_device)

    def _move(self, weight: nn.Parameter, device: torch.device) -> None:
        gradient, weight.grad = weight.grad, None
        weight.data = weight.data.to(device)
        weight.grad = None if gradient is None else gradient.to(device)
        moments = self.optimizer.state.get(weight, {})
        moments.update(
            {
                key: value.to(device)
                for key, value in moments.items()
                if isinstance(value, Tensor) and value.ndim
            }
        )

    def state(self) -> dict[str, Any]:
        """State for `restore`: master weights, AdamW's moments, loss scale; tensors are not copied."""
        moments = self.optimizer.state
        return {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "moments": [
                dict(moments[weight]) if weight in moments else {} for weight in self.weights.values()
            ],
            "scale": vars(self.scale),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state; raises KeyError, RuntimeError or the like if it is of other weights."""
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
            if not self.are_own:
                self._copies[name].copy_(weight)
        moments = {number: values for number, values in enumerate(state["moments"]) if values}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        vars(self.scale).update(state["scale"])

    def values(self) -> dict[str, Tensor]:
        """Copies of the master weights by key."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}
