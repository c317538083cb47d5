"""Chooses the settings of our presets: eight trials per row of the benchmark, on a seed not reported.

    python benchmarks/search.py [--rows ROW ...] [--out DIR]

Every trial forgets twelve styles of MiniCanvas in order a with seed 100 and is measured once, after the last
request. An interrupted search resumes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cul_core.audits.classifier_scores import METRICS, table
from cul_core.mergers.ties import TiesConfig
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas.benchmark import Cell, run_benchmark
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.regularizers.weight_anchor import L1SPConfig, L2SPConfig
from cul_core.requests.presets import Preset

SEED = 100


def trial(
    *regularizers,
    replay: float = 0.0,
    rate: float = 6e-4,
    iterations: int = 60,
    batch: int = 8,
    schedule: str = "linear",
    **setting,
) -> tuple[Preset, dict]:
    training = TrainingConfig(learning_rate=rate, iterations=iterations, batch_size=batch, schedule=schedule)
    return Preset("", ConAblConfig(teacher="pretrained", replay=replay), regularizers, training), setting


def damped(damping: float = 3e-5, **more) -> ProjectionConfig:
    return ProjectionConfig(decoys=300, damping=damping, **more)


def trials() -> dict[str, dict[str, tuple[Preset, dict]]]:
    """Row -> label of the trial -> (preset, further arguments of `Cell`), eight trials per row.

    The best trial has the largest H among those with a UA of 95 or more; if there is none, the largest UA.
    """
    steady = "constant"
    return {
        "projection": {
            f"damping {d:g}, {r:g}": trial(damped(d), rate=r)
            for d, r in (
                (1e-5, 6e-4),
                (3e-5, 6e-4),
                (1e-4, 6e-4),
                (3e-6, 6e-4),
                (3e-5, 8e-4),
                (1e-5, 8e-4),
                (1e-5, 1e-3),
                (3e-5, 4.5e-4),
            )
        },
        "projection_selft": {
            f"tau {t}, {r:g}": trial(SelFTConfig(kept_fraction=t), damped(), rate=r)
            for t, r in (
                (0.3, 6e-4),
                (0.5, 6e-4),
                (0.1, 6e-4),
                (0.7, 6e-4),
                (0.9, 6e-4),
                (0.5, 8e-4),
                (0.7, 8e-4),
                (0.3, 4e-4),
            )
        },
        "projection_l1sp": {
            f"strength {s:g}, damping {d:g}, {r:g}": trial(damped(d), L1SPConfig(strength=s), rate=r)
            for s, d, r in (
                (1e3, 3e-5, 6e-4),
                (5e3, 3e-5, 6e-4),
                (2e4, 3e-5, 6e-4),
                (1e5, 3e-5, 6e-4),
                (5e3, 3e-5, 8e-4),
                (2e4, 3e-5, 8e-4),
                (5e3, 1e-5, 6e-4),
                (2e4, 1e-5, 6e-4),
            )
        },
        "plain": {
            f"{r:g} {s}": trial(rate=r, schedule=s)
            for r, s in (
                (4e-4, steady),
                (6e-4, "linear"),
                (3e-4, "linear"),
                (8e-4, "linear"),
                (1e-3, "linear"),
                (4.5e-4, "linear"),
                (2e-4, steady),
                (2e-4, "linear"),
            )
        },
        "l1sp": {
            f"{f} {s:g}, {r:g}": trial(L1SPConfig(strength=s, form=f), rate=r)
            for f, s, r in (
                ("proximal", 3e4, 6e-4),
                ("penalty", 200.0, 6e-4),
                ("proximal", 1e4, 6e-4),
                ("proximal", 3e3, 6e-4),
                ("proximal", 1e3, 6e-4),
                ("penalty", 20.0, 6e-4),
                ("penalty", 5.0, 6e-4),
                ("proximal", 1e4, 8e-4),
            )
        },
        "l2sp": {
            f"{f} {s:g}, {r:g}": trial(L2SPConfig(strength=s, form=f), rate=r)
            for f, s, r in (
                ("proximal", 1.5e5, 6e-4),
                ("penalty", 3e4, 6e-4),
                ("proximal", 5e5, 6e-4),
                ("proximal", 1.5e6, 6e-4),
                ("proximal", 5e6, 6e-4),
                ("penalty", 3e3, 6e-4),
                ("penalty", 300.0, 6e-4),
                ("proximal", 5e5, 8e-4),
            )
        },
        "selft": {
            f"tau {t}, {r:g}": trial(SelFTConfig(kept_fraction=t), rate=r)
            for t, r in (
                (0.2, 6e-4),
                (0.3, 6e-4),
                (0.1, 6e-4),
                (0.15, 6e-4),
                (0.25, 6e-4),
                (0.2, 8e-4),
                (0.1, 8e-4),
                (0.15, 1e-3),
            )
        },
        "ties": {
            f"{s:g} of {k}": trial(setting="ties", merger=TiesConfig(strength=s, keep_fraction=k))
            for s, k in (
                (2.25, 0.4),
                (2.75, 0.4),
                (1.75, 0.8),
                (2.25, 0.8),
                (2.5, 0.4),
                (2.0, 0.4),
                (3.0, 0.2),
                (2.25, 0.2),
            )
        },
        "simultaneous": {
            f"{n} iterations a target, {r:g}": trial(iterations=n, rate=r, setting="simultaneous")
            for n, r in (
                (12, 6e-4),
                (25, 6e-4),
                (35, 6e-4),
                (50, 6e-4),
                (25, 8e-4),
                (35, 8e-4),
                (25, 1e-3),
                (18, 8e-4),
            )
        },
        "thorough": {
            f"batch {b}, {r:g}, damping {d:g}, replay {again}"
            + ("" if p else ", earlier targets unprotected"): trial(
                damped(d, protect_previous=p), replay=again, rate=r, batch=b
            )
            for b, r, d, again, p in (
                (16, 6e-4, 1e-5, 0.25, True),
                (12, 1e-3, 1e-5, 0.25, True),
                (16, 8e-4, 1e-5, 0.25, True),
                (16, 9e-4, 1e-5, 0.25, True),
                (16, 7e-4, 3e-5, 0.25, True),
                (24, 7e-4, 3e-5, 0.5, True),
                (24, 7e-4, 3e-5, 0.5, False),
                (16, 7e-4, 3e-5, 0.25, False),
            )
        },
    }


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
        lines = run_benchmark(
            arguments.out, cells=cells, seeds=[SEED], orders=["a"], marks=[12], workers=arguments.workers
        )
        sys.stdout.write(
            table([(line["cell"], {name: line["scores"][name] for name in METRICS}) for line in lines]) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
