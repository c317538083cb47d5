"""The benchmark: every way of forgetting, over seeds and orders, on MiniCanvas; resumable, one JSON line per measurement.

The protocol is the paper's (Continual Unlearning for Text-to-Image Diffusion Models, ICLR 2026, arXiv 2511.07970): targets are
forgotten one request after another, and after some of the requests the model is asked for what should be gone and for what should
be left. Retained styles are split into those every method is told of (declared) and those none is told of (hidden).
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..checkpoint import open_model
from ..concepts import Concept
from ..config import stable_hash
from ..errors import CheckpointError, ConfigError
from ..evaluation.pictures import metric_chart
from ..evaluation.scores import LABELS, METRICS
from ..loading import BundleCache
from ..merge_models import merge
from ..merging.ties import TiesConfig
from ..presets import PRESETS, preset
from ..safetensor_files import free_path, write_atomically
from ..store import StepStore
from ..training import Request, run_step
from . import models
from .demo import anchor_captions, declared_concepts
from .judge import Judge, evaluate
from .world import REQUEST_ORDERS

MARKS = (1, 4, 8, 12)
SETTINGS = ("sequential", "simultaneous", "ties")

PAPER = {
    "plain": (100, 16, 45), "l1sp": (98, 13, 83), "l2sp": (97, 11, 73), "selft": (98, 17, 99), "plain ties": (98, 39, 73),
    "plain simultaneous": (99, 18, 98),
}  # fmt: skip
"""UA, IRA, CRA after 12 styles, read from the figure on the authors' project page; about one point of reading error."""

_TIES = {1: (1.25, 0.8), 4: (1.75, 0.8), 8: (2.25, 0.8), 12: (2.75, 0.4)}
"""Strength and kept fraction of TIES after that many styles, as the paper's scripts have them for Concept Ablation."""


@dataclass(frozen=True)
class Cell:
    """One way of forgetting: a preset in a setting.

    `sequential` trains request k from the model after request k-1. `simultaneous` trains all targets so far at once, from the
    pretrained model, with as many iterations as the chain has had by then. `ties` trains every request from the pretrained model and
    merges all results so far.
    """

    preset: str
    setting: str = "sequential"

    @property
    def name(self) -> str:
        return self.preset if self.setting == "sequential" else f"{self.preset} {self.setting}"

    @classmethod
    def parse(cls, name: str) -> Cell:
        """The cell of that name.

        Raises:
            ConfigError: there is no such preset or setting.
        """
        chosen, _, setting = name.partition(" ")
        if (setting or "sequential") not in SETTINGS:
            raise ConfigError(f"Cell {name!r} has no setting {setting!r}; choose one of {', '.join(SETTINGS)}.")
        preset(chosen)
        return cls(chosen, setting or "sequential")


def all_cells() -> list[Cell]:
    """Every preset one request after another, and the plain one in the other settings."""
    return [*(Cell(name) for name in PRESETS), *(Cell("plain", setting) for setting in SETTINGS[1:])]


@dataclass(frozen=True)
class Run:
    """One cell with one seed in one order of requests; travels to a worker process."""

    cell: Cell
    order: str
    seed: int
    requests: int
    pictures: int

    @property
    def marks(self) -> list[int]:
        return [k for k in MARKS if k <= self.requests] or [self.requests]

    def request(self, k: int) -> Request:
        """The k-th request of the chain, or the one that forgets the first k targets at once."""
        chosen, targets = preset(self.cell.preset), REQUEST_ORDERS[self.order][:k]
        if self.cell.setting == "simultaneous":
            chosen = replace(chosen, training=replace(chosen.training, iterations=k * chosen.training.iterations))
        else:
            targets = targets[-1:]
        return chosen.request(
            [Concept(target) for target in targets], retain=declared_concepts(), anchor_prompts=anchor_captions(),
            seed=self.seed * 1000 + k, anchor_seed=self.seed,
        )  # fmt: skip

    def merger(self, k: int) -> TiesConfig:
        """How `ties` merges the first k results."""
        strength, keep_fraction = _TIES[max(mark for mark in _TIES if mark <= k)]
        return TiesConfig(strength=strength, keep_fraction=keep_fraction)

    def identity(self, k: int) -> dict[str, Any]:
        """What a measurement after k requests is of; two with the same identity are the same measurement."""
        asked = [self.request(i).hash for i in ([k] if self.cell.setting == "simultaneous" else range(1, k + 1))]
        if self.cell.setting == "ties":
            asked.append(self.merger(k).to_json())
        return {"cell": self.cell.name, "order": self.order, "seed": self.seed, "k": k, "pictures": self.pictures,
                "requests": stable_hash(asked)}  # fmt: skip


