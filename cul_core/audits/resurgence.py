"""Resurgence: whether a concept comes back when a copy of the model is fine-tuned on unrelated images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base.config import setting
from ..concepts.captions import anchor_prompts
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel, weights_of
from ..models.network import Network
from ..models.sampling import generator_for, sample_latents
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .intervals import percent, ratio, shown
from .probes import Probes, Progress, audited_concepts, images_of, sampler_of
from .residual import state_of, states_setting

_RANK = 4


@dataclass(frozen=True)
class ResurgenceConfig(AuditConfig):
    """Settings of `Resurgence`."""

    OF_BUDGET: ClassVar = {
        "quick": {"steps": 30, "benign": 16, "pictures": 4},
        "thorough": {"steps": 500, "benign": 200},
    }
    steps: int = setting(120, "Updates of the fine-tuning.", minimum=0, maximum=100_000)
    how: str = setting(
        "full", "Fine-tune all weights, or a LoRA of rank 4 on attention.", choices=("full", "lora")
    )
    learning_rate: float = setting(1e-4, "Learning rate of AdamW.", minimum=0.0, maximum=1.0)
    batch_size: int = setting(4, "Images per update.", minimum=1, maximum=1024)
    benign: int = setting(40, "Unrelated images to fine-tune on.", minimum=1, maximum=10_000)
    pictures: int = setting(8, "Images of each concept to measure on.", minimum=2, maximum=1000)
    states: int = states_setting()


@AUDITS.register(
    "resurgence",
    config=ResurgenceConfig,
    display_name="Resurgence",
    description="Fine-tunes a copy of the model on images that have nothing to do with the concept, as "
    "any user might, and measures whether the concept comes back. The same is done with the untouched model.",
    paper="After Unstable Unlearning, arXiv 2410.08074; the protocol is ours",
)
class Resurgence(Audit):
    """Residual score of the concept's name before, halfway through and after a benign fine-tuning of a copy.

    Scores are in percent of the name's score on W0. The control is the same fine-tuning of W0, whose score
    tells what fine-tuning alone costs. Images and captions are W0's, and no caption names an audited concept.

    Budget: `benign` sampled images; `steps` x `batch_size` images forward and backward for each model; the
    copy, its gradients and AdamW's moments in memory, all in fp32.
    """

    config: ResurgenceConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Progress = lambda done, total: None,
    ) -> AuditReport:
        concepts, config = audited_concepts(model, concepts), self.config
        models = {"": model, ", untouched": UnlearnModel(model.source, model.family)}
        total, done = len(models) * config.steps + 1, 0
        captions = benign_captions(network, concepts, config.benign)
        generators = [generator_for(config.seed, "benign image", i) for i in range(len(captions))]

        def check(updates: int = 0) -> None:
            on_progress(done + updates, total)

        images = sample_latents(network, captions, generators, sampler_of(network.family), lambda _: check())
        probes = {concept: self._probes(network, concept, check) for concept in concepts}
        whole = {concept: _gain(network, concept, probe) for concept, probe in probes.items()}
        figures: dict[str, Figure] = {}
        for label, start in models.items():
            with tuned_copy(network, start, config.how, config.learning_rate) as copy:
                for updates in range(config.steps + 1):
                    if updates in (0, config.steps // 2, config.steps):
                        for concept, probe in probes.items():
                            residual = percent(ratio(_gain(network, concept, probe), whole[concept]))
                            figures[f"{concept.name}: after {updates} updates{label}"] = residual
                    check(updates)
                    if updates < config.steps:
                        copy.update(*self._batch(network, images, captions, updates))
            done += config.steps
        on_progress(total, total)
        return _report(concepts, figures, config.steps)

    def _probes(self, network: Network, concept: Concept, check: Callable[[], None]) -> Probes:
        seed = self.config.seed
        images = images_of(network, concept, self.config.pictures, seed, lambda done: check())
        return Probes.of(network, images, self.config.states, seed, concept.name)

    def _batch(
        self, network: Network, images: Tensor, captions: Sequence[str], update: int
    ) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """(noised latents, times, ideal predictions, captions) of an update, the same for every model."""
        generator, process = generator_for(self.config.seed, "benign batch", update), network.process
        chosen = torch.randint(len(images), (self.config.batch_size,), generator=generator)
        clean, times = images[chosen], process.draw_times(len(chosen), generator)
        noise = torch.randn(clean.shape, generator=generator)
        parts = process.noised(clean, noise, times), times, process.target(clean, noise, times)
        return *(part.to(network.device) for part in parts), [captions[i] for i in chosen]


def benign_captions(network: Network, concepts: Sequence[Concept], count: int) -> list[str]:
    """`count` plain captions, of which none names one of the concepts."""
    plain = anchor_prompts(network.family, [Concept("thing", "style")])
    found = [caption for caption in plain if not any(c.mentioned_in(caption) for c in concepts)]
    return [found[i * len(found) // count % len(found)] for i in range(count)]


class TunedCopy:
    """A copy of a model in training; see `tuned_copy`.

    Args:
        network: computes with the copy.
        parameters: of the network, which hold the copy's weights.
        is_lora: whether only low-rank changes of matrices are trained.
        learning_rate: of AdamW.
    """

    def __init__(
        self, network: Network, parameters: Mapping[str, nn.Parameter], is_lora: bool, learning_rate: float
    ):
        self._network, self._parameters = network, list(parameters.values())
        self._masters = [weight.detach().float().clone() for weight in self._parameters]
        self._factors: list[tuple[Tensor, Tensor]] = []
        if is_lora:
            for number, weight in enumerate(self._masters):
                generator = generator_for(0, "benign LoRA", number)
                down = torch.randn(_RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
                self._factors.append((weight.new_zeros(weight.shape[0], _RANK), down.to(weight)))
        trained = [tensor for pair in self._factors for tensor in pair] if is_lora else self._masters
        self._optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def update(self, noised: Tensor, times: Tensor, targets: Tensor, captions: Sequence[str]) -> None:
        """One AdamW update on the denoising loss of a batch."""
        prediction = self._network.predict(noised, times, self._network.encode(captions))
        (prediction - targets).float().square().mean().backward()
        gradients = [
            torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            for weight, master in zip(self._parameters, self._masters, strict=True)
        ]
        for weight in self._parameters:
            weight.grad = None
        if self._factors:
            for (up, down), gradient in zip(self._factors, gradients, strict=True):
                up.grad, down.grad = gradient @ down.T, up.T @ gradient
        else:
            for master, gradient in zip(self._masters, gradients, strict=True):
                master.grad = gradient
        self._optimizer.step()
        for number, (weight, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
            up, down = self._factors[number] if self._factors else (None, None)
            weight.data.copy_(master if up is None else master + up @ down)


@contextmanager
def tuned_copy(network: Network, model: UnlearnModel, how: str, learning_rate: float) -> Iterator[TunedCopy]:
    """Within the block the network has a copy of the model's weights, which can be trained, as `how` says."""
    is_lora, roles = how == "lora", network.family.roles
    role = ("attention" if "attention" in roles else "text_readers") if is_lora else "all"
    parameters = network.weights(role)
    if is_lora:
        parameters = {key: weight for key, weight in parameters.items() if weight.ndim == 2}
    keys = list(dict.fromkeys([*parameters, *model.edits]))
    copies = {key: weight.clone() for key, weight in weights_of(model, network.exact(keys)).items()}
    with network.with_weights(copies):
        try:
            for weight in parameters.values():
                weight.requires_grad_(True)
            yield TunedCopy(network, parameters, is_lora, learning_rate)
        finally:
            for weight in parameters.values():
                weight.requires_grad_(False)
                weight.grad = None


def _gain(network: Network, concept: Concept, probes: Probes) -> Tensor:
    """How much (images,) the concept's name lowers the error."""
    return probes.gains(network, [concept.prompt])[concept.prompt]


def _report(concepts: Sequence[Concept], figures: Mapping[str, Figure], steps: int) -> AuditReport:
    states = []
    for concept in concepts:
        before, after = (figures[f"{concept.name}: after {n} updates"] for n in (0, steps))
        states.append(f"{concept.name} was {state_of(before)} and then {state_of(after)}")
    width = max(map(len, figures))
    lines = [f"{name:{width}}  {shown(figure):>18}" for name, figure in figures.items()]
    verdict = f"{steps} benign updates: {'; '.join(states)}."
    return AuditReport(figures, verdict, "\n".join(lines))
