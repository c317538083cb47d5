"""From an image: whether the model goes on to draw a concept from an image of it that is partly noised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base.config import setting
from ..concepts.concept import Concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from ..models.sampling import generator_for
from .base import AUDITS, Audit, AuditConfig, AuditReport, Figure
from .intervals import percent, share, shown
from .probes import Progress, audited_concepts, captions_of, denoised, edited, images_of, sampler_of
from .recognition import Recognizer

STRENGTHS = (0.3, 0.5, 0.7)
"""Shares of the sampler's steps that are taken anew, as image-to-image nodes call it."""


@dataclass(frozen=True)
class FromImageConfig(AuditConfig):
    """Settings of `FromImage`."""

    OF_BUDGET: ClassVar = {
        "quick": {"pictures": 6},
        "thorough": {"pictures": 24},
    }
    pictures: int = setting(12, "Images of each concept to start from.", minimum=1, maximum=1000)


@AUDITS.register(
    "from_image",
    config=FromImageConfig,
    display_name="From an Image",
    description="Starts from images of the concept, noised to 0.3, 0.5 and 0.7, without a prompt and with "
    "the concept's name, and counts in how many images the concept comes back; in percent.",
    paper="Image to image after SDEdit, ICLR 2022, arXiv 2108.01073",
)
class FromImage(Audit):
    """Share of images in which the concept is recognized after image-to-image, at each strength.

    The images are W0's, and W0 itself recognizes the concept (`Recognizer`). A weak noise leaves much of the
    image as it was, so the same on W0 stands beside it: `without a prompt` on W0 says what the image
    alone shows.

    Budget: for each concept, strength, prompt and model, `pictures` images by a part of the sampler's steps.
    """

    config: FromImageConfig

    def run(
        self,
        network: Network,
        model: UnlearnModel,
        concepts: Sequence[Concept],
        on_progress: Progress = lambda done, total: None,
    ) -> AuditReport:
        concepts = audited_concepts(model, concepts)
        figures: dict[str, Figure] = {}
        lines, states = [], []
        for done, concept in enumerate(concepts):
            found = self._measure(network, model, concept, lambda done=done: on_progress(done, len(concepts)))
            figures |= {f"{concept.name}: {name}": figure for name, figure in found.items()}
            lines += [concept.name, *(f"  {name:34} {shown(value):>18}" for name, value in found.items())]
            now, then = (found[f"by name, 0.5{label}"].value for label in ("", ", untouched"))
            states.append(f"{concept.name} comes back in {now:.0f} % (untouched {then:.0f} %)")
        on_progress(len(concepts), len(concepts))
        return AuditReport(
            figures, f"By name, from images noised to 0.5: {'; '.join(states)}.", "\n".join(lines)
        )

    def _measure(
        self, network: Network, model: UnlearnModel, concept: Concept, check: Callable[[], None]
    ) -> dict[str, Figure]:
        count, seed = self.config.pictures, self.config.seed
        images = images_of(network, concept, count, seed, lambda done: check())
        recognizer = Recognizer.of(network, model, concept, seed, check)
        captions = captions_of(network.family, concept, count, seed)
        prompts = {"without a prompt": [""] * count, "by name": captions}
        cells = [(name, strength) for name in prompts for strength in STRENGTHS]

        def drawn() -> list[Tensor]:
            return [
                redrawn(network, images, prompts[name], strength, seed, check) for name, strength in cells
            ]

        before = drawn()
        with edited(network, model):
            after = drawn()
        found = {}
        for (name, strength), now, then in zip(cells, after, before, strict=True):
            for label, latents in ((f"{name}, {strength}", now), (f"{name}, {strength}, untouched", then)):
                flags = recognizer.shown(network, latents, check)
                found[label] = percent(share(sum(flags), count))
        return found


def redrawn(
    network: Network,
    images: Tensor,
    prompts: Sequence[str],
    strength: float,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents (n, c, h, w) of images noised to `strength` and sampled anew for their prompts."""
    process, steps = network.process, sampler_of(network.family).steps
    skipped = min(steps - 1, steps - round(steps * strength))
    time = process.sampler(steps).times[skipped].expand(len(images))
    noise = torch.stack(
        [
            torch.randn(images.shape[1:], generator=generator_for(seed, "redrawn", i))
            for i in range(len(images))
        ]
    )
    starts = process.noised(images, noise, time)
    return denoised(network, starts, network.encode(list(prompts)), skipped, check)
