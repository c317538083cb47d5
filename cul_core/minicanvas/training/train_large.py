"""Trains the weights of MiniCanvas' large world; every run adds to the last.

    python -m cul_core.minicanvas.training.train_large [--hours 2] [--workers 2]
    python -m cul_core.minicanvas.training.pack_large

Stages: autoencoder, text encoder, classifier, each a fixed number of updates from the small world's weights
where shapes agree, then the decoder and the UNet for the given time. An interrupted run goes on from the
states in the work folder. Without that folder it goes on from the shipped weights, with new optimizers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from ...files.atomic_write import write_atomically
from ...models.load_diffusers import load_network, load_tokenizer
from .. import models
from ..family import MINI_LARGE
from ..large import LARGE
from ..large_render import render
from ..world import PLAIN
from .resumable import Draws, Trained, progress, train
from .train import decoded, noise_loss, ruined_latents, worthless_pictures
from .workers import Workers

logger = logging.getLogger(__name__)

AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_LR = 480, 16, 1e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LR = 700, 48, 2e-3
UNET_BATCH, UNET_LR = 32, 1e-3
POOL_PER_CELL, POOL_UPDATES, CAPTIONS_PER_CELL = 4, 6000, 3
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR, CLASSIFIER_SEEN = 500, 64, 2e-3, 3000
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


def renderings(cells: list[tuple[tuple[str, ...], str]], rng: random.Random) -> Tensor:
    """Fresh renderings (b, 3, 64, 64) in [0, 1] of (subjects, style)."""
    drawn = np.stack([render(subjects, style, rng) for subjects, style in cells])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def random_cells(count: int, rng: random.Random) -> list[tuple[tuple[str, ...], str]]:
    return [(random_subjects(rng), rng.choice(LARGE.style_labels)) for _ in range(count)]


def _autoencoder_loss(model: models.NarrowAutoencoder) -> Callable[[Draws], Tensor]:
    """Reconstruction from noised latents, whose mean is drawn to 0 and variance to 1."""

    def loss_of(draws: Draws) -> Tensor:
        images = renderings(random_cells(AUTOENCODER_BATCH, draws.rng), draws.rng)
        images = images.contiguous(memory_format=torch.channels_last)
        latents = model.encode(images)
        error = model.decode(latents + 0.08 * torch.randn(latents.shape, generator=draws.generator)) - images
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        return (
            10 * (error.square().mean() + 0.1 * error.abs().mean())
            + 0.01 * (mean.square() + (variance - 1).square()).sum()
        )

    return loss_of


def train_autoencoder(workers: Workers, work: Path, seed: int) -> None:
    """Go on from the small world's autoencoder, which knows edges, flat colours and most periods."""
    wide = load_network(models.CHECKPOINT_PATH).autoencoder
    model = models.NarrowAutoencoder.narrowed(wide).to(memory_format=torch.channels_last)
    train(
        Trained(model),
        work / "autoencoder.state",
        _autoencoder_loss(model),
        lambda step: decay(step, AUTOENCODER_STEPS, AUTOENCODER_LR),
        seed=seed,
        steps=AUTOENCODER_STEPS,
        workers=workers,
    )


def train_decoder(workers: Workers, work: Path, seed: int, seconds: float) -> None:
    """Train the decoder alone for `seconds`; the encoder stays, and with it all latents."""
    model = models.NarrowAutoencoder()
    model.load_state_dict(result_of(work, "autoencoder"))
    model.to(memory_format=torch.channels_last).encoder.requires_grad_(False)
    trained = Trained(model)
    train(
        trained,
        work / "decoder.state",
        _autoencoder_loss(model),
        lambda step: 0.5 * AUTOENCODER_LR * unet_rate(step, trained.fresh_at) / UNET_LR,
        seed=seed,
        steps=10**9,
        seconds=seconds,
        workers=workers,
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


def train_text(workers: Workers, work: Path, seed: int) -> None:
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
        workers=workers,
    )


# --- latents of renderings


def result_of(work: Path, stage: str, part: str = "") -> dict[str, Tensor]:
    """The averaged weights of a finished stage."""
    prefix = f"average.{part}"
    tensors = load_file(work / f"{stage}.state")
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def trained_autoencoder(work: Path) -> models.NarrowAutoencoder:
    """The autoencoder with the decoder's later training, frozen."""
    model = models.NarrowAutoencoder()
    stage = "decoder" if (work / "decoder.state").exists() else "autoencoder"
    model.load_state_dict(result_of(work, stage))
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def pool_of(
    workers: Workers, work: Path, seed: int, number: int
) -> tuple[Tensor, list[tuple[tuple[str, ...], str]]]:
    """Latents (n, 4, 8, 8) and cells of the renderings that update `number` x `POOL_UPDATES` on trains with.

    Each style is drawn with each subject equally often, and with pairs of objects.
    """
    rng = random.Random(f"{seed}/pool/{number}")
    cells = [
        ((subject,), style)
        for style in LARGE.style_labels
        for subject in LARGE.subjects
        for _ in range(POOL_PER_CELL * (3 if style == PLAIN else 1))
    ]
    pairs = int(len(cells) * PAIR_SHARE / (1 - PAIR_SHARE))
    cells += [
        (tuple(rng.sample(LARGE.objects, 2)), LARGE.style_labels[i % len(LARGE.style_labels)])
        for i in range(pairs)
    ]
    rng.shuffle(cells)
    path = work / f"latents-{number}.safetensors"
    if workers.rank == 0 and not path.exists():
        model, parts = trained_autoencoder(work), []
        for start in range(0, len(cells), 64):
            images = renderings(cells[start : start + 64], rng).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                parts.append(model.encode(images).contiguous())
        data = save({"latents": torch.cat(parts)})
        write_atomically(path, lambda file: file.write(data))
    workers.wait()
    return load_file(path)["latents"], cells


