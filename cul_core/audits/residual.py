"""The residual score: how much a name, a paraphrase or a translation still helps to predict the concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base.config import setting
from ..base.errors import ConceptError, brief_repr
from ..concepts.concept import Concept, check_count, check_text
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .intervals import mean, percent, ratio, shown
from .probes import Probes, Progress, audited_concepts, edited, images_of, made_up_names

FORGOTTEN, COMES_BACK = 25.0, 50.0
"""Percent of the untouched model's score below which a text counts as forgotten, and above which as known."""


def pictures_setting(default: int = 8) -> int:
    return setting(default, "Images of each concept, by the pretrained model.", minimum=2, maximum=1000)


def states_setting() -> int:
    return setting(12, "Noise levels at which each image is predicted.", minimum=1, maximum=1000)


def parse_wordings(text: str, concepts: Sequence[Concept]) -> dict[Concept, list[str]]:
    """Concept -> prompts of a text like `pink stripes; Lava = hot red rock`, separated by semicolons.

    A prompt without a name is of all concepts.

    Raises:
        ConceptError: the name is of none of the concepts, or a prompt is too long, or there are too many.
    """
    found: dict[Concept, list[str]] = {concept: [] for concept in concepts}
    entries = [entry for line in text.splitlines() for entry in line.split(";") if entry.strip()]
    check_count("wordings", entries)
    for entry in entries:
        name, equals, prompt = (part.strip() for part in entry.partition("="))
        owners = [c for c in concepts if not equals or name.lower() in (c.name.lower(), c.target.lower())]
        if not owners:
            raise ConceptError(
                f"The wording {brief_repr(entry.strip())} is of {brief_repr(name)}, which is not audited; "
                f"name one of {', '.join(c.name for c in concepts)}."
            )
        check_text("wording", prompt if equals else name)
        for owner in owners:
            found[owner].append(prompt if equals else name)
    return found


def namings(concept: Concept) -> list[str]:
    """Prompts that name the concept, the plainest first; a memorized image's is its caption alone."""
    if concept.kind == "memorized":
        return [concept.prompt]
    name = concept.name
    plural = name if name.endswith("s") else f"{name}s"
    return list(dict.fromkeys([concept.prompt, name, name.lower(), plural, name.replace(" ", "_")]))


def state_of(residual: Figure) -> str:
    """What a residual score in percent says: `forgotten`, `comes back`, `dormant` in between, or `not sure`
    if its interval reaches over a bound."""
    if residual.value is None:
        return "not measured"
    if residual.high is not None and residual.high <= FORGOTTEN:
        return "forgotten"
    if residual.low is not None and residual.low >= COMES_BACK:
        return "comes back"
    if residual.low is not None and residual.low > FORGOTTEN and residual.high < COMES_BACK:
        return "dormant"
    return "not sure"


@dataclass(frozen=True)
class ResidualConfig(AuditConfig):
    """Settings of `Residual`."""

    OF_BUDGET: ClassVar = {
        "quick": {"pictures": 4, "states": 8},
        "thorough": {"pictures": 24, "states": 24, "made_up": 10},
    }
    pictures: int = pictures_setting()
    states: int = states_setting()
    wordings: str = setting(
        "",
        "Prompts that mean a concept without its name, such as paraphrases, descriptions or translations, "
        "separated by semicolons; 'name = prompt' gives a prompt to one concept only.",
    )
    made_up: int = setting(3, "Made-up names to compare with.", minimum=0, maximum=100)


@AUDITS.register(
    "residual",
    config=ResidualConfig,
    display_name="Residual Score",
    description="Measures how much of a concept the model still knows by its name and by other words, in "
    "percent of what the untouched model knows. Of the edited model no image is sampled.",
    paper="After the reward of ReLAPSe, arXiv 2602.00350",
)
class Residual(Audit):
    """r_k(p) / r_0(p) for every prompt p of a concept, summed over images of the concept by W0.

    r(p) = mean over noised images of |f(z_t, t, "") - y|^2 - |f(z_t, t, p) - y|^2, where y is the ideal
    prediction: how much the prompt lowers the denoising error. 100 means that nothing is forgotten, 0 or less
    that the prompt no longer helps. Control: made-up names, whose scores are in percent of r_0 of the
    concept's own name. A prompt by which W0 itself does not know the concept (the interval of r_0 reaches 0)
    is not measured.

    Budget: for each concept, `pictures` sampled images, and `pictures` x `states` predictions for each model
    and prompt.
    """

    config: ResidualConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Progress = lambda done, total: None,
    ) -> AuditReport:
        concepts = audited_concepts(model, concepts)
        wordings = parse_wordings(self.config.wordings, concepts)
        controls = made_up_names(network, self.config.made_up, self.config.seed)
        figures: dict[str, Figure] = {}
        lines, known = [], []
        for done, concept in enumerate(concepts):
            check = lambda done=done: on_progress(done, len(concepts))  # noqa: E731
            measured = self._measure(network, model, concept, wordings[concept], controls, check)
            figures |= {f"{concept.name}: {prompt}": figure for prompt, (figure, _) in measured.items()}
            lines += [concept.name, *_lines(measured)]
            states = [state_of(figure) for figure, is_control in measured.values() if not is_control]
            states = [state for state in states if state != "not measured"]
            gone = states.count("forgotten")
            known.append(f"{concept.name} is forgotten by {gone} of {len(states)} wordings")
        on_progress(len(concepts), len(concepts))
        return AuditReport(figures, f"{'; '.join(known)}.", "\n".join(lines))

    def _measure(
        self,
        network: Network,
        model: UnlearnModel,
        concept: Concept,
        wordings: Sequence[str],
        controls: Sequence[str],
        check: Callable[[], None],
    ) -> dict[str, tuple[Figure, bool]]:
        """Prompt -> (residual score in percent, whether it is a control)."""
        seed, pictures = self.config.seed, self.config.pictures
        images = images_of(network, concept, pictures, seed, lambda done: check())
        probes = Probes.of(network, images, self.config.states, seed, concept.name)
        own = list(dict.fromkeys([*namings(concept), *wordings]))
        made_up = [
            Concept(name, "style" if concept.kind == "memorized" else concept.kind).prompt
            for name in controls
        ]
        untouched = probes.gains(network, own, check)
        with edited(network, model):
            left = probes.gains(network, [*own, *made_up], check)
        name = untouched[own[0]]
        measured = {prompt: (_residual(left[prompt], untouched[prompt]), False) for prompt in own}
        return measured | {prompt: (percent(ratio(left[prompt], name)), True) for prompt in made_up}


def _residual(left: Tensor, untouched: Tensor) -> Figure:
    is_known = mean(untouched).low > 0
    return percent(ratio(left, untouched)) if is_known else Figure(None)


def _lines(measured: dict[str, tuple[Figure, bool]]) -> list[str]:
    width = max(map(len, measured))
    rows = []
    for prompt, (figure, is_control) in measured.items():
        state = "made-up name" if is_control else state_of(figure)
        rows.append(f"  {prompt:{width}}  {shown(figure):>18}  {state}")
    return rows
