"""The benchmark on MiniCanvas: methods over seeds and orders; resumable, one JSON line per measurement.

The protocol is that of Continual Unlearning for Text-to-Image Diffusion Models (ICLR 2026, arXiv 2511.07970).
Targets are forgotten one request after another. After some requests the model is asked for the targets and
for retained concepts. Retained concepts that every method is told of are *declared*, the others *hidden*.
Names that a method makes up hold no word of the hidden ones (`suites.BLIND`).
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from ..audits.classifier_scores import LABELS, METRICS
from ..base.config import stable_hash
from ..base.errors import CheckpointError, ConfigError, brief_repr
from ..files.atomic_write import write_atomically
from ..files.locks import Waiting, try_locked
from ..files.paths import free_path
from ..mergers.merge import merge
from ..mergers.ties import TiesConfig
from ..models.load_diffusers import NetworkCache
from ..output.charts import PAPER_PANELS, metric_chart, save_image, stacked
from ..output.checkpoint import open_model
from ..requests.presets import PRESETS, Preset, preset
from ..requests.request import Request
from ..requests.resolve import Overrides, resolve
from ..store.steps import StepStore
from ..training.step import run_step
from . import models
from .family import FAMILY_OF
from .judge import Judge, evaluate, measure_for, still_shown
from .suites import BLIND, STYLE_SUITE, SUITES, Suite
from .workers import prepare_worker

logger = logging.getLogger(__name__)
SETTINGS = ("sequential", "simultaneous", "ties")
UNDECLARED = "undeclared"

PAPER = {
    "styles": {
        "plain": (100, 16, 45),
        "l1sp": (98, 13, 83),
        "l2sp": (97, 11, 73),
        "selft": (98, 17, 99),
        "plain ties": (98, 39, 73),
        "plain simultaneous": (99, 18, 98),
    },
    "objects": {
        "plain": (99, 13, 5),
        "l1sp": (97, 18, 4),
        "l2sp": (97, 23, 39),
        "selft": (99, 24, 63),
        "plain ties": (97, 37, 78),
        "projection": (97, 60, 58),
        "plain simultaneous": (99, 40, 46),
    },
}
"""UA, IRA and CRA in percent after 12 styles and after 12 objects, from the figures on the project page.

The reading error is about one point. The paper's retained concepts are told to no method; its IRA is compared
with our IRA hidden.
"""

_TIES = {
    "styles": {1: (1.25, 0.8), 4: (1.75, 0.8), 8: (2.25, 0.8), 12: (2.75, 0.4)},
    "objects": {1: (1.25, 0.2), 3: (1.25, 0.8), 5: (1.25, 0.4)},
}
"""Requests -> (strength, kept fraction) of TIES in the paper's scripts for Concept Ablation."""


@dataclass(frozen=True)
class Cell:
    """One row of the benchmark: a preset in a setting.

    `sequential` trains request k from the model after request k-1. `simultaneous` trains the first k targets
    together from the pretrained model, with at most k times the iterations of one request. It stops early at
    a UA of 99 and returns the best weights. `ties` trains every request from the pretrained model and merges
    the first k results.

    Args:
        name: label in result lines, tables and charts.
        preset: how one step trains.
        setting: one of `SETTINGS`.
        merger: how `ties` merges; the paper's values for the number of requests if None.
        is_undeclared: whether the requests name no concept to retain.
    """

    name: str
    preset: Preset
    setting: str = "sequential"
    merger: TiesConfig | None = None
    is_undeclared: bool = False

    @classmethod
    def parse(cls, name: str) -> Cell:
        """The cell of a preset, such as `plain`, or of a preset and a setting, such as `plain ties`.

        `undeclared` at the end leaves out the concepts to retain, as in `plain ties undeclared`.

        Raises:
            ConfigError: there is no such preset or setting.
        """
        told = name.removesuffix(f" {UNDECLARED}")
        chosen, _, setting = told.partition(" ")
        if (setting or "sequential") not in SETTINGS:
            raise ConfigError(
                f"Cell {name!r} has no setting {setting!r}; choose one of {', '.join(SETTINGS)}."
            )
        own, base = dict(_OWN.get(told, {})), preset(chosen)
        if settings := own.pop("settings", None):
            base = base.with_settings(settings)
        return cls(name, base, setting or "sequential", is_undeclared=told != name, **own)


