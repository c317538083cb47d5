"""Trains the weights of the large world."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...models.load_diffusers import load_network, load_tokenizer
from .. import models
from ..family import MINI_LARGE
from ..large import LARGE
from ..large_render import render
from .resumable import Draws, Trained, train

logger = logging.getLogger(__name__)

AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_LR = 600, 16, 1e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 700, 48, 2e-3
PAIR_SHARE = 0.15
PAIRLESS = len(LARGE.subjects)
"""Label of a missing subject."""


def decay(step: int, steps: int, peak: float, warm_up: int = 50) -> float:
    return peak * min((step + 1) / warm_up, 0.02 + 0.98 * (1 - step / steps))


def random_subjects(rng: random.Random) -> tuple[str, ...]:
    """One object or person, or two objects in 15 %."""
    if rng.random() < PAIR_SHARE:
        return tuple(rng.sample(LARGE.objects, 2))
    return (rng.choice(LARGE.subjects),)


def pictures(cells: list[tuple[tuple[str, ...], str]], rng: random.Random) -> Tensor:
    """Fresh renderings (b, 3, 64, 64) in [0, 1] of (subjects, style)."""
    drawn = np.stack([render(subjects, style, rng) for subjects, style in cells])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def random_cells(count: int, rng: random.Random) -> list[tuple[tuple[str, ...], str]]:
    return [(random_subjects(rng), rng.choice(LARGE.style_labels)) for _ in range(count)]


def train_autoencoder(work: Path, seed: int) -> None:
    """Go on from the small world's autoencoder, which knows edges, flat colours and most periods."""
    wide = load_network(models.CHECKPOINT_PATH).autoencoder
    model = models.NarrowAutoencoder.narrowed(wide).to(memory_format=torch.channels_last)

    def loss_of(draws: Draws) -> Tensor:
        images = pictures(random_cells(AUTOENCODER_BATCH, draws.rng), draws.rng)
        images = images.contiguous(memory_format=torch.channels_last)
        latents = model.encode(images)
        error = model.decode(latents + 0.08 * torch.randn(latents.shape, generator=draws.generator)) - images
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        return (
            10 * (error.square().mean() + 0.1 * error.abs().mean())
            + 0.01 * (mean.square() + (variance - 1).square()).sum()
        )

    train(
        Trained(model),
        work / "autoencoder.state",
        loss_of,
        lambda step: decay(step, AUTOENCODER_STEPS, AUTOENCODER_LR),
        seed=seed,
        steps=AUTOENCODER_STEPS,
    )


def random_caption(subjects: tuple[str, ...], style: str, rng: random.Random) -> tuple[str, list[int]]:
    """A training caption and the labels it gives away: (style, first subject, second subject).

    The style's label is the number of labels if the caption is empty.
    """
    wording = LARGE.wording(subjects, rng)
    text = LARGE.caption(style, wording, rng)
    said = [LARGE.subjects.index(name) for name in subjects] if wording in text else []
    style_label = LARGE.style_labels.index(style) if text else len(LARGE.style_labels)
    return text, [style_label, *said, PAIRLESS, PAIRLESS][:3]


def train_text(work: Path, seed: int) -> None:
    """Train the text encoder to tell styles and subjects apart, as CLIP's is trained apart from any UNet.

    Linear heads read the row of the end token and of one padding row; they are thrown away. A caption is
    padded to 28, or in an eighth of the batches to all 77 positions.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = MINI_LARGE.config("text_encoder")
    tokenizer = load_tokenizer(MINI_LARGE)
    width = config["hidden_size"]
    module = nn.ModuleDict(
        {
            "text": CLIPTextModel(CLIPTextConfig(**config)),
            "style": nn.Linear(width, len(LARGE.style_labels) + 1),
            "first": nn.Linear(width, len(LARGE.subjects) + 1),
            "second": nn.Linear(width, len(LARGE.subjects) + 1),
        }
    )

    def loss_of(draws: Draws) -> Tensor:
        pairs = [random_caption(*cell, draws.rng) for cell in random_cells(TEXT_BATCH, draws.rng)]
        texts, labels = [text for text, _ in pairs], torch.tensor([label for _, label in pairs])
        length = 77 if draws.rng.random() < 1 / 8 else 28
        ids = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        rows = module["text"](input_ids=ids).last_hidden_state
        end = (ids == config["eos_token_id"]).int().argmax(1)
        later = torch.tensor([draws.rng.randrange(int(at), length) for at in end])
        every = torch.arange(len(texts))
        read = torch.cat([rows[every, end], rows[every, later]])
        return sum(
            functional.cross_entropy(module[head](read), labels[:, i].repeat(2))
            for i, head in enumerate(("style", "first", "second"))
        )

    train(
        Trained(module),
        work / "text.state",
        loss_of,
        lambda step: decay(step, TEXT_STEPS, TEXT_LR),
        seed=seed,
        steps=TEXT_STEPS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/minicanvas_large"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("stage")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    globals()[f"train_{arguments.stage}"](arguments.work, arguments.seed)


if __name__ == "__main__":
    main()
