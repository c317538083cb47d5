"""Trains all weights of MiniCanvas from scratch and prints their figures.

    python -m cul_core.minicanvas.training.train --work build/minicanvas --out cul_core/minicanvas/weights
                                                 [--workers 2]

Stages: autoencoder, latents, classifier, UNet with text encoder, then the figures. A stage is skipped when
its result is in the work folder. Workers are processes of one thread each that average their gradients. The
run takes about an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ...models.discrete_process import DiscreteProcess
from .. import models
from ..family import MINI
from ..render import render, render_background
from ..world import OBJECTS, PLAIN, SMALL, STYLE_LABELS, caption
from .figures import Weights, write_with_figures
from .workers import Workers

logger = logging.getLogger(__name__)

AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_LR = 3400, 16, 2e-3
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR = 1000, 64, 2e-3
UNET_STEPS, UNET_BATCH, UNET_LR = 6000, 32, 1e-3
# share of the UNet's steps in which the text encoder trains; its outputs are cached afterwards
TEXT_FREEZE_AT = 0.4
# images per (style, object) whose latents the UNet trains on; the plain style has three times as many
RENDERINGS_PER_CELL = 100
EMA_DECAY = 0.999
MIN_SNR_GAMMA = 5.0


def _learning_rate(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))))


def _fit(
    workers: Workers,
    name: str,
    module: nn.Module,
    steps: int,
    peak: float,
    loss_of: Callable[[int], Tensor],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `module` by AdamW with warm-up and cosine decay.

    Args:
        workers: the data-parallel group.
        name: of the stage, for the log.
        module: its parameters are trained.
        steps: number of updates.
        peak: highest learning rate.
        loss_of: step -> loss.
        after: called with the step after each update.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    begun, recent = time.time(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(step, steps, peak)
        loss = loss_of(step)
        loss.backward()
        live = [p for p in parameters if p.grad is not None]
        workers.average_gradients(live)
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after(step)
        recent.append(loss.item())
        if workers.rank == 0 and (step % 100 == 99 or step == steps - 1):
            seconds = time.time() - begun
            logger.info(
                "%s %d/%d loss %.4f, %.0f s, %.0f s left",
                name,
                step + 1,
                steps,
                np.mean(recent),
                seconds,
                seconds / (step + 1) * (steps - step - 1),
            )
            recent.clear()


def _pictures(batch: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh renderings (b, 3, 64, 64) in [0, 1], style labels (b,) and object labels (b,)."""
    cells = [(rng.randrange(len(STYLE_LABELS)), rng.randrange(len(OBJECTS))) for _ in range(batch)]
    pictures = np.stack([render(OBJECTS[o], STYLE_LABELS[s], rng) for s, o in cells])
    styles, objects = torch.tensor(cells).T
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, styles, objects


# --- autoencoder


def train_autoencoder(workers: Workers, work: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = models.NarrowAutoencoder().to(memory_format=torch.channels_last)
    rng = random.Random(f"{seed}/autoencoder/{workers.rank}")

    def loss_of(step: int) -> Tensor:
        images = _pictures(AUTOENCODER_BATCH, rng)[0].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(images).float()
            noisy = latents + 0.08 * torch.randn(latents.shape)
            error = model.decode(noisy).float() - images
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        return (
            10 * (error.square().mean() + 0.1 * error.abs().mean())
            + 0.01 * (mean.square() + (variance - 1).square()).sum()
        )

    _fit(workers, "autoencoder", model, AUTOENCODER_STEPS, AUTOENCODER_LR, loss_of)
    if workers.rank == 0:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, work / "autoencoder.safetensors"
        )


# --- latents of renderings, shared by the later stages


