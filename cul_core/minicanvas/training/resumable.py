"""A training loop that can stop at any time and go on in another process, to the same bits on one machine.

A stage's state is one safetensors file: weights, their moving averages, the optimizer's moments, the number
of updates and the CPU time. Every update draws its randomness from the seed and its own number, so there is
no other state.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...files.atomic_write import write_atomically
from .workers import Workers

logger = logging.getLogger(__name__)

SAVE_EVERY_SECONDS = 180
LOG_EVERY = 50
EMA_DECAY = 0.999
_NUMBERS = ("step", "fresh_at", "cpu_seconds", "loss_curve")


@dataclass
class Draws:
    """The sources of randomness of one update in one worker."""

    rng: random.Random
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, stage: str, step: int, rank: int = 0) -> Draws:
        rng = random.Random(f"{seed}/{stage}/{step}/{rank}")
        return cls(rng, torch.Generator().manual_seed(rng.getrandbits(62)))


@dataclass
class Trained:
    """A stage's state: the module, the averages of its parameters and buffers, and what it has cost.

    Args:
        module: is trained in place.
        average: its state as a moving average; a copy of its state if not given.
        step: number of updates done.
        fresh_at: number of updates at which the optimizer last had no moments.
        cpu_seconds: CPU time of all workers so far.
        loss_curve: (update, mean loss since the last entry).
    """

    module: nn.Module
    average: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    fresh_at: int = 0
    cpu_seconds: float = 0.0
    loss_curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad],
            lr=0.0,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
        )
        self.average = self.average or {k: v.clone() for k, v in self.module.state_dict().items()}

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for number, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in entry.items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        data = save({k: v.contiguous().clone() for k, v in tensors.items()}, {"state": json.dumps(numbers)})
        write_atomically(path, lambda file: file.write(data))

    def load(self, path: Path) -> None:
        """Take over the state in a file that `save` wrote for a module of the same kind.

        Without moments of an optimizer in it, the optimizer starts anew.
        """
        with safe_open(path, "pt") as file:
            for name, value in json.loads(file.metadata()["state"]).items():
                setattr(self, name, value)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        self.module.load_state_dict(_below("model.", tensors))
        self.average = _below("average.", tensors)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimizer.", tensors).items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def follow(self) -> None:
        """Move the average towards the module's state."""
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        for name, value in self.module.state_dict().items():
            mean = self.average[name]
            mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)


def progress(path: Path) -> dict:
    """The numbers of a state file (see `Trained`), without its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def train(
    trained: Trained,
    path: Path,
    loss_of: Callable[[Draws], Tensor],
    rate_of: Callable[[int], float],
    *,
    seed: int,
    steps: int,
    seconds: float = float("inf"),
    workers: Workers | None = None,
) -> None:
    """Train until `steps` updates are done in all, or for `seconds`; the state is saved on the way.

    Args:
        trained: the state, changed in place; a state in `path` replaces it.
        path: the state file.
        loss_of: draws -> loss.
        rate_of: number of the update -> learning rate.
        seed: of all draws.
        steps: number of updates.
        seconds: wall clock time of this call.
        workers: processes that average their gradients; this one alone if None.
    """
    workers = workers or Workers(0, 1, 0)
    if path.exists():
        trained.load(path)
    parameters = [p for p in trained.module.parameters() if p.requires_grad]
    name, clock = path.name.partition(".")[0], time.monotonic
    begun = saved = logged = clock()
    cpu_begun, cpu_before, losses = time.process_time(), trained.cpu_seconds, []
    while trained.step < steps and workers.agree(clock() - begun < seconds):
        trained.optimizer.param_groups[0]["lr"] = rate_of(trained.step)
        loss = loss_of(Draws.of(seed, name, trained.step, workers.rank))
        loss.backward()
        workers.average_gradients([p for p in parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        trained.follow()
        trained.step += 1
        losses.append(loss.item())
        trained.cpu_seconds = cpu_before + workers.size * (time.process_time() - cpu_begun)
        if workers.rank == 0 and trained.step % LOG_EVERY == 0:
            trained.loss_curve.append((trained.step, round(sum(losses) / len(losses), 5)))
            each, logged = (clock() - logged) / len(losses), clock()
            logger.info("%s %d loss %.4f, %.2f s each", name, *trained.loss_curve[-1], each)
            losses.clear()
        if workers.rank == 0 and clock() - saved > SAVE_EVERY_SECONDS:
            trained.save(path)
            saved = clock()
    if workers.rank == 0:
        trained.save(path)
    workers.wait()
