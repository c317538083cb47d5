"""Measures a trained world of MiniCanvas and writes its two weight files, with the figures in the headers."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...audits.classifier_scores import Shot
from ...models.load_diffusers import load_network
from ...models.network import Network
from .. import models
from ..family import FAMILY_OF
from ..judge import Judge, take
from ..large import LARGE
from ..large_render import render as render_large
from ..render import render as render_small
from ..world import PLAIN, SMALL, World
from .pack import checkpoint_tensors, write_weights

logger = logging.getLogger(__name__)


def renderings(world: World, cells: Sequence[tuple[str, str]], rng: random.Random) -> Tensor:
    """Fresh renderings (n, 3, 64, 64) in [0, 1] of (style, object or person)."""
    if world.name == SMALL.name:
        drawn = [render_small(subject, style, rng) for style, subject in cells]
    else:
        drawn = [render_large([subject], style, rng) for style, subject in cells]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def autoencoder_figures(
    model: models.NarrowAutoencoder, seed: int, per_cell: int = 4, world: World = SMALL, every: int = 1
) -> dict:
    """PSNR in dB on fresh renderings: over all images (of their mean squared error) and by style.

    Args:
        model: the autoencoder.
        seed: of the renderings.
        per_cell: images per style and subject.
        world: what they show.
        every: take every so manieth subject.
    """
    rng = random.Random(f"{seed}/autoencoder/held-out")
    errors = {}
    for style in world.style_labels:
        images = renderings(
            world, [(style, name) for name in world.subjects[::every] for _ in range(per_cell)], rng
        )
        with torch.no_grad():
            back = model.decode(model.encode(images)).clamp(0, 1)
        errors[style] = (back - images).square().mean().item()
    psnr = {style: -10 * math.log10(error) for style, error in errors.items()}
    worst = min(psnr, key=psnr.get)
    return {
        "psnr": -10 * math.log10(np.mean(list(errors.values()))),
        "psnr_worst": psnr[worst],
        "psnr_worst_style": worst,
        "psnr_by_style": psnr,
    }


@dataclass(frozen=True)
class Probe:
    """How the images of one figure are asked for.

    Args:
        name: of the figure.
        wording: number of the style's description, or None for its name.
        is_described: whether people are described too; objects keep their names.
    """

    name: str
    wording: int | None
    is_described: bool = False


_PROBES = {
    SMALL.name: (Probe("name", None), Probe("description", 0)),
    LARGE.name: (Probe("name", None), Probe("description", 0, True), Probe("paraphrase", 1, True)),
}


def _prompt(world: World, style: str, subject: str, probe: Probe, index: int) -> str:
    entry, phrase = world.style_by_name[style], world.phrase(subject)
    if probe.is_described and subject in world.people_labels:
        phrase = world.people[world.people_labels.index(subject)].descriptions[probe.wording]
    if probe.wording is None:
        return world.templates.evaluation.format(object=phrase, style=entry.display_name)
    descriptions = entry.descriptions
    description = descriptions[(probe.wording + index) % len(descriptions)]
    return world.templates.described_evaluation.format(object=phrase, description=description)


def probe_shots(world: World, probe: Probe, per_cell: int) -> list[Shot]:
    """Images of every style with every object, `per_cell` each; in the large world with six subjects."""
    if world.name == SMALL.name:
        cells = [(s, o, i) for s in world.style_by_name for o in world.objects for i in range(per_cell)]
    else:  # objects and people in turn, so that each style meets three of either
        cells = [
            (style, group[(number + place * len(group) // 3) % len(group)], 0)
            for number, style in enumerate(world.style_by_name)
            for place in range(3)
            for group in (world.objects, world.people_labels)
        ]
    return [Shot(_prompt(world, s, o, probe, i), s, o, probe.name, i) for s, o, i in cells]


def _pair_shots(world: World) -> list[Shot]:
    """One image of two objects side by side per style."""
    rng = random.Random("pairs")
    return [
        Shot(
            world.templates.evaluation.format(
                object=" and ".join(map(world.phrase, pair)), style=style.display_name
            ),
            style.name,
            " and ".join(pair),
            "pair",
            0,
        )
        for style in world.styles
        for pair in [rng.sample(world.objects, 2)]
    ]


def sampling_figures(
    network: Network, judge: Judge, seed: int, per_cell: int = 2, world: World = SMALL
) -> dict[str, float]:
    """Percentage of sampled images with the prompted style, object and person, by wording of the prompt.

    In the small world there are 360 x `per_cell` images by name, in the large one 672. `images_by_` counts.
    """
    from ...history.unlearn_model import UnlearnModel
    from ...models.source import FileSource

    untouched = UnlearnModel(FileSource(Path(), 0, ""), network.family)
    shots = {probe.name: probe_shots(world, probe, per_cell) for probe in _PROBES[world.name]}
    plain = world.templates.plain[0]
    shots["plain"] = [
        Shot(plain.format(object=world.phrase(subject)), PLAIN, subject, "plain", i)
        for subject in world.subjects
        for i in range(4 * per_cell)
    ]
    if world.pairs:
        shots["pair"] = _pair_shots(world)
    figures = {}
    for name, asked in shots.items():
        verdicts = judge(take(network, untouched, asked, seed))
        figures[f"images_by_{name}"] = len(asked)
        figures[f"style_by_{name}"] = _percent(
            [v.style == s.style for s, v in zip(asked, verdicts, strict=True)]
        )
        for what in ("object", "person"):
            hits = [
                v.object == s.object
                for s, v in zip(asked, verdicts, strict=True)
                if (s.object in world.people_labels) == (what == "person")
            ]
            if hits:
                figures[f"{what}_by_{name}"] = _percent(hits)
        logger.info("%d images by %s: %s", len(asked), name, figures)
    return figures


def _percent(hits: Sequence[bool]) -> float:
    return 100 * float(np.mean(hits))


def classifier_figures(judge: Judge, seed: int, per_cell: int = 3, world: World = SMALL) -> dict[str, float]:
    """Percentage of fresh renderings that the classifier labels correctly, for style and subject."""
    rng = random.Random(f"{seed}/classifier/held-out")
    cells = [
        (style, name) for style in world.style_labels for name in world.subjects for _ in range(per_cell)
    ]
    pairs = [
        pair
        for start in range(0, len(cells), 256)
        for pair in _judged(judge, world, cells[start : start + 256], rng)
    ]
    figures = {"style_on_renderings": _percent([v.style == style for (style, _), v in pairs])}
    for what in ("object", "person"):
        hits = [
            v.object == name for (_, name), v in pairs if (name in world.people_labels) == (what == "person")
        ]
        if hits:
            figures[f"{what}_on_renderings"] = _percent(hits)
    return figures


def _judged(judge: Judge, world: World, cells: Sequence[tuple[str, str]], rng: random.Random) -> list:
    return list(zip(cells, judge(renderings(world, cells, rng)), strict=True))


@dataclass(frozen=True)
class Weights:
    """The trained weights of a world, in fp32: module states, and the autoencoder itself."""

    world: World
    unet: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    autoencoder: models.NarrowAutoencoder
    classifier: Mapping[str, Tensor]


def write_with_figures(
    weights: Weights, work: Path, out: Path, seed: int, training: Mapping | None = None
) -> dict[str, dict]:
    """All figures of the packed fp16 weights; both weight files are written to `out`.

    Args:
        weights: results of the training stages.
        work: folder for drafts.
        out: folder for checkpoint and classifier.
        seed: of the measurements.
        training: what the weights have cost, for the checkpoint's header.
    """
    from diffusers import UNet2DConditionModel

    world = weights.world
    unet = UNet2DConditionModel(**FAMILY_OF[world.name].config("unet"))
    unet.load_state_dict(weights.unet)
    narrow = weights.autoencoder
    tensors = checkpoint_tensors(unet, weights.text, narrow.widened(), torch.float16)
    classifier = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in weights.classifier.items()
    }
    write_weights(work / "draft.safetensors", tensors, {})
    write_weights(work / "judge.safetensors", classifier, {})
    judge = Judge(work / "judge.safetensors", world)
    is_small = world.name == SMALL.name
    own = {"classifier": classifier_figures(judge, seed, 3 if is_small else 1, world)}
    logger.info("%s", own)
    network = load_network(work / "draft.safetensors")
    figures = {
        "autoencoder": autoencoder_figures(narrow, seed, 4, world)
        if is_small
        else autoencoder_figures(narrow, seed, 1, world, every=3),
        "sampling": sampling_figures(network, judge, seed + 1, 2 if is_small else 1, world),
    }
    logger.info("%s", figures)
    extra = {} if training is None else {"minicanvas_training": json.dumps(training)}
    write_weights(out / models.checkpoint_path(world.name).name, tensors, figures, extra)
    write_weights(out / models.classifier_path(world.name).name, classifier, own)
    return figures | own
