"""The one training loop: `run_step(model, request)` makes a new `UnlearnModel` and never touches its
input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ..base.errors import Cancelled, ConfigError, TrainingError
from ..methods.base import Method
from ..models.weight_roles import role_of
from ..parts.step_context import StepContext
from ..parts.training_config import TrainingConfig
from ..regularizers.base import Regularizer
from .callbacks import Callbacks, Progress
from .compute import Compute
from .early_stopping import EarlyStopping
from .master_weights import MasterWeights
from .micro_batches import MicroBatchedModel
from .resume import Loop, StateStore


def _coordinates(regularizers: list[Regularizer], name: str) -> Tensor | None:
    """The basis in which the change of a matrix is limited, whichever regularizer limits it.

    Raises:
        ConfigError: two of them do, so that no mask can respect both.
    """
    found = [basis for regularizer in regularizers if (basis := regularizer.coordinates(name)) is not None]
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} regularizers limit the directions of {name!r}, and no mask can respect them all; "
            "keep one of them, and give it everything that should stay."
        )
    return found[0] if found else None


def _train(
    context: StepContext,
    method: Method,
    regularizers: list[Regularizer],
    callbacks: Callbacks,
    stopping: EarlyStopping,
    state_store: StateStore | None,
    compute: Compute,
    is_offloaded: bool,
) -> tuple[dict[str, Tensor], list[float], dict[str, float], float]:
    """(new weights, the best if they were measured; loss of every update; last value of each part of the
    loss; seconds of training that earlier runs have spent on it).
    """
    training, network = context.training, context.network
    parameters = network.weights(role_of(training.group))
    generator = context.generator("batches")
    student = MicroBatchedModel(context.network, compute, callbacks.on_message)

    def stop_if_asked() -> None:
        if callbacks.should_stop():
            raise Cancelled(
                f"Cancelled at iteration {iteration} of {training.iterations}; the input model is unchanged."
            )

    def teacher(weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        stop_if_asked()  # whole pictures may be sampled by a teacher within one update
        with torch.no_grad(), network.with_weights(weights):
            return student(*inputs)

    blocked = network.shared_rows_detached if method.blocks_first_token else nullcontext
    pretrained, start = partial(teacher, context.pretrained), partial(teacher, context.start)

    def terms() -> Iterator[tuple[Tensor, Mapping[str, float]]]:
        """(what to minimize, its named parts), one after the other: each is made after the backward of the
        one before, so that no teacher is called in between and one graph at a time is in memory."""
        with blocked():  # until the backward is done, which may run the network again
            loss = method.loss(student, pretrained if method.teacher_is_pretrained else start, generator)
            total = loss.total
            for regularizer in regularizers:
                if (penalty := regularizer.penalty(masters.weights)) is not None:
                    total = total + penalty
            yield total, loss.parts
        for regularizer in regularizers:
            if named := regularizer.loss_terms(student, pretrained, start):
                yield sum(named.values()), {name: term.item() for name, term in named.items()}

    with _student_weights(context, parameters):
        masters = MasterWeights(parameters, context.start, training, is_offloaded)
        optimizer = masters.optimizer
        with masters.collecting(), student.ready():
            with blocked():
                for part in (method, *regularizers):
                    part.prepare_mask(context, partial(_coordinates, regularizers))
            loop = Loop(masters, generator, (method, *regularizers, stopping), state_store)

            def is_over() -> bool:
                """Measures and shows what the last update made, if it is time to; whether it was the last of
                all."""
                done, iterations = loop.iteration, training.iterations
                if not done:
                    return not iterations
                is_last = (
                    stopping.is_time(done, context.network, masters.weights, stop_if_asked)
                    or done == iterations
                )
                callbacks.preview(context.network, done, done if is_last else iterations)
                return is_last

            callbacks.preview(context.network, 0, training.iterations)
            with loop.kept(training.iterations):
                iteration = loop.iteration
                while not is_over():
                    iteration = loop.iteration + 1
                    stop_if_asked()
                    # all prompts are encoded by now, but for a caller's own
                    context.network.free_text_encoders()
                    if training.schedule == "linear":
                        optimizer.param_groups[0]["lr"] = training.learning_rate * (
                            1 - (iteration - 1) / training.iterations
                        )
                    total, parts = 0.0, {}
                    for term, named in terms():
                        total += term.item()
                        if not math.isfinite(total):
                            raise TrainingError(
                                f"The loss became {total} at iteration {iteration} of "
                                f"{training.iterations}; "
                                f"lower the learning rate ({training.learning_rate:g}) or the regularizers' "
                                "strengths."
                            )
                        student.backward(term, masters)
                        parts |= named
                    loop.change()
                    if not masters.gather():
                        for part in (method, *regularizers):
                            part.update_skipped(iteration)
                    elif method.after_backward(iteration, masters.weights, optimizer):
                        where = masters.device, masters.on_device
                        _update(masters.weights, optimizer, method, regularizers, training, *where)
                    else:
                        optimizer.zero_grad()
                    loop.advance(total, parts)
                    callbacks.on_progress(
                        Progress(iteration, training.iterations, total, parts, loop.seconds)
                    )
            return stopping.weights or masters.values(), loop.losses, loop.terms, loop.earlier_seconds


@torch.no_grad()
def _update(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    method: Method,
    regularizers: list[Regularizer],
    training: TrainingConfig,
    device: torch.device | str = "cpu",
    on_device: Callable[[str], AbstractContextManager] = nullcontext,
) -> None:
    """One constrained optimizer update. The order is a contract: gradients, clipping, optimizer, proximal,
    then hard constraints.

    After clipping the tensors are updated one by one, so that only one is held twice. Each is on `device`
    within `on_device` of its name.
    """
    for name, parameter in parameters.items():
        gradient = parameter.grad.to(device)
        for part in (method, *regularizers):
            gradient = part.transform_gradient(name, gradient)
        parameter.grad = gradient.to(parameter.device)
    if training.max_grad_norm:
        nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
    (group,) = optimizer.param_groups
    try:
        for name, parameter in parameters.items():
            with on_device(name):
                before = parameter.detach().clone()
                group["params"] = [parameter]
                optimizer.step()
                parameter.grad = None
                parameter.data.copy_(
                    before + _allowed(name, before, parameter.data, group["lr"], method, regularizers)
                )
    finally:
        group["params"] = list(parameters.values())


def _allowed(
    name: str,
    before: Tensor,
    weight: Tensor,
    learning_rate: float,
    method: Method,
    regularizers: list[Regularizer],
) -> Tensor:
    """The change of a weight that proximal steps, masks and hard constraints leave of what the optimizer
    did."""
    for regularizer in regularizers:
        weight = regularizer.proximal(name, weight, learning_rate)
    masks = [mask for part in (method, *regularizers) if (mask := part.mask(name, weight)) is not None]
    mask = math.prod(masks[1:], start=masks[0]) if masks else None
    change = weight - before
    constrained = None
    for regularizer in regularizers:
        allowed = regularizer.constrain(name, change if constrained is None else constrained, mask)
        constrained = constrained if allowed is None else allowed
    if constrained is None:
        constrained = change if mask is None else change * mask
    return constrained


@contextmanager
def _student_weights(context: StepContext, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block the UNet holds the step's start, in weights that may change; then W0 again."""
    if context.network.dtype == torch.float32:
        with context.network.with_weights({name: weight.clone() for name, weight in context.start.items()}):
            yield
        return
    try:  # in place: W0 is rounded in the UNet, and exact elsewhere
        for name, parameter in parameters.items():
            parameter.data.copy_(context.start[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(context.pretrained[name])
