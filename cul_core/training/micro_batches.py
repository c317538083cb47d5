"""Micro-batched predictions with gradient caching, which adapt to the memory of the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..base.errors import MemoryShortError
from ..models.free_memory import is_out_of_memory, release_memory
from ..models.network import Network
from ..models.text_conditioning import Conditioning
from .compute import Compute
from .data_parallel import Processes
from .master_weights import MasterWeights

logger = logging.getLogger(__name__)
T = TypeVar("T")
Inputs = tuple[Tensor, Tensor, Conditioning]


@dataclass
class _Call:
    """One prediction: inputs of this process' rows, the detached leaf `seen` by the loss, and the network's
    output with graph.

    The rows are `part` of the batch, and `seen` is all of it.

    `output` is None if memory was short; `backward` then runs the network again.
    """

    inputs: Inputs
    part: slice
    seen: Tensor
    output: Tensor | None


class MicroBatchedModel:
    """Predicts (see `sampling.Predict`), and backpropagates any loss of its predictions in micro-batches.

    Predictions are detached leaves. `backward` first computes dL/dprediction, then backpropagates it through
    the network call by call, the last call first. This is the chain rule in two steps, with the same sums in
    the same order. If memory is short, a call runs the network on micro-batches without a graph, and
    `backward` runs it again with a graph (gradient caching, Gao et al., arXiv 2101.06983). The loss is always
    that of the whole batch and is computed once, so no random number is drawn twice; the price is one more
    forward pass. A prediction is not detached if its inputs need gradients.

    When the device runs out of memory, the same call continues with micro-batches of half the size, down to
    one image, then with checkpointing.

    Args:
        network: holds the weights in training.
        compute: largest micro-batch, whether to use checkpointing, and whether to compile.
        say: called with a sentence when memory is short or compilation failed.
    """

    def __init__(
        self,
        network: Network,
        compute: Compute,
        say: Callable[[str], None],
        processes: Processes | None = None,
    ):
        self._network, self._compute, self._say = network, compute, say
        self._processes = processes or Processes()
        self._largest, self._calls = compute.largest_micro_batch, []
        self._is_checkpointed = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within the block the network uses checkpointing and compilation as `compute` says."""
        network = self._network
        try:
            if self._compute.checkpointing == "on":
                self._checkpoint()
            if not self._compute.compile:
                yield
                return
            import torch._dynamo

            # hooks are added and removed (see `Network.shared_rows_detached`); compiled code checks for them
            # only with these guards
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                network.set_compiled(True)
                yield
        finally:
            self._calls.clear()
            network.set_checkpointing(False)
            network.set_compiled(False)

    def _checkpoint(self) -> None:
        self._network.set_checkpointing(True)
        self._is_checkpointed = True

    def _predict(self, latents: Tensor, timesteps: Tensor, embeddings: Conditioning) -> Tensor:
        if self._network.is_compiled:
            try:
                return self._network.predict(latents, timesteps, embeddings)
            # raised where a compiler is missing or unfit
            except (RuntimeError, ImportError, OSError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                logger.warning("the network could not be compiled", exc_info=error)
                self._network.set_compiled(False)
                self._say("The network could not be compiled here; the step goes on without.")
        return self._network.predict(latents, timesteps, embeddings)

    def __call__(self, latents: Tensor, timesteps: Tensor, embeddings: Conditioning) -> Tensor:
        rows, inputs = len(latents), (latents, timesteps, embeddings)
        part = self._processes.part(rows)
        if not torch.is_grad_enabled():
            return self._processes.gathered(self._in_parts(_slice(inputs, part)), rows)
        if latents.requires_grad or embeddings.text.requires_grad:
            return self._predict(*inputs)
        inputs = _slice(inputs, part)
        own = len(inputs[0])
        with torch.enable_grad():
            output = self._fitting(own, lambda: self._predict(*inputs)) if own and self._fits(own) else None
        if output is None:
            with torch.no_grad():
                seen = self._in_parts(inputs)
        else:
            seen = output.detach()
        seen = self._processes.gathered(seen, rows)
        self._calls.append(_Call(inputs, part, seen.requires_grad_(), output))
        return self._calls[-1].seen

    def backward(self, loss: Tensor, masters: MasterWeights) -> None:
        """Accumulate the gradients of a loss in the master weights.

        Args:
            loss: scalar function of the predictions since the last `backward`, and of the master weights.
            masters: take the gradients.
        """
        calls, self._calls = self._calls, []
        (loss * masters.scale.value).backward()
        if self._processes.rank:  # every process has these gradients, of the weights themselves
            masters.forget()
        else:
            masters.keep()
        while calls:
            self._backward(calls.pop(), masters)

    def _backward(self, call: _Call, masters: MasterWeights) -> None:
        if call.seen.grad is None:  # the loss does not depend on this prediction
            return
        gradient, done, count = call.seen.grad[call.part], 0, len(call.inputs[0])
        while done < count:
            part = slice(done, count if self._fits(count - done) else done + self._largest)

            def through(part: slice = part) -> bool:
                output, call.output = call.output, None
                if output is None:
                    output = self._predict(*_slice(call.inputs, part))
                torch.autograd.backward(output, gradient[part])
                return True

            if self._fitting(part.stop - part.start, through):
                masters.keep()
                done = part.stop
            else:
                masters.forget()

    def _fits(self, count: int) -> bool:
        return not self._largest or count <= self._largest

    def _in_parts(self, inputs: Inputs) -> Tensor:
        done, count, outputs = 0, len(inputs[0]), []
        if not count:
            return inputs[0]
        while done < count:
            part = slice(done, count if self._fits(count - done) else done + self._largest)
            output = self._fitting(
                part.stop - part.start, lambda part=part: self._predict(*_slice(inputs, part))
            )
            if output is not None:
                outputs.append(output)
                done = part.stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _fitting(self, count: int, attempt: Callable[[], T]) -> T | None:
        """The attempt's result; None if the device ran out of memory, with smaller settings for the next try.

        Raises:
            MemoryShortError: no smaller setting is left.
        """
        try:
            return attempt()
        except RuntimeError as error:  # its frames hold tensors until here
            if not is_out_of_memory(error):
                raise
        release_memory(self._network.device)
        if count > 1:
            self._largest = count // 2
            self._say(f"Memory ran out; the step goes on with {self._largest} of {count} images at a time.")
        elif not self._is_checkpointed and self._compute.checkpointing != "off":
            self._checkpoint()
            self._say(
                "Memory ran out with one image at a time; the step goes on with checkpointing, which "
                "takes a third more time."
            )
        else:
            raise MemoryShortError(out_of_memory(self._network, self._is_checkpointed))
        return None


def _slice(inputs: Inputs, part: slice) -> Inputs:
    if part == slice(0, len(inputs[0])):
        return inputs
    latents, timesteps, embeddings = inputs
    return latents[part], timesteps[part] if timesteps.ndim else timesteps, embeddings[part]


def out_of_memory(network: Network, is_checkpointed: bool) -> str:
    """The error message of a step for which no smaller setting is left."""
    remedy = (
        "choose a smaller parameter group, or another device"
        if is_checkpointed
        else "allow checkpointing (auto)"
    )
    return (
        f"The memory of {network.device} is too short to train {network.family.display_name}, even one "
        f"image at a time {'with' if is_checkpointed else 'without'} checkpointing; close what else uses "
        f"it, {remedy}."
    )
