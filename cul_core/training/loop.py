"""The one training loop: losses, gradients, and the constrained update, in an order that is a contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..base.errors import Cancelled, TrainingError
from ..methods.base import Method
from ..models.weight_roles import role_of
from ..parts.part import Part, Teachers
from ..parts.step_context import StepContext
from ..parts.training_config import TrainingConfig
from ..regularizers.base import Regularizer
from .callbacks import Callbacks, Progress
from .compute import Compute
from .constraints import Constraints
from .data_parallel import Processes
from .early_stopping import EarlyStopping
from .master_weights import MasterWeights
from .micro_batches import MicroBatchedModel
from .resume import Loop, StateStore
from .solved_chain import others, with_others


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Args:
        weights: new fp32 weights by checkpoint key; with early stopping, the best ones.
        losses: total loss of every update.
        terms: last value of each named term of the loss.
        earlier_seconds: time that earlier runs of the step have taken.
        edits: changes of the pretrained weights in fp32, where a closed-form method gives them exactly.
    """

    weights: dict[str, Tensor]
    losses: Sequence[float] = ()
    terms: Mapping[str, float] | None = None
    earlier_seconds: float = 0.0
    edits: Mapping[str, Tensor] | None = None


def train(
    context: StepContext,
    method: Method,
    regularizers: Sequence[Regularizer],
    callbacks: Callbacks,
    stopping: EarlyStopping,
    state_store: StateStore | None,
    compute: Compute,
    is_offloaded: bool,
    processes: Processes | None = None,
) -> Trained:
    """Train the weights of the step's group, or edit them with a closed-form method.

    The network holds W0 again when this returns or raises.

    Args:
        context: of the step; `prepare` of every part has run.
        method: the method.
        regularizers: in their order.
        callbacks: progress and cancelling.
        stopping: early stopping.
        state_store: keeps the state for resuming; None keeps none.
        compute: compute settings, as `memory_plan.planned` resolved them.
        is_offloaded: whether the master weights rest in the CPU's memory.
        processes: that train the step together.
    """
    parameters = context.network.weights(method.role or role_of(context.training.group))
    student = MicroBatchedModel(context.network, compute, callbacks.on_message, processes)
    with _holding_start(context, parameters):
        masters = MasterWeights(parameters, context.start, context.training, is_offloaded, processes)
        training = _Training(context, method, regularizers, callbacks, stopping, masters, student)
        with masters.collecting(), student.ready():
            training.prepare_masks()
            if method.is_closed_form:
                return training.in_closed_form()
            return training.run(Loop(masters, training.generator, training.resumable, state_store))


