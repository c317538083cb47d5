"""UCE: unified concept editing, which maps rows of names onto rows of guides by ridge regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import Config, setting
from ..concepts.concept import Concept, display_name
from ..parts.text_maps import TextMap, ridge_map
from ..parts.text_rows import POOLED
from .base import METHODS
from .closed_form import ClosedForm, Problem

_TEMPLATES = {
    True: ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    False: ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
}
"""Whether the concept is a style -> the reference's further prompts."""


@dataclass(frozen=True)
class UCEConfig(Config):
    """Settings of `UCE`. All requests of a chain share `form`, `ridge` and `keep_weight`."""

    form: str = setting(
        "ours",
        "ours: the tokens of a name and its EOS become the last token and EOS of its anchor, or the EOS of "
        "the empty prompt. reference: the last token of a name becomes that of its anchor, for a style that "
        "of 'art'.",
        choices=("ours", "reference"),
    )
    ridge: float = setting(
        0.5,
        "Weight of the change of the matrices (lambda): more keeps more and forgets less.",
        minimum=1e-9,
        maximum=1e6,
    )
    erase_weight: float = setting(1.0, "Weight of the names to forget.", minimum=0.0, maximum=1e6)
    keep_weight: float = setting(1.0, "Weight of the names to keep.", minimum=0.0, maximum=1e6)
    expand: bool = setting(False, "Forget each name in five short prompts too, such as 'style of' it.")
    SHARED: ClassVar[tuple[str, ...]] = ("form", "ridge", "keep_weight")
    REFERENCE: ClassVar[dict] = {"form": "reference"}


@METHODS.register(
    "uce",
    config=UCEConfig,
    display_name="UCE",
    description="Maps the text rows of each name onto those of its anchor, and those of names to keep onto "
    "themselves, by one regression over all requests so far, without training. Each request can be "
    "taken back.",
    paper="Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761",
)
class UCE(ClosedForm):
    """W' = W0 (I + M) with the least squared error over rows to forget and to keep (`text_maps.ridge_map`).

    Rows c_i of names to forget have goals a_i and weight `erase_weight`. Rows of names to keep are their own
    goals, with weight `keep_weight`. The change of the matrices has weight `ridge`. The edit's rank is at
    most the number of rows to forget. The reference inverts in fp32 and edits no pooled vector; both forms
    solve in fp64.
    """

    config: UCEConfig

    def fit(self, problem: Problem) -> TextMap:
        targets = torch.zeros(0, problem.width, dtype=torch.float64)
        if self._is_reference and problem.source == POOLED:
            return ridge_map(targets, targets, torch.eye(problem.width, dtype=torch.float64))
        pairs = [
            (request.method.erase_weight**0.5 * side for side in self._pair(problem, concept, request.method))
            for concept, request in problem.named
        ]
        targets, goals = map(torch.cat, zip(*pairs, strict=True))
        names = list(dict.fromkeys(concept.name for concept in problem.kept))
        kept = [self._rows(words) for words in problem.rows.words(problem.source, names)]
        kept = torch.cat([targets[:0], *kept])
        metric = self.config.keep_weight * kept.T @ kept
        return ridge_map(targets, goals, metric + self.config.ridge * torch.eye(problem.width).double())

    @property
    def _is_reference(self) -> bool:
        return self.config.form == "reference"

    def _pair(self, problem: Problem, concept: Concept, config: UCEConfig) -> tuple[Tensor, Tensor]:
        """Rows (n, d) to forget, and their goals."""
        is_style = concept.kind == "style"
        templates = ("{}", *(_TEMPLATES[is_style] if config.expand else ()))
        guide = display_name(concept.anchor) or ("art" if self._is_reference else "")
        prompts = [template.format(concept.name) for template in templates]
        guides = [template.format(guide) if guide else "" for template in templates]
        words = problem.rows.words(problem.source, [*prompts, *guides])
        length = problem.rows.network.token_count(concept.name)
        own = [self._rows(rows[-(length + 1) :]) for rows in words[: len(prompts)]]
        ends = [self._rows(rows) for rows in words[len(prompts) :]]
        return torch.cat(own), torch.cat(
            [_spread(end, len(rows)) for end, rows in zip(ends, own, strict=True)]
        )

    def _rows(self, words: Tensor) -> Tensor:
        """The rows that are edited or kept, of a prompt's own tokens and EOS (n, d)."""
        return words[-2:-1] if self._is_reference else words


def _spread(guide: Tensor, count: int) -> Tensor:
    """`count` goals: the guide's EOS for EOS, and before it its last token, if it has one, for each token."""
    token = guide[-2:-1] if len(guide) > 1 else guide
    return torch.cat([token.expand(count - 1, -1), guide[-1:]])
