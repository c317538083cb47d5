"""Measures the large world's weights as they are in the work folder and writes the two files to ship.

    python -m cul_core.minicanvas.training.pack_large [--work build/minicanvas_large]

The training may still run.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from .. import models
from ..large import LARGE
from .figures import Weights, write_with_figures
from .resumable import progress
from .train_large import result_of, trained_autoencoder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/minicanvas_large"))
    parser.add_argument("--seed", type=int, default=0, help="of the measurements")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    work = arguments.work
    weights = Weights(
        LARGE,
        unet=result_of(work, "unet"),
        text=result_of(work, "text", "text."),
        autoencoder=trained_autoencoder(work),
        classifier=result_of(work, "classifier"),
    )
    training = {path.stem: progress(path) for path in sorted(work.glob("*.state"))}
    draft = work / "packed"
    draft.mkdir(exist_ok=True)
    write_with_figures(weights, work, draft, arguments.seed, training)
    for path in (models.checkpoint_path(LARGE.name), models.classifier_path(LARGE.name)):
        (draft / path.name).replace(path)


if __name__ == "__main__":
    main()
