"""Chooses the settings of our own presets: equally many trials for each row of the benchmark, on a seed that is not reported.

    python benchmarks/search.py [--rows ROW ...] [--out DIR]

Every trial forgets twelve styles of MiniCanvas in order a with seed 100 and is measured once, at the end. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from cul_core.config import TrainingConfig
from cul_core.evaluation.scores import METRICS, table
from cul_core.merging.ties import TiesConfig
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas.benchmark import Cell, run_benchmark
from cul_core.presets import Preset
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.regularizers.weight_anchor import L1SPConfig, L2SPConfig

SEED = 100
STEEP = TrainingConfig(learning_rate=6e-4, schedule="linear")
DAMPED = ProjectionConfig(decoys=300, damping=3e-5)


def trial(*regularizers, replay: float = 0.0, training: TrainingConfig = STEEP, **setting) -> tuple[Preset, dict]:
    return Preset("", ConAblConfig(teacher="pretrained", replay=replay), regularizers, training), setting


def trials() -> dict[str, dict[str, tuple[Preset, dict]]]:
    """Row -> what varies -> (preset, further arguments of the cell).

    Two trials a row, and five for the preset beyond the paper.
    """
    mergers = {f"{strength:g} of 0.4": TiesConfig(strength=strength, keep_fraction=0.4) for strength in (2.25, 2.75)}
    return {
        "projection": {f"damping {d:g}": trial(ProjectionConfig(decoys=300, damping=d)) for d in (1e-5, 3e-5)},
        "projection_selft": {f"tau {tau}": trial(SelFTConfig(kept_fraction=tau), DAMPED) for tau in (0.3, 0.5)},
        "projection_l1sp": {f"strength {s:g}": trial(DAMPED, L1SPConfig(strength=s)) for s in (1e3, 5e3)},
        "plain": {"4e-4": trial(training=TrainingConfig()), "6e-4 falling": trial()},
        "l1sp": {"strength 3e4": trial(L1SPConfig(strength=3e4)), "penalty 200": trial(L1SPConfig(strength=200, form="penalty"))},
        "l2sp": {"strength 3e5": trial(L2SPConfig(strength=3e5)), "penalty 3e4": trial(L2SPConfig(strength=3e4, form="penalty"))},
        "selft": {f"tau {tau}": trial(SelFTConfig(kept_fraction=tau)) for tau in (0.2, 0.3)},
        "ties": {name: trial(setting="ties", merger=merger) for name, merger in mergers.items()},
        "simultaneous": {f"{n} iterations a target": trial(training=replace(STEEP, iterations=n), setting="simultaneous")
                         for n in (12, 25)},
        "thorough": {f"batch {b}, {rate:g}, damping {d:g}": trial(
            ProjectionConfig(decoys=300, damping=d), replay=0.25, training=replace(STEEP, batch_size=b, learning_rate=rate)
        ) for b, rate, d in ((16, 6e-4, 1e-5), (12, 1e-3, 1e-5), (16, 8e-4, 1e-5), (16, 9e-4, 1e-5), (16, 7e-4, 3e-5))},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=tuple(trials()), help="all if not given")
    parser.add_argument("--out", type=Path, default=Path("search"))
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    for row, found in trials().items():
        if arguments.rows and row not in arguments.rows:
            continue
        cells = [Cell(f"{row}: {name}", preset, **setting) for name, (preset, setting) in found.items()]
        lines = run_benchmark(arguments.out, cells=cells, seeds=[SEED], orders=["a"], marks=[12], workers=arguments.workers)
        sys.stdout.write(table([(line["cell"], {name: line["scores"][name] for name in METRICS}) for line in lines]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
