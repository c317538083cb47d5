"""Prompt search: words that still mean a concept, found by exchanging words, ranked by the residual score."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base.config import setting
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from ..models.sampling import generator_for
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .changes import declared_concepts
from .intervals import percent, ratio, share, shown
from .probes import Probes, Progress, audited_concepts, denoised, edited, images_of
from .recognition import Recognizer
from .residual import namings, parse_wordings, state_of

_ELITE = 8
"""Prompts that each generation descends from."""
_SEARCH_IMAGES, _SEARCH_STATES = 4, 6
_CHECK_IMAGES, _CHECK_STATES = 8, 12
_LONGEST = 12
"""Words of a prompt that is found."""


@dataclass(frozen=True)
class PromptSearchConfig(AuditConfig):
    """Settings of `PromptSearch`."""

    OF_BUDGET: ClassVar = {
        "quick": {"queries": 40, "best": 3, "drawn": 6},
        "thorough": {"queries": 300, "drawn": 24},
    }
    queries: int = setting(112, "Prompts to try for each concept.", minimum=1, maximum=100_000)
    best: int = setting(8, "Best prompts to measure on new images.", minimum=1, maximum=100)
    drawn: int = setting(
        10,
        "Images to draw with the best prompt, which the untouched model looks at.",
        minimum=0,
        maximum=1000,
    )
    wordings: str = setting(
        "",
        "Prompts to begin with, such as descriptions or translations, separated by semicolons; 'name = "
        "prompt' gives a prompt to one concept only.",
    )


@AUDITS.register(
    "prompt_search",
    config=PromptSearchConfig,
    display_name="Prompt Search",
    description="Looks for prompts that still draw a concept: it exchanges words of names, of your own "
    "wordings and of the vocabulary, keeps what scores best, and tests it on new images.",
    paper="A light search for the reward of ReLAPSe, arXiv 2602.00350",
)
class PromptSearch(Audit):
    """An evolution of prompts: the best eight so far have children with one other word.

    A prompt's fitness is its residual score on the edited model, on 4 images x 6 noise levels that all
    queries share. Because the best of many is partly luck, the `best` prompts are measured anew, on 8 x 12
    others; their scores are in percent of that of the concept's name on W0. With the best of them `drawn`
    images are drawn, and W0 looks at them (`Recognizer`).

    Control: the same prompts on W0, which tells whether they mean the concept there too, and the share of
    images that W0 draws with the concept's name and recognizes.

    Budget: 24 predictions for each query, no language model.
    """

    config: PromptSearchConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Progress = lambda done, total: None,
    ) -> AuditReport:
        concepts, queries = audited_concepts(model, concepts), self.config.queries
        wordings = parse_wordings(self.config.wordings, concepts)
        figures: dict[str, Figure] = {}
        lines, states = [], []
        for number, concept in enumerate(concepts):

            def check(done: int, number: int = number) -> None:
                on_progress(number * queries + min(done, queries), queries * len(concepts))

            found, own = self._measure(network, model, concept, wordings[concept], check)
            figures |= {f"{concept.name}: {name}": figure for name, figure in own.items()}
            figures |= {f"{concept.name}: {prompt}": now for prompt, (now, _) in found.items()}
            lines += [concept.name, *_lines(found), *(f"  {name}: {shown(v)}" for name, v in own.items())]
            best = next(iter(found))
            states.append(f"for {concept.name} the best prompt is {best!r}: {state_of(found[best][0])}")
        on_progress(queries * len(concepts), queries * len(concepts))
        return AuditReport(figures, f"After {queries} queries, {'; '.join(states)}.", "\n".join(lines))

    def _measure(
        self,
        network: Network,
        model: UnlearnModel,
        concept: Concept,
        wordings: Sequence[str],
        check: Callable[[int], None],
    ) -> tuple[dict[str, tuple[Figure, Figure]], dict[str, Figure]]:
        """(prompt -> its score on the edited model and on W0, best first; shares of images by name)."""
        config, seed = self.config, self.config.seed
        images = images_of(network, concept, _SEARCH_IMAGES + _CHECK_IMAGES, seed, lambda done: check(0))
        search = Probes.of(network, images[:_SEARCH_IMAGES], _SEARCH_STATES, seed, "search")
        verify = Probes.of(network, images[_SEARCH_IMAGES:], _CHECK_STATES, seed, "verification")
        starts = [*wordings, *namings(concept), *(other.prompt for other in declared_concepts(model))]
        recognizer = Recognizer.of(network, model, concept, seed, lambda: check(0)) if config.drawn else None
        with edited(network, model):
            ranked = evolved(network, search, starts, config.queries, seed, check)[: config.best]
            now = verify.gains(network, ranked, lambda: check(config.queries))
            best = max(ranked, key=lambda prompt: now[prompt].sum())
            drawn = self._drawn(network, best)
        then = verify.gains(network, [*ranked, concept.prompt], lambda: check(config.queries))
        name = then[concept.prompt]
        ranked = sorted(ranked, key=lambda prompt: -now[prompt].sum())
        found = {
            prompt: (percent(ratio(now[prompt], name)), percent(ratio(then[prompt], name)))
            for prompt in ranked
        }
        if recognizer is None:
            return found, {}
        shares = {}
        for label, latents in (
            ("recovered", drawn),
            ("untouched, by name", self._drawn(network, concept.prompt)),
        ):
            flags = recognizer.shown(network, latents, lambda: check(config.queries))
            shares[f"{label} %"] = percent(share(sum(flags), len(flags)))
        return found, shares

    def _drawn(self, network: Network, prompt: str) -> torch.Tensor:
        count, seed, shape = self.config.drawn, self.config.seed, network.family.latent_shape
        if not count:
            return torch.empty(0)
        noise = [torch.randn(shape, generator=generator_for(seed, "found prompt", i)) for i in range(count)]
        return denoised(network, torch.stack(noise), network.encode([prompt]).expand(count))


def evolved(
    network: Network,
    probes: Probes,
    starts: Sequence[str],
    queries: int,
    seed: int,
    check: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """All prompts that were tried, best first.

    Args:
        network: the model, with the weights that are searched.
        probes: images of the concept.
        starts: prompts to begin with; at most a third of the queries goes to them.
        queries: number of prompts to try.
        seed: of the exchanges.
        check: called with the number of queries so far; may raise to stop.
    """
    rng, empty, scores = random.Random(f"prompt search {seed}"), probes.errors(network, ""), {}
    words = list(dict.fromkeys([*network.words(), *(word for text in starts for word in text.split())]))

    def attempt(prompt: str) -> None:
        if prompt and prompt not in scores:
            check(len(scores))
            scores[prompt] = (empty - probes.errors(network, prompt)).mean().item()

    for prompt in list(dict.fromkeys(starts))[: max(1, queries // 3)]:
        attempt(prompt)
    misses = 0
    while len(scores) < queries and misses < 100:
        elite = sorted(scores, key=scores.__getitem__, reverse=True)[:_ELITE]
        tried = len(scores)
        attempt(_child(rng.choice(elite), words, rng))
        misses = misses + 1 if len(scores) == tried else 0
    return sorted(scores, key=scores.__getitem__, reverse=True)


def _child(prompt: str, words: Sequence[str], rng: random.Random) -> str:
    """The prompt with one word exchanged, inserted or left out."""
    own = prompt.split()
    at, kind = rng.randrange(len(own)), rng.choice(("exchange", "exchange", "insert", "remove"))
    if kind == "insert" and len(own) < _LONGEST:
        own.insert(at, rng.choice(words))
    elif kind == "remove" and len(own) > 1:
        own.pop(at)
    else:
        own[at] = rng.choice(words)
    return " ".join(own)


def _lines(found: dict[str, tuple[Figure, Figure]]) -> list[str]:
    width = max(map(len, found))
    return [
        f"  {prompt:{width}}  {shown(now):>18}  {state_of(now):12} untouched {shown(then)}"
        for prompt, (now, then) in found.items()
    ]