def _measure(run: Run, marks: Sequence[int], store_folder: Path) -> list[dict]:
    """One line per mark. Finished steps come from the store, so that an interrupted run goes on where it was."""
    pretrained, store, bundles, judge = open_model(models.CHECKPOINT_PATH), StepStore(store_folder), BundleCache(), Judge()
    model, trained, lines, setting = pretrained, [], [], run.cell.setting
    for k in range(1, max(marks) + 1):
        if setting == "simultaneous" and k not in marks:
            continue
        begun, request = model if setting == "sequential" else pretrained, run.request(k)
        found = store.get(begun, request)
        if found is None:
            found = run_step(begun, request, store=store.anchors, bundles=bundles)
            store.put(begun, request, *found)
        model, report = found
        trained.append(model)
        if setting == "ties" and k in marks:
            model = merge(trained, run.merger(k))
        if k in marks:
            targets = REQUEST_ORDERS[run.order][:k]
            scores = evaluate(bundles.get(model.source), model, judge, targets, seed=run.seed, per_cell=run.pictures)
            drift = sum(delta.square().sum().item() for delta in model.edits.values()) ** 0.5
            lines.append({**run.identity(k), "scores": {name: getattr(scores, name) for name in METRICS},
                          "intervals": scores.intervals, "per_concept": scores.per_concept, "drift": round(drift, 3),
                          "seconds": report.record.seconds})  # fmt: skip
    return lines


def read_results(path: Path) -> list[dict]:
    """The lines of a results file; an unfinished last line is left out.

    Raises:
        CheckpointError: a line in the middle is damaged.
    """
    if not path.is_file():
        return []
    lines, found = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(
                    f"Line {number} of {path.name!r} is damaged; remove that line, its cell is measured again."
                ) from error
    return found


def run_benchmark(
    out: Path, *, cells: Sequence[Cell], seeds: Sequence[int], orders: Sequence[str] = ("a", "b"), requests: int = 12, pictures: int = 1,
    workers: int | None = None, on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[dict]:  # fmt: skip
    """Measure what is not yet in `out`/results.jsonl, a process of one thread per core; returns the lines of all that was asked for.

    `on_progress(runs done, runs to do, name of the last)` is called as runs finish.

    Raises:
        CheckpointError: `out` cannot be written.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    path = out / "results.jsonl"
    known = {_key(line): line for line in read_results(path)}
    runs = [Run(cell, order, seed, requests, pictures) for seed in seeds for order in orders for cell in cells]
    missing = {run: marks for run in runs if (marks := [k for k in run.marks if _key(run.identity(k)) not in known])}
    on_progress(0, len(missing), "")
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or min(os.cpu_count() or 1, 8), mp_context=context, initializer=_start_worker) as pool:
            try:
                jobs = {pool.submit(_measure, run, marks, out / "store"): run for run, marks in missing.items()}
                for done, job in enumerate(as_completed(jobs), 1):
                    known |= {_key(line): line for line in job.result()}
                    data = "".join(json.dumps(line) + "\n" for line in known.values()).encode()
                    write_atomically(path, lambda file, data=data: file.write(data))
                    on_progress(done, len(missing), f"{jobs[job].cell.name}, order {jobs[job].order}, seed {jobs[job].seed}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [known[_key(run.identity(k))] for run in runs for k in run.marks]


def _start_worker() -> None:
    torch.set_num_threads(1)


def _key(line: Mapping[str, Any]) -> tuple:
    return tuple(line[name] for name in ("cell", "order", "seed", "k", "pictures", "requests"))


def averages(lines: Sequence[Mapping]) -> dict[str, dict[int, dict[str, float | None]]]:
    """Cell -> request -> metric -> mean over seeds and orders; None where a run measured nothing."""
    found: dict[str, dict[int, dict[str, float | None]]] = {}
    for cell in dict.fromkeys(line["cell"] for line in lines):
        for k in sorted({line["k"] for line in lines if line["cell"] == cell}):
            values = [line["scores"] for line in lines if line["cell"] == cell and line["k"] == k]
            found.setdefault(cell, {})[k] = {
                metric: None if any(scores[metric] is None for scores in values) else round(mean(scores[metric] for scores in values), 2)
                for metric in METRICS
            }
    return found


def result_table(lines: Sequence[Mapping], compare_paper: bool = False) -> str:
    """The last request of every cell, mean over seeds and orders; with the paper's UA/IRA/CRA beside it if asked for."""
    rows = list(_rows(lines, compare_paper))
    width = max(len(name) for name, _ in rows)
    head = [*(f"{LABELS[metric]:>11}" for metric in METRICS), *(["   paper UA/IRA/CRA"] if compare_paper else [])]
    return "\n".join([" " * width + "".join(head), *(name.ljust(width) + "".join(cells) for name, cells in rows)])


def _rows(lines: Sequence[Mapping], compare_paper: bool) -> Iterator[tuple[str, list[str]]]:
    for cell, after in averages(lines).items():
        last = max(after)
        cells = [f"{'-' if value is None else f'{value:.1f}':>11}" for value in after[last].values()]
        if compare_paper:
            said = PAPER.get(cell) if last == 12 else None
            cells.append(f"{'/'.join(map(str, said)) if said else '-':>19}")
        yield f"{cell}, after {last}", cells


def write_figure(lines: Sequence[Mapping], out: Path) -> Path:
    """UA, IRA and CRA against the request, a curve per cell; the path written, never an existing one."""
    runs = {cell: [(k, scores) for k, scores in after.items()] for cell, after in averages(lines).items()}
    count = len({(line["seed"], line["order"]) for line in lines})
    path = free_path(out / "benchmark.png")
    metric_chart(f"Styles forgotten one request after another (mean of {count} run(s))", runs).save(path)
    return path