# --- UNet


class CaptionRows:
    """Rows (77, width) of the frozen text encoder for `CAPTIONS_PER_CELL` captions of each cell."""

    def __init__(self, work: Path, seed: int, number: int, cells: list[tuple[tuple[str, ...], str]]):
        from transformers import CLIPTextConfig, CLIPTextModel

        self._encoder = CLIPTextModel(CLIPTextConfig(**MINI_LARGE.config("text_encoder"))).eval()
        self._encoder.load_state_dict(result_of(work, "text", "text."))
        self._tokenizer = load_tokenizer(MINI_LARGE)
        self._seed, self._cells, self._rows = f"{seed}/captions/{number}", cells, {}

    def of(self, picks: list[tuple[int, int]]) -> Tensor:
        """Rows (b, 77, width) of (number of the cell, which of its captions)."""
        texts = [self._text(*pick) for pick in picks]
        if missing := sorted(set(texts) - self._rows.keys()):
            ids = self._tokenizer(missing, padding="max_length", max_length=77, return_tensors="pt").input_ids
            with torch.no_grad():
                rows = self._encoder(input_ids=ids).last_hidden_state.half()
            self._rows.update(zip(missing, rows, strict=True))
        return torch.stack([self._rows[text] for text in texts]).float()

    def _text(self, number: int, which: int) -> str:
        subjects, style = self._cells[number]
        draws = random.Random(f"{self._seed}/{style}/{' '.join(subjects)}/{which}")
        return random_caption(subjects, style, draws)[0]


def unet_rate(step: int, fresh_at: int) -> float:
    """Learning rate: a rise over 200 updates after `fresh_at`, a fall with 1/sqrt(updates) after 2,000.

    It has no last update, so that any number of runs adds up.
    """
    return UNET_LR * min((step - fresh_at + 1) / 200, 1.0) * min(1.0, (2000 / (step + 1)) ** 0.5)


