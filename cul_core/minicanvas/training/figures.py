"""Measures a trained MiniCanvas and writes its two weight files, with the figures in their headers."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ...audits.classifier_scores import Shot
from ...models.load_diffusers import load_network
from ...models.network import Network
from .. import models
from ..family import MINI
from ..judge import Judge, take
from ..render import render
from ..world import DESCRIPTION_EVALUATION_TEMPLATE, EVALUATION_TEMPLATE, OBJECTS, PLAIN, STYLE_LABELS, STYLES
from .pack import checkpoint_tensors, write_weights

logger = logging.getLogger(__name__)


def autoencoder_figures(model: models.NarrowAutoencoder, seed: int, per_cell: int = 4) -> dict:
    """PSNR in dB on fresh renderings: over all images (of their mean squared error) and by style."""
    rng = random.Random(f"{seed}/autoencoder/held-out")
    errors = {}
    for style in STYLE_LABELS:
        pictures = np.stack([render(name, style, rng) for name in OBJECTS for _ in range(per_cell)])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
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


def sampling_figures(network: Network, judge: Judge, seed: int, per_cell: int = 2) -> dict[str, float]:
    """Percentage of sampled images with the prompted style and object: by name, by description, and plain.

    By name there are 360 x `per_cell` images.
    """
    from ...history.unlearn_model import UnlearnModel
    from ...models.source import FileSource

    untouched = UnlearnModel(FileSource(Path(), 0, ""), network.family)
    named = [
        Shot(EVALUATION_TEMPLATE.format(object=o, style=s.display_name), s.name, o, "named", i)
        for s in STYLES
        for o in OBJECTS
        for i in range(per_cell)
    ]
    described = [
        Shot(
            DESCRIPTION_EVALUATION_TEMPLATE.format(
                object=o, description=s.descriptions[i % len(s.descriptions)]
            ),
            s.name,
            o,
            "described",
            i,
        )
        for s in STYLES
        for o in OBJECTS
        for i in range(per_cell)
    ]
    plain = [Shot(f"A {o} image.", PLAIN, o, "plain", i) for o in OBJECTS for i in range(4 * per_cell)]
    figures = {}
    for name, shots in (("name", named), ("description", described), ("plain", plain)):
        verdicts = judge(take(network, untouched, shots, seed))
        pairs = list(zip(shots, verdicts, strict=True))
        figures[f"style_by_{name}"] = 100 * float(
            np.mean([shot.style == verdict.style for shot, verdict in pairs])
        )
        figures[f"object_by_{name}"] = 100 * float(
            np.mean([shot.object == verdict.object for shot, verdict in pairs])
        )
    return figures


def classifier_figures(judge: Judge, seed: int, per_cell: int = 3) -> dict[str, float]:
    """Percentage of fresh renderings that the classifier labels correctly, for style and object."""
    rng = random.Random(f"{seed}/classifier/held-out")
    cells = [(style, name) for style in STYLE_LABELS for name in OBJECTS for _ in range(per_cell)]
    pictures = np.stack([render(name, style, rng) for style, name in cells])
    verdicts = judge(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    return {
        "style_on_renderings": 100
        * float(np.mean([v.style == style for (style, _), v in zip(cells, verdicts, strict=True)])),
        "object_on_renderings": 100
        * float(np.mean([v.object == name for (_, name), v in zip(cells, verdicts, strict=True)])),
    }


def write_with_figures(work: Path, out: Path, seed: int) -> dict[str, dict]:
    """All figures of the packed fp16 weights; both weight files are written to `out`.

    Args:
        work: folder with the results of the training stages.
        out: folder for checkpoint and classifier.
        seed: of the measurements.
    """
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**MINI.config("unet"))
    unet.load_state_dict(load_file(work / "unet.safetensors"))
    narrow = models.load_autoencoder(work / "autoencoder.safetensors")
    tensors = checkpoint_tensors(unet, load_file(work / "text.safetensors"), narrow.widened(), torch.float16)
    classifier = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(work / "classifier.safetensors").items()
    }
    draft, classifier_path = work / "minicanvas.safetensors", out / models.CLASSIFIER_PATH.name
    write_weights(draft, tensors, {})
    write_weights(work / "judge.safetensors", classifier, {})
    judge = Judge(work / "judge.safetensors")
    figures = {
        "autoencoder": autoencoder_figures(narrow, seed),
        "sampling": sampling_figures(load_network(draft), judge, seed + 1),
    }
    own = {"classifier": classifier_figures(judge, seed)}
    for part in (figures, own):
        logger.info("%s", part)
    write_weights(out / models.CHECKPOINT_PATH.name, tensors, figures)
    write_weights(classifier_path, classifier, own)
    return figures | own