class _Training:
    """One step in training; see `train`."""

    def __init__(
        self,
        context: StepContext,
        method: Method,
        regularizers: Sequence[Regularizer],
        callbacks: Callbacks,
        stopping: EarlyStopping,
        masters: MasterWeights,
        student: MicroBatchedModel,
    ):
        self._context, self._config = context, context.training
        self._method, self._regularizers = method, regularizers
        self._parts: tuple[Part, ...] = (method, *regularizers)
        self._callbacks, self._stopping = callbacks, stopping
        self._masters, self._student = masters, student
        self._constraints = Constraints(self._parts, masters.device)
        self._iteration = 0
        self._keeps_copies = not masters.is_offloaded
        self._copies: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self.generator = context.generator("batches")
        self.resumable = (*self._parts, stopping)
        teachers = (partial(self._teacher, weights) for weights in (context.pretrained, context.start))
        self._teachers = Teachers(*teachers)

    def prepare_masks(self) -> None:
        """Run `prepare_mask` of every part, on the step's start."""
        with self._blocked():
            for part in self._parts:
                part.prepare_mask(self._context, self._constraints.allowed_subspace)

    def in_closed_form(self) -> Trained:
        """The closed-form method's result, with a preview before and after it."""
        network = self._context.network
        self._callbacks.preview(network, 0, 1)
        trained = self.solved() if self._method.solves_chain else Trained(self.edited())
        with network.with_weights(trained.weights):
            self._callbacks.preview(network, 1, 1)
        return trained

    @torch.no_grad()
    def edited(self) -> dict[str, Tensor]:
        """The closed-form method's weights, with masks and constraints applied to their change."""
        start, new = self._context.start, self._method.edit(self._context)
        return {
            name: weight + self._constraints.allowed(name, new[name].to(weight) - weight)
            for name, weight in start.items()
        }

    @torch.no_grad()
    def solved(self) -> Trained:
        """The edits of all requests of the chain solved together, on top of what its other steps changed."""
        context, pretrained = self._context, self._context.pretrained
        earlier, own = context.solved.earlier, context.solved.own
        rest = others(self._method, context)  # first, so that the method reports the whole set
        edits = with_others(self._method.solve(context, (*earlier, own)), rest)
        if self._regularizers:
            edits = {key: self._allowed(key, edit) for key, edit in edits.items()}
        weights = {
            key: weight + edits[key].to(weight.device) if key in edits else weight
            for key, weight in pretrained.items()
        }
        return Trained(weights, edits=edits)

    def _allowed(self, key: str, edit: Tensor) -> Tensor:
        """The edit whose change since the step's start the constraints allow."""
        before = self._context.start[key] - self._context.pretrained[key]
        change = edit.to(before.device) - before
        return (before + self._constraints.allowed(key, change)).cpu()

    def run(self, loop: Loop) -> Trained:
        """Run all updates, resuming where an earlier run stopped."""
        config, network = self._config, self._context.network
        self._callbacks.preview(network, 0, config.iterations)
        with loop.resumable(config.iterations):
            self._iteration = loop.iteration
            while not self._is_over(loop.iteration):
                self._iteration = loop.iteration + 1
                self._stop_if_asked()
                network.free_text_encoders()  # all but a caller's own prompts are encoded by now
                if config.schedule == "linear":
                    share = 1 - (self._iteration - 1) / config.iterations
                    self._masters.optimizer.param_groups[0]["lr"] = config.learning_rate * share
                total, terms = self._gradients()
                loop.change()
                self._update()
                loop.advance(total, terms)
                progress = Progress(self._iteration, config.iterations, total, terms, loop.seconds)
                self._callbacks.on_progress(progress)
        weights = self._stopping.weights or self._masters.values()
        return Trained(weights, loop.losses, loop.terms, loop.earlier_seconds)

    def _is_over(self, done: int) -> bool:
        """Whether update `done` was the last; measures and previews first if either is due."""
        iterations, network = self._config.iterations, self._context.network
        if not done:
            return not iterations
        stops = self._stopping.is_time(done, network, self._masters.weights, self._stop_if_asked)
        is_last = stops or done == iterations
        self._callbacks.preview(network, done, done if is_last else iterations)
        return is_last

    def _stop_if_asked(self) -> None:
        if self._callbacks.should_stop():
            where = f"iteration {self._iteration} of {self._config.iterations}"
            raise Cancelled(f"Cancelled at {where}; the input model is unchanged.")

    # --- losses

    def _blocked(self) -> AbstractContextManager[None]:
        is_blocked = self._method.blocks_first_token
        return self._context.network.shared_rows_detached() if is_blocked else nullcontext()

    def _teacher(self, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        self._stop_if_asked()  # whole images may be sampled by a teacher within one update
        with torch.no_grad(), self._context.network.with_weights(self._as_computed(weights)):
            return self._student(*inputs)

    def _as_computed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A teacher's weights in the network's dtype, rounded once per step unless memory is short."""
        network = self._context.network
        if network.dtype == torch.float32 or not self._keeps_copies:
            return weights
        # both teachers are the same memory while nothing is edited
        key = tuple(weight.data_ptr() for weight in weights.values())
        if key not in self._copies:
            self._copies[key] = {
                name: weight.to(network.device, network.dtype) for name, weight in weights.items()
            }
        return self._copies[key]

    def _losses(self) -> Iterator[tuple[Tensor, Mapping[str, float]]]:
        """(loss, its named terms), one per backward pass.

        Each loss is computed after the backward pass of the one before: no teacher swaps weights in between,
        and only one graph is in memory at a time.
        """
        with self._blocked():  # through the backward pass, which may run the network again
            loss = self._method.loss(self._student, self._teachers, self.generator)
            total = loss.total
            for regularizer in self._regularizers:
                if (penalty := regularizer.penalty(self._masters.weights)) is not None:
                    total = total + penalty
            yield total, loss.terms
        for regularizer in self._regularizers:
            if named := regularizer.loss_terms(self._student, self._teachers):
                yield sum(named.values()), {name: term.item() for name, term in named.items()}

    def _gradients(self) -> tuple[float, dict[str, float]]:
        """(total loss, its named terms), after accumulating its gradients in the master weights."""
        total, terms = 0.0, {}
        for loss, named in self._losses():
            total += loss.item()
            if not math.isfinite(total):
                raise TrainingError(
                    f"The loss became {total} at iteration {self._iteration} of {self._config.iterations}; "
                    f"lower the learning rate ({self._config.learning_rate:g}) or the regularizers' "
                    "strengths."
                )
            self._student.backward(loss, self._masters)
            terms |= named
        return total, terms

    # --- the update

    def _update(self) -> None:
        masters = self._masters
        if not masters.gather():
            for part in self._parts:
                part.update_skipped(self._iteration)
            return
        answers = [
            part.after_backward(self._iteration, masters.weights, masters.optimizer) for part in self._parts
        ]
        if all(answers):
            where = masters.device, masters.on_device
            update(masters.weights, masters.optimizer, self._parts, self._constraints, self._config, *where)
        else:
            masters.optimizer.zero_grad()


@torch.no_grad()
def update(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Part],
    constraints: Constraints,
    config: TrainingConfig,
    device: torch.device | str = "cpu",
    on_device: Callable[[str], AbstractContextManager] = nullcontext,
) -> None:
    """One constrained optimizer update of the master weights.

    The order is a contract: gradient transforms, clipping, optimizer, proximal steps, hard constraints. After
    clipping, tensors are updated one by one, so only one copy of a tensor is held at a time.

    Args:
        parameters: checkpoint key -> fp32 parameter with its gradient.
        optimizer: over these parameters, in one group.
        parts: of the step, in their order.
        constraints: joined hard constraints of the parts.
        config: clipping norm.
        device: on which gradients are transformed and tensors updated.
        on_device: context manager that holds a key's parameter, gradient and moments on `device`.
    """
    for name, parameter in parameters.items():
        gradient = parameter.grad.to(device)
        for part in parts:
            gradient = part.transform_gradient(name, gradient)
        parameter.grad = gradient.to(parameter.device)
    if config.max_grad_norm:
        nn.utils.clip_grad_norm_(list(parameters.values()), config.max_grad_norm)
    (group,) = optimizer.param_groups
    try:
        for name, parameter in parameters.items():
            with on_device(name):
                before = parameter.detach().clone()
                group["params"] = [parameter]
                optimizer.step()
                parameter.grad = None
                weight = parameter.data
                for part in parts:
                    weight = part.proximal(name, weight, group["lr"])
                parameter.data.copy_(before + constraints.allowed(name, weight - before))
    finally:
        group["params"] = list(parameters.values())


@contextmanager
def _holding_start(context: StepContext, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block the network holds the step's start in trainable weights; afterwards W0 again."""
    if context.network.dtype == torch.float32:
        with context.network.with_weights({name: weight.clone() for name, weight in context.start.items()}):
            yield
        return
    try:  # in place: the network's W0 is rounded anyway, `context.pretrained` is exact
        for name, parameter in parameters.items():
            parameter.data.copy_(context.start[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(context.pretrained[name])