_OWN = {
    "plain_ours simultaneous": {"settings": {"iterations": 35, "learning_rate": 8e-4}},
    "plain_ours ties": {
        "settings": {"learning_rate": 6e-4},
        "merger": TiesConfig(strength=2.25, keep_fraction=0.4),
    },
}
"""Name -> values of cells that differ from their preset."""

GRID = {
    "plain": "plain_ours",
    "l1sp": "l1sp_ours",
    "l2sp": "l2sp_ours",
    "selft": "selft_ours",
    "plain simultaneous": "plain_ours simultaneous",
    "plain ties": "plain_ours ties",
    "projection": "projection_ours",
    "projection_selft": "projection_selft_ours",
    "projection_l1sp": "projection_l1sp_ours",
}
"""The cells of the paper's figure: with the published values -> with ours (from benchmarks/search.py)."""

BEYOND = tuple(name for name in ("exact", "trained", "thorough", "uce", "trce_text") if name in PRESETS)
"""Presets that have no counterpart in the paper's figure."""


def grid() -> list[Cell]:
    """All cells: those of the paper's figure with the published values, with ours, and `BEYOND`."""
    return [Cell.parse(name) for name in (*GRID, *GRID.values(), *BEYOND)]


@dataclass(frozen=True)
class Run:
    """One cell with one seed in one order of requests, sent to a worker process."""

    suite: Suite
    cell: Cell
    order: str
    seed: int
    pictures: int
    marks: tuple[int, ...]
    blind: str = "nothing"

    @property
    def untold(self) -> tuple[str, ...]:
        """Retained concepts that the requests do not name."""
        return (*self.suite.hidden, *(self.suite.declared if self.cell.is_undeclared else ()))

    @property
    def withheld_words(self) -> frozenset[str]:
        """Words that no made-up name of a method may hold."""
        return self.suite.withheld_words(self.blind, self.untold)

    @property
    def blindness(self) -> str:
        """`blind`; `nothing` for a cell without made-up names, whose results are the same in every case."""
        draws = any(part.draws_made_up_names for part in self.request(1).parts())
        return self.blind if draws else "nothing"

    def request(self, k: int) -> Request:
        """The k-th request of the chain; for `simultaneous`, the request of the first k targets together."""
        chosen, targets = self.cell.preset, self.suite.order(self.order)[:k]
        keep = () if self.cell.is_undeclared else self.suite.keep()
        iterations, stopping = self.suite.iterations_factor * chosen.training.iterations, {}
        if self.cell.setting == "simultaneous":
            iterations *= k
            # a quarter, as in the paper's scripts
            stopping = {"evaluate_every": 25, "patience": max(iterations // 4, 25)}
        else:
            targets = targets[-1:]
        training = {"iterations": iterations, **stopping}
        overrides = Overrides(training=training, seed=self.seed * 1000 + k, anchor_seed=self.seed)
        family = FAMILY_OF[self.suite.world.name]
        return resolve(chosen, family, self.suite.concepts(targets), keep, overrides)

    def merger(self, k: int) -> TiesConfig:
        """The settings by which `ties` merges the first k results."""
        if self.cell.merger is not None:
            return self.cell.merger
        known = _TIES[self.suite.name]
        strength, keep_fraction = known[max(mark for mark in known if mark <= k)]
        return TiesConfig(strength=strength, keep_fraction=keep_fraction)

    def across(self, k: int) -> tuple[str, ...]:
        """Names of the cross domain in a measurement: all after the last request, else every other one."""
        return self.suite.across if k == self.marks[-1] else self.suite.across[::2]

    def identity(self, k: int) -> dict[str, Any]:
        """The key of a measurement after k requests; equal keys mean the same measurement.

        `blind` and `chain` are there only where they say something: older lines lack them.
        """
        asked = [
            self.request(i).hash for i in ([k] if self.cell.setting == "simultaneous" else range(1, k + 1))
        ]
        if self.cell.setting == "ties":
            asked.append(self.merger(k).to_json())
        optional = {}
        if self.blindness != "nothing":
            optional["blind"] = self.blindness
        if self.suite.longest > SUITES[self.suite.name].longest:
            optional["chain"] = self.suite.longest
        return {
            "suite": self.suite.name,
            "cell": self.cell.name,
            "order": self.order,
            "seed": self.seed,
            "k": k,
            "pictures": self.pictures * len(self.across(k)),
            "requests": stable_hash(asked),
            **optional,
        }

    def store_folder(self, folder: Path) -> Path:
        """Folder of finished steps: one for each blindness, which a step's request does not hold."""
        is_told = self.blindness == "nothing"
        return folder if is_told else folder.with_name(f"{folder.name}-{self.blindness}")


def _measure(run: Run, marks: Sequence[int], folder: Path) -> list[dict]:
    """One result line per mark; finished steps come from the store, so an interrupted run resumes."""
    pretrained, store, networks, judge = (
        open_model(models.checkpoint_path(run.suite.world.name)),
        StepStore(run.store_folder(folder)),
        NetworkCache(withheld_words=run.withheld_words),
        Judge(world=run.suite.world),
    )
    model, trained, lines, setting = pretrained, [], [], run.cell.setting
    at_own_time: dict[str, dict[str, list[bool]]] = {}
    for k in range(1, max(marks) + 1):
        if setting == "simultaneous" and k not in marks:
            continue
        begun, request = model if setting == "sequential" else pretrained, run.request(k)
        stops_early = bool(request.training.evaluate_every)
        measure = measure_for(request, judge, run.suite.world) if stops_early else None
        train = partial(
            run_step,
            begun,
            request,
            store=store.anchors,
            networks=networks,
            measure=measure,
            text_sums=store.texts,
        )
        outcome = store.get_or_train(
            begun,
            request,
            lambda state_store, train=train: train(state_store=state_store),
            Waiting("Another process trains a step of this benchmark", logger.warning),
        )
        model, report = outcome.model, outcome.report
        trained.append(model)
        if setting == "ties" and k in marks:
            model = merge(trained, run.merger(k))
        targets, network = run.suite.order(run.order)[:k], networks.get(model.source)
        if k in marks:
            scores = evaluate(
                network,
                model,
                judge,
                targets,
                seed=run.seed,
                suite=run.suite,
                per_cell=run.pictures,
                across=run.across(k),
            )
            drift = sum(delta.square().sum().item() for delta in model.edits.values()) ** 0.5
            lines.append(
                {
                    **run.identity(k),
                    "scores": {name: getattr(scores, name) for name in METRICS},
                    "intervals": scores.intervals,
                    "per_concept": scores.per_concept,
                    **_hidden_apart(run.suite, targets, scores.per_concept),
                    "relapse": relapse(run, k, at_own_time, scores.per_concept),
                    "model": model.content_hash,
                    "drift": round(drift, 3),
                    "seconds": report.record.seconds,
                }
            )
        if setting == "sequential" and k < max(marks):
            at_own_time[targets[-1]] = still_shown(
                network, model, judge, targets[-1], seed=run.seed, suite=run.suite, per_cell=run.pictures
            )
    return lines


def _hidden_apart(suite: Suite, targets: Sequence[str], per_concept: Mapping[str, Mapping]) -> dict:
    """IRA of the hidden concepts that are near neighbours of a target, and of the others, in percent.

    Empty for objects and people, which have no near neighbours, and without figures.
    """
    near, groups = suite.near(targets), {"near": [], "other": []}
    for name, figures in per_concept.items():
        if name in suite.hidden and name not in targets:
            groups["near" if name in near else "other"].append(figures[suite.domain])
    if suite.domain != "style" or not any(groups.values()):
        return {}
    return {
        "ira_hidden_apart": {
            group: round(mean(values), 2) if values else None for group, values in groups.items()
        }
    }


def relapse(
    run: Run, k: int, at_own_time: Mapping[str, Mapping[str, list[bool]]], per_concept: Mapping[str, dict]
) -> dict[str, float] | None:
    """UA right after a target's own request minus UA after k requests, over the same images, in points.

    Args:
        run: of the chain.
        k: number of requests.
        at_own_time: earlier target -> name of the cross domain -> whether its images still showed the target.
        per_concept: figures after k requests, by concept.

    Returns:
        The `mean` over the earlier targets and the `worst`; None if there is none.
    """
    lost = []
    for target, shown in at_own_time.items():
        then = [value for name in run.across(k) for value in shown[name]]
        lost.append(per_concept[target][run.suite.domain] - 100 * mean(then))
    return {"mean": round(mean(lost), 2), "worst": round(max(lost), 2)} if lost else None


def read_results(path: Path) -> list[dict]:
    """The lines of a results file, without an unfinished last line.

    Raises:
        CheckpointError: a line in the middle is damaged.
    """
    if not path.is_file():
        return []
    lines, results = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(
                    f"Line {number} of {path.name!r} is damaged; remove that line, and its cell is measured "
                    "again."
                ) from error
    return results


def run_benchmark(
    out: Path,
    *,
    cells: Sequence[Cell],
    seeds: Sequence[int],
    suite: Suite = STYLE_SUITE,
    orders: Sequence[str] | None = None,
    requests: int | None = None,
    pictures: int = 1,
    marks: Sequence[int] = (),
    workers: int | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    blind: str = "names",
    store: Path | None = None,
) -> list[dict]:
    """The result lines of all cells, seeds and orders; lines missing in `out`/results.jsonl are measured.

    Args:
        out: folder of the results and of the store.
        cells: rows to measure.
        seeds: of training and evaluation. They take the orders in turn: seeds 1, 2 with orders a, b are the
            runs (1, a) and (2, b). Where there are more orders, these take the seeds in turn.
        suite: styles or objects.
        orders: letters of the orders (see `Suite.order`); a and b, one for each seed, if None.
        requests: length of the chain; `Suite.longest` if None.
        pictures: images per concept and name of the cross domain.
        marks: numbers of the requests after which the model is measured; the suite's and the last if empty.
        workers: number of processes of one thread; one per core, at most eight, if None; 0 for none but this.
        on_progress: called with (runs done, runs to do, name of the last run) when a run ends.
        blind: what made-up names hold no word of, one of `BLIND`.
        store: folder of finished steps; in `out` if None.

    Raises:
        CheckpointError: `out` cannot be written, or another benchmark is running there.
        ConfigError: the suite has no such number of requests or order, or `blind` is none of `BLIND`.
    """
    if blind not in BLIND:
        raise ConfigError(f"blind is {brief_repr(blind)}; choose one of {', '.join(BLIND)}.")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    path = out / "results.jsonl"
    known = _known(path)
    requests = suite.longest if requests is None else requests
    marks = tuple(k for k in marks or {*suite.marks, requests} if k <= requests) or (requests,)
    suite, marks = suite.with_requests(requests), tuple(sorted(marks))
    runs = [
        Run(suite, cell, order, seed, pictures, marks, blind)
        for seed, order in run_pairs(seeds, orders)
        for cell in cells
    ]
    missing = [
        (run, due) for run in runs if (due := [k for k in marks if _key(run.identity(k)) not in known])
    ]
    on_progress(0, len(missing), "")
    if not missing:
        return [known[_key(run.identity(k))] for run in runs for k in run.marks]
    with try_locked(out / "results.lock") as is_ours:
        if not is_ours:
            raise CheckpointError(
                f"Another benchmark is running in {str(out)!r}; wait for its end or give another folder."
            )
        known |= _known(path)  # another benchmark may have ended meanwhile
        measured = _measured(missing, store or out / "store", workers)
        for done, (run, lines) in enumerate(measured, 1):
            known |= {_key(line): line for line in lines}
            data = "".join(json.dumps(line) + "\n" for line in known.values()).encode()
            write_atomically(path, lambda file, data=data: file.write(data))
            on_progress(done, len(missing), f"{run.cell.name}, order {run.order}, seed {run.seed}")
    return [known[_key(run.identity(k))] for run in runs for k in run.marks]


def _measured(
    missing: Sequence[tuple[Run, list[int]]], store: Path, workers: int | None
) -> Iterator[tuple[Run, list[dict]]]:
    """(run, its result lines) of each run when it ends."""
    if workers == 0:
        yield from ((run, _measure(run, due, store)) for run, due in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers or min(os.cpu_count() or 1, 8), mp_context=context, initializer=prepare_worker
    ) as pool:
        try:
            jobs = {pool.submit(_measure, run, due, store): run for run, due in missing}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_pairs(seeds: Sequence[int], orders: Sequence[str] | None) -> list[tuple[int, str]]:
    """Distinct (seed, order) of the runs; see `run_benchmark`."""
    count = len(seeds) if orders is None else max(len(seeds), len(orders))
    orders = orders or ("a", "b")
    return list(dict.fromkeys((seeds[i % len(seeds)], orders[i % len(orders)]) for i in range(count)))


def _known(path: Path) -> dict[tuple, dict]:
    return {_key(line): line for line in read_results(path)}


def _key(line: Mapping[str, Any]) -> tuple:
    always = tuple(line[name] for name in ("suite", "cell", "order", "seed", "k", "pictures", "requests"))
    return (*always, line.get("blind"), line.get("chain"))


FURTHER = {
    "near": "IRA near",
    "other": "IRA other",
    "relapse": "relapse",
    "worst_relapse": "worst",
}
"""Further figures -> labels: IRA hidden of near neighbours of targets and of the others, and `relapse`."""


def further_figures(line: Mapping) -> dict[str, float | None]:
    """The figures of `FURTHER` of a result line; None where nothing was measured."""
    suite, concepts, lost = SUITES[line["suite"]], line.get("per_concept", {}), line.get("relapse") or {}
    targets = [name for name, one in concepts.items() if one["role"] == "target"]
    apart = _hidden_apart(suite, targets, concepts).get("ira_hidden_apart", {})
    return {
        "near": apart.get("near"),
        "other": apart.get("other"),
        "relapse": lost.get("mean"),
        "worst_relapse": lost.get("worst"),
    }


def _row_name(line: Mapping) -> str:
    return line["cell"] + (", blind to descriptions" if line.get("blind") == "descriptions" else "")


def _means(
    lines: Sequence[Mapping], figures: Callable[[Mapping], Mapping[str, float | None]]
) -> dict[str, dict[int, dict[str, float | None]]]:
    rows: dict[str, dict[int, list[Mapping[str, float | None]]]] = {}
    for line in sorted(lines, key=lambda line: line["k"]):
        rows.setdefault(_row_name(line), {}).setdefault(line["k"], []).append(figures(line))
    return {
        name: {k: {metric: _mean([run[metric] for run in runs]) for metric in runs[0]} for k, runs in after}
        for name, after in ((name, rows[name].items()) for name in dict.fromkeys(map(_row_name, lines)))
    }


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else round(mean(values), 2)


def averages(lines: Sequence[Mapping]) -> dict[str, dict[int, dict[str, float | None]]]:
    """Cell -> request -> metric -> mean over seeds and orders; None where a run has no value."""
    return _means(lines, lambda line: {metric: line["scores"][metric] for metric in METRICS})


def result_table(lines: Sequence[Mapping], compare_paper: bool = False) -> str:
    """A text table of every cell after its last request, mean over seeds and orders.

    Columns of `FURTHER` are there if a cell has a figure in them.

    Args:
        lines: of `run_benchmark`.
        compare_paper: add the paper's UA/IRA/CRA and the comparison of `order_report`.
    """
    paper = PAPER.get(lines[0]["suite"], {}) if compare_paper else {}
    further = {cell: after[max(after)] for cell, after in _means(lines, further_figures).items()}
    shown = [name for name in FURTHER if any(of[name] is not None for of in further.values())]
    rows = [
        (
            f"{cell}, after {max(after)}",
            cell,
            after[max(after)] | {name: further[cell][name] for name in shown},
        )
        for cell, after in averages(lines).items()
    ]
    width = max(len(label) for label, _, _ in rows)
    head = (
        " " * width
        + "".join(f"{label:>11}" for label in (*map(LABELS.get, METRICS), *map(FURTHER.get, shown)))
        + ("   paper UA/IRA/CRA" if compare_paper else "")
    )
    text = [head]
    for label, cell, values in rows:
        figures = "".join(f"{'-' if value is None else f'{value:.1f}':>11}" for value in values.values())
        reported = f"{'/'.join(map(str, paper[cell])) if cell in paper else '-':>19}" if compare_paper else ""
        text.append(label.ljust(width) + figures + reported)
    return "\n".join([*text, *(order_report(lines) if compare_paper else [])])


_CLEAR = 3  # least difference, in points, at which the order of two of the paper's figures counts


def order_report(lines: Sequence[Mapping]) -> list[str]:
    """One line each for UA, IRA hidden and CRA: how many pairs of cells are in the paper's order, and which
    are not."""
    paper = PAPER.get(lines[0]["suite"], {})
    last = {cell: after[max(after)] for cell, after in averages(lines).items() if cell in paper}
    text = []
    for column, metric in enumerate(("ua", "ira_hidden", "cra")):
        pairs = [
            (low, high)
            for low, high in itertools.permutations(last, 2)
            if paper[high][column] - paper[low][column] >= _CLEAR
        ]
        wrong = [
            f"{low} ({last[low][metric]:.1f}) above {high} ({last[high][metric]:.1f})"
            for low, high in pairs
            if last[low][metric] > last[high][metric]
        ]
        text.append(
            f"{LABELS[metric]}: of {len(pairs)} pairs at least {_CLEAR} points apart in the paper, "
            f"{len(pairs) - len(wrong)} stand "
            f"in its order" + (f"; not {', '.join(wrong)}" if wrong else "") + "."
        )
    return text


def write_figure(lines: Sequence[Mapping], out: Path) -> Path:
    """Path of the new chart: UA, IRA and CRA against the request, one curve per cell, as in the paper.

    Cells with the published values have a chart of their own above the others. Empty diamonds are the paper's
    figures after its last request. An existing file is never overwritten.
    """
    suite, count = SUITES[lines[0]["suite"]], len({(line["seed"], line["order"]) for line in lines})
    runs = {cell: list(after.items()) for cell, after in averages(lines).items()}
    reported = {
        cell: dict(zip(("ua", "ira_hidden", "cra"), values, strict=True))
        for cell, values in PAPER.get(suite.name, {}).items()
    }
    groups = {
        "as the authors' code does it (diamonds: the paper)": [cell for cell in runs if cell in GRID],
        "as we do it": [cell for cell in runs if cell not in GRID],
    }
    title = f"{suite.name.capitalize()} forgotten one request after another, {{}}; mean of {count} run(s)"
    charts = [
        metric_chart(title.format(what), {cell: runs[cell] for cell in cells}, PAPER_PANELS, reported)
        for what, cells in groups.items()
        if cells
    ]
    path = free_path(out / f"benchmark-{suite.name}.png")
    save_image(stacked(charts), path)
    return path