def make_latents(workers: Workers, work: Path, seed: int) -> None:
    """Encode `RENDERINGS_PER_CELL` images of every (style, object), and three times as many plain ones."""
    cells = [
        (s, o)
        for s, style in enumerate(STYLE_LABELS)
        for o in range(len(OBJECTS))
        for _ in range(RENDERINGS_PER_CELL * (3 if style == PLAIN else 1))
    ]
    random.Random(seed).shuffle(cells)
    cells = cells[: len(cells) // (64 * workers.size) * 64 * workers.size]
    mine = cells[workers.rank :: workers.size]
    model, rng, parts = (
        models.load_autoencoder(work / "autoencoder.safetensors"),
        random.Random(f"{seed}/latents/{workers.rank}"),
        [],
    )
    for start in range(0, len(mine), 64):
        pictures = np.stack([render(OBJECTS[o], STYLE_LABELS[s], rng) for s, o in mine[start : start + 64]])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            parts.append(model.encode(images.contiguous(memory_format=torch.channels_last)).contiguous())
    latents, labels = workers.gather(torch.cat(parts)), workers.gather(torch.tensor(mine))
    if workers.rank == 0:
        logger.info(
            "latents %s mean %s std %s", tuple(latents.shape), latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        )
        save_file({"latents": latents, "labels": labels}, work / "latents.safetensors")


# --- classifier

REJECT_STYLE, REJECT_OBJECT = len(STYLE_LABELS), len(OBJECTS)


def ruined_latents(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of images without content: noise of several scales, and shuffled, averaged or noised images."""
    count, kinds = len(latents), 6
    noise = torch.randn(latents.shape, generator=generator)
    coarse = functional.interpolate(torch.randn(count, 4, 3, 3, generator=generator), size=8, mode="bicubic")
    other = latents[torch.randperm(count, generator=generator)]
    third = latents[torch.randperm(count, generator=generator)]
    place = torch.stack([torch.randperm(64, generator=generator) for _ in range(count)])[:, None].expand(
        -1, 4, -1
    )
    shuffled = latents.flatten(2).gather(2, place).view_as(latents)
    choices = [
        noise,
        coarse * 1.2,
        0.5 * latents + noise,
        shuffled,
        (latents + other + third) / 3,
        0.6 * coarse + 0.6 * noise,
    ]
    kind = torch.arange(count) % kinds
    return torch.stack(choices)[kind, torch.arange(count)]


def decoded(model: models.NarrowAutoencoder, latents: Tensor) -> Tensor:
    """Decoded images, uint8 (n, 3, 64, 64), of latents (n, 4, 8, 8)."""
    parts = []
    for part in latents.split(128):
        with torch.no_grad():
            parts.append((model.decode(part).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def worthless_pictures(count: int, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Flat colours, greys, pixel noise, shuffled tiles, double exposures: (count, 3, 64, 64) in [0, 1]."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    flat = rand(count, 3, 1, 1).expand(-1, 3, 64, 64) + 0.1 * rand(count, 1, 1, 1) * torch.randn(
        count, 3, 64, 64, generator=generator
    )
    grey = rand(count, 1, 1, 1).expand(-1, 3, 64, 64) + 0.05 * rand(count, 1, 1, 1) * rand(count, 1, 64, 64)
    noise = rand(count, 3, 64, 64)
    tiles = functional.unfold(pictures[:count], 16, stride=16)
    puzzle = functional.fold(tiles[:, :, torch.randperm(16, generator=generator)], 64, 16, stride=16)
    double = (pictures[:count] + pictures[:count].roll(1, 0)) / 2
    kind = torch.arange(count) % 5
    return torch.stack([flat, grey, noise, puzzle, double])[kind, torch.arange(count)].clamp(0, 1)


def train_classifier(workers: Workers, work: Path, seed: int) -> None:
    """Train on renderings, decoded noisy latents, backgrounds without object, and images without content."""
    torch.manual_seed(seed)
    model = models.Classifier(len(STYLE_LABELS), len(OBJECTS)).to(memory_format=torch.channels_last)
    rng = random.Random(f"{seed}/classifier/{workers.rank}")
    generator = torch.Generator().manual_seed(1000 * seed + workers.rank)
    stored = load_file(work / "latents.safetensors")
    chosen = torch.randperm(len(stored["labels"]), generator=generator)[:8000]
    latents, labels = stored["latents"][chosen], stored["labels"][chosen]
    autoencoder = models.load_autoencoder(work / "autoencoder.safetensors")
    level = 0.35 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    seen = decoded(autoencoder, latents + level * torch.randn(latents.shape, generator=generator))
    ruined = decoded(autoencoder, ruined_latents(latents[:3000], generator))

    def loss_of(step: int) -> Tensor:
        images, styles, objects = _pictures(CLASSIFIER_BATCH * 3 // 8, rng)
        pick = torch.randint(len(seen), (CLASSIFIER_BATCH * 3 // 8,), generator=generator)
        bare = [rng.randrange(len(STYLE_LABELS)) for _ in range(CLASSIFIER_BATCH // 16)]
        backgrounds = np.stack([render_background(STYLE_LABELS[s], rng) for s in bare])
        broken = (
            ruined[torch.randint(len(ruined), (CLASSIFIER_BATCH // 8,), generator=generator)].float() / 255
        )
        worthless = worthless_pictures(CLASSIFIER_BATCH // 16, images, generator)
        parts = [
            images,
            seen[pick].float() / 255,
            torch.from_numpy(backgrounds).permute(0, 3, 1, 2).float() / 255,
            broken,
            worthless,
        ]
        rejected = len(broken) + len(worthless)
        batch = torch.cat(parts)
        batch = batch + 0.06 * torch.rand(len(batch), 1, 1, 1, generator=generator) * torch.randn(
            batch.shape, generator=generator
        )
        style_target = torch.cat(
            [styles, labels[pick, 0], torch.tensor(bare), torch.full((rejected,), REJECT_STYLE)]
        )
        object_target = torch.cat(
            [objects, labels[pick, 1], torch.full((len(bare) + rejected,), REJECT_OBJECT)]
        )
        style, object_ = model(batch.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(style, style_target) + functional.cross_entropy(
            object_, object_target
        )

    _fit(workers, "classifier", model, CLASSIFIER_STEPS, CLASSIFIER_LR, loss_of)
    for buffer in model.buffers():  # running statistics are averaged over workers
        if workers.size > 1 and buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= workers.size
    if workers.rank == 0:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, work / "classifier.safetensors")


# --- UNet and text encoder


_SCHEDULE = DiscreteProcess()
_SNR = _SCHEDULE.alphas_cumprod / (1 - _SCHEDULE.alphas_cumprod)


def noise_loss(unet: nn.Module, clean: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
    """Noise prediction loss of latents (b, 4, 8, 8) with min-SNR weights (Hang et al., arXiv 2303.09556)."""
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (len(clean),), generator=generator)
    predicted = unet(_SCHEDULE.noised(clean, noise, t), t, encoder_hidden_states=context).sample
    weight = (MIN_SNR_GAMMA / _SNR[t]).clamp(max=1)
    return (weight * (predicted - noise).square().mean((1, 2, 3))).mean()


def train_unet(workers: Workers, work: Path, seed: int) -> None:
    """Train the UNet by noise prediction with min-SNR weights; both results are exponential moving averages.

    The text encoder trains too until `TEXT_FREEZE_AT` of the steps, then its average is frozen.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(str(MINI.tokenizer_folder))
    both = nn.ModuleDict(
        {
            "unet": UNet2DConditionModel(**MINI.config("unet")),
            "text": CLIPTextModel(CLIPTextConfig(**MINI.config("text_encoder"))),
        }
    )
    average = copy.deepcopy(both).eval().requires_grad_(False)
    stored = load_file(work / "latents.safetensors")
    latents, labels = stored["latents"], stored["labels"].tolist()
    rng = random.Random(f"{seed}/unet/{workers.rank}")
    generator = torch.Generator().manual_seed(1000 * seed + 500 + workers.rank)
    freeze_at = int(TEXT_FREEZE_AT * UNET_STEPS)
    cache: dict[str, Tensor] = {}

    def encode(captions: list[str]) -> Tensor:
        ids = tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return both["text"](input_ids=ids).last_hidden_state

    def loss_of(step: int) -> Tensor:
        picks = [rng.randrange(len(latents)) for _ in range(UNET_BATCH)]
        captions = [caption(STYLE_LABELS[labels[i][0]], OBJECTS[labels[i][1]], rng) for i in picks]
        if step < freeze_at:
            context = encode(captions)
        else:
            missing = sorted(set(captions) - cache.keys())
            if missing:
                with torch.no_grad():
                    cache.update(zip(missing, encode(missing).half(), strict=True))
            context = torch.stack([cache[text] for text in captions]).float()
        return noise_loss(both["unet"], latents[picks], context, generator)

    def after(step: int) -> None:
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(both.parameters()), 1 - decay)
        if step == freeze_at - 1:
            both["text"].load_state_dict(average["text"].state_dict())
            both["text"].requires_grad_(False)
        if workers.rank == 0 and (step % 500 == 499 or step == UNET_STEPS - 1):
            for part in ("unet", "text"):
                save_file(
                    {k: v.contiguous() for k, v in average[part].state_dict().items()},
                    work / f"{part}.part.safetensors",
                )

    _fit(workers, "unet", both, UNET_STEPS, UNET_LR, loss_of, after)
    if workers.rank == 0:
        for part in ("unet", "text"):
            (work / f"{part}.part.safetensors").rename(work / f"{part}.safetensors")


# --- the whole run

_STAGES = {
    "autoencoder": train_autoencoder,
    "latents": make_latents,
    "classifier": train_classifier,
    "unet": train_unet,
}


def _worker(rank: int, size: int, port: int, stage: str, work: Path, seed: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _STAGES[stage](Workers(rank, size, port), work, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/minicanvas"), help="where stages leave their results"
    )
    parser.add_argument(
        "--out", type=Path, default=models.CHECKPOINT_PATH.parent, help="where the two weight files go"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments.work.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(_STAGES):
        if not (arguments.work / f"{stage}.safetensors").exists():
            torch.multiprocessing.spawn(
                _worker,
                (arguments.workers, 29600 + number, stage, arguments.work, arguments.seed),
                nprocs=arguments.workers,
            )
    results = {
        stage: load_file(arguments.work / f"{stage}.safetensors") for stage in ("unet", "text", "classifier")
    }
    autoencoder = models.load_autoencoder(arguments.work / "autoencoder.safetensors")
    weights = Weights(SMALL, autoencoder=autoencoder, **results)
    write_with_figures(weights, arguments.work, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