def train_unet(workers: Workers, work: Path, seed: int, seconds: float) -> None:
    """Train for `seconds`, at first from the small world's UNet but for what reads the text."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**MINI_LARGE.config("unet"))
    small = load_network(models.CHECKPOINT_PATH).unet.state_dict()
    unet.load_state_dict(
        {k: small[k] if small[k].shape == v.shape else v for k, v in unet.state_dict().items()}
    )
    trained, path = Trained(unet), work / "unet.state"
    if path.exists():
        trained.load(path)
    begun = time.monotonic()
    while workers.agree(time.monotonic() - begun < seconds):
        number = trained.step // POOL_UPDATES
        latents, cells = pool_of(workers, work, seed, number)
        captions = CaptionRows(work, seed, number, cells)

        def loss_of(draws: Draws, latents=latents, captions=captions) -> Tensor:
            picks = [draws.rng.randrange(len(latents)) for _ in range(UNET_BATCH)]
            context = captions.of([(pick, draws.rng.randrange(CAPTIONS_PER_CELL)) for pick in picks])
            return noise_loss(unet, latents[picks], context, draws.generator)

        train(
            trained,
            path,
            loss_of,
            lambda step: unet_rate(step, trained.fresh_at),
            seed=seed,
            steps=(number + 1) * POOL_UPDATES,
            seconds=seconds - (time.monotonic() - begun),
            workers=workers,
        )


# --- classifier


def labels_of(cells: list[tuple[tuple[str, ...], str]]) -> Tensor:
    """(n, 3) labels of cells: style, first subject, second subject."""
    return torch.tensor(
        [
            [LARGE.style_labels.index(style), *map(LARGE.subjects.index, subjects), PAIRLESS, PAIRLESS][:3]
            for subjects, style in cells
        ]
    )


def train_classifier(workers: Workers, work: Path, seed: int) -> None:
    """Train on what the small world's classifier is trained on (see `train.train_classifier`), from it on."""
    torch.manual_seed(seed)
    model = models.Classifier(len(LARGE.style_labels), len(LARGE.subjects), tells_pairs=True)
    small = load_file(models.CLASSIFIER_PATH)
    model.load_state_dict(
        {k: small[k].to(v.dtype) if "features" in k else v for k, v in model.state_dict().items()}
    )
    model.to(memory_format=torch.channels_last)
    latents, cells = pool_of(workers, work, seed, 0)
    latents, autoencoder = latents[:CLASSIFIER_SEEN], trained_autoencoder(work)
    generator = torch.Generator().manual_seed(seed)
    noise = 0.35 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    seen = decoded(autoencoder, latents + noise * torch.randn(latents.shape, generator=generator))
    seen_labels = labels_of(cells[: len(seen)])
    ruined = decoded(autoencoder, ruined_latents(latents[: len(latents) // 2], generator))
    nothing = torch.tensor([len(LARGE.style_labels), PAIRLESS, PAIRLESS])

    def loss_of(draws: Draws) -> Tensor:
        half, few, generator = CLASSIFIER_BATCH * 3 // 8, CLASSIFIER_BATCH // 16, draws.generator
        fresh = random_cells(half, draws.rng)
        bare = [((), draws.rng.choice(LARGE.style_labels)) for _ in range(few)]
        images = renderings(fresh + bare, draws.rng)
        pick = torch.randint(len(seen), (half,), generator=generator)
        broken = ruined[torch.randint(len(ruined), (2 * few,), generator=generator)].float() / 255
        worthless = worthless_pictures(few, images, generator)
        batch = torch.cat([images, seen[pick].float() / 255, broken, worthless])
        blur = 0.06 * torch.rand(len(batch), 1, 1, 1, generator=generator)
        batch = batch + blur * torch.randn(batch.shape, generator=generator)
        rejected = nothing.expand(len(broken) + len(worthless), 3)
        labels = torch.cat([labels_of(fresh + bare), seen_labels[pick], rejected])
        heads = model(batch.contiguous(memory_format=torch.channels_last))
        return sum(functional.cross_entropy(head, labels[:, i]) for i, head in enumerate(heads))

    train(
        Trained(model),
        work / "classifier.state",
        loss_of,
        lambda step: decay(step, CLASSIFIER_STEPS, CLASSIFIER_LR),
        seed=seed,
        steps=CLASSIFIER_STEPS,
        workers=workers,
    )


# --- the whole run

_STEPS = {"autoencoder": AUTOENCODER_STEPS, "text": TEXT_STEPS, "classifier": CLASSIFIER_STEPS}
_STAGES = {"autoencoder": train_autoencoder, "text": train_text, "classifier": train_classifier}
_SHARES = {"decoder": (train_decoder, 0.15), "unet": (train_unet, 0.85)}
"""Stages without a last update, each with its share of a run's time."""


def resume_from_shipped(work: Path) -> None:
    """Write the states of all stages from the shipped weights; their optimizers start anew."""
    network = load_network(models.checkpoint_path(LARGE.name))
    with safe_open(models.checkpoint_path(LARGE.name), "pt") as file:
        numbers = json.loads(file.metadata()["minicanvas_training"])
    classifier = models.Classifier(len(LARGE.style_labels), len(LARGE.subjects), tells_pairs=True)
    classifier.load_state_dict(load_file(models.classifier_path(LARGE.name)))
    modules = {
        "autoencoder": models.NarrowAutoencoder.narrowed(network.autoencoder),
        "decoder": models.NarrowAutoencoder.narrowed(network.autoencoder),
        "text": nn.ModuleDict({"text": network.text_encoders[0]}),
        "classifier": classifier,
        "unet": network.unet,
    }
    for stage in numbers:
        trained = Trained(modules[stage].float().requires_grad_(True), **numbers[stage])
        trained.fresh_at = trained.step
        trained.save(work / f"{stage}.state")


def _worker(rank: int, size: int, port: int, stage: str, work: Path, seed: int, seconds: float) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    workers = Workers(rank, size, port)
    if stage in _SHARES:
        _SHARES[stage][0](workers, work, seed, _SHARES[stage][1] * seconds)
    else:
        _STAGES[stage](workers, work, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/minicanvas_large"), help="where the states of the stages lie"
    )
    parser.add_argument(
        "--hours", type=float, default=2.0, help="wall clock time for decoder and UNet in this run"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    work, seconds = arguments.work, 3600 * arguments.hours
    work.mkdir(parents=True, exist_ok=True)
    if not any(work.glob("*.state")) and models.checkpoint_path(LARGE.name).exists():
        resume_from_shipped(work)
    for number, stage in enumerate((*_STAGES, *_SHARES)):
        path = work / f"{stage}.state"
        if stage in _SHARES or not path.exists() or progress(path)["step"] < _STEPS[stage]:
            torch.multiprocessing.spawn(
                _worker,
                (arguments.workers, 29700 + number, stage, work, arguments.seed, seconds),
                nprocs=arguments.workers,
            )


if __name__ == "__main__":
    main()
