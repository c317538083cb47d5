"""The demonstration: a chain of requests with `plain`, which trains, and one with `recommended`, both
measured.

Chains and evaluations are jobs for a few processes of one thread each. Every image has its own generator, so
the figures do not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..audits.classifier_scores import METRICS, Shot
from ..concepts.captions import anchor_prompts
from ..files.paths import free_path
from ..history.unlearn_model import UnlearnModel
from ..models.load_diffusers import NetworkCache
from ..models.sampling import SamplerConfig
from ..models.source import source_of
from ..output.charts import labelled_grid, metric_chart, save_image, to_image
from ..output.checkpoint import load_edits, open_model, save_checkpoint, save_edits
from ..requests.presets import preset
from ..requests.resolve import Overrides, resolve
from ..store.anchors import AnchorStore
from ..training.callbacks import Callbacks
from ..training.step import run_step
from . import models
from .family import MINI
from .judge import Judge, evaluate, take
from .suites import STYLE_SUITE
from .workers import prepare_worker
from .world import EVALUATION_TEMPLATE, OBJECTS, REQUEST_ORDERS, STYLE_BY_NAME, styles_in

RUNS = ("plain", "recommended")
# seconds on one thread, for the first estimate of the time left
_ITERATION_COST, _IMAGE_COST = 0.15, 0.085
ANCHOR_COUNT = 100


@dataclass(frozen=True)
class Plan:
    """The settings of a demonstration, sent to every worker process."""

    targets: tuple[str, ...]
    seed: int
    folder: Path
    model_path: Path = models.CHECKPOINT_PATH

    @property
    def is_full(self) -> bool:
        return len(self.targets) == 12

    @property
    def marks(self) -> list[int]:
        """Numbers of the requests after which figures are reported: 1, 4, 8, 12, or all in a shorter run."""
        return [1, 4, 8, 12] if self.is_full else list(range(1, len(self.targets) + 1))

    @property
    def objects(self) -> Sequence[str]:
        """Objects of an evaluation: all in the full demonstration, every other one in a shorter run."""
        return OBJECTS if self.is_full else OBJECTS[::2]

    def per_cell(self, k: int) -> int:
        """Images per style and object: two after request 12 and for its pretrained model, else one."""
        return 2 if k == 12 else 1

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(style, role) of every column of the image grid."""
        groups = {"forgotten": self.targets, "declared": styles_in("declared"), "hidden": styles_in("hidden")}
        return [(style, role) for role, styles in groups.items() for style in styles[:4]]


@dataclass(frozen=True)
class _Worker:
    """Objects that a worker process makes once for all its jobs."""

    progress: multiprocessing.Queue
    networks: NetworkCache
    judge: Judge


_worker: _Worker | None = None


def _start_worker(progress: multiprocessing.Queue) -> None:
    global _worker
    prepare_worker()
    _worker = _Worker(progress, NetworkCache(), Judge())


def _edits_path(plan: Plan, run: str, k: int) -> Path:
    return plan.folder / f"{run}-{k}.edits.safetensors"


def _model_after(plan: Plan, run: str | None, k: int) -> UnlearnModel:
    return (
        load_edits(_edits_path(plan, run, k), source_of(plan.model_path))
        if run
        else open_model(plan.model_path)
    )


def _make_anchors(plan: Plan) -> None:
    source = source_of(plan.model_path)
    AnchorStore(plan.folder).anchor_latents(
        source,
        _worker.networks.get(source),
        anchor_prompts(MINI, STYLE_SUITE.concepts(plan.targets[:1])),
        ANCHOR_COUNT,
        SamplerConfig(),
        plan.seed,
    )


def _run_chain(plan: Plan, run: str) -> float:
    """Mean seconds per request of a chain; the edits after each reported request go to the folder."""
    model, store = open_model(plan.model_path), AnchorStore(plan.folder)
    callbacks = Callbacks(on_progress=lambda progress: _worker.progress.put(_ITERATION_COST))
    seconds = []
    for k, target in enumerate(plan.targets, 1):
        request = resolve(
            run,
            MINI,
            STYLE_SUITE.concepts([target]),
            STYLE_SUITE.keep(),
            Overrides(seed=plan.seed * 1000 + k, anchor_seed=plan.seed),
        )
        model, report = run_step(model, request, callbacks=callbacks, store=store, networks=_worker.networks)
        seconds.append(report.record.seconds)
        if k in plan.marks:
            save_edits(model, _edits_path(plan, run, k))
    return round(sum(seconds) / len(seconds), 2)


def _evaluate(plan: Plan, run: str | None, k: int) -> dict:
    reported = 0

    def on_batch(done: int) -> None:
        nonlocal reported
        _worker.progress.put(_IMAGE_COST * (done - reported))
        reported = done

    model = _model_after(plan, run, k)
    return evaluate(
        _worker.networks.get(model.source),
        model,
        _worker.judge,
        plan.targets[:k],
        seed=plan.seed,
        per_cell=plan.per_cell(k),
        across=plan.objects,
        on_batch=on_batch,
    ).to_json()


def _draw_row(plan: Plan, run: str | None) -> list[Image.Image]:
    """One row of the image grid, with the same prompts and seeds for every run."""
    model, names = _model_after(plan, run, len(plan.targets)), itertools.cycle(OBJECTS)
    shots = [
        Shot(
            EVALUATION_TEMPLATE.format(object=name, style=STYLE_BY_NAME[style].display_name),
            style,
            name,
            "picture",
            0,
        )
        for (style, _), name in zip(plan.columns, names, strict=False)
    ]
    return [to_image(image) for image in take(_worker.networks.get(model.source), model, shots, plan.seed)]


_JOBS = {"anchors": _make_anchors, "chain": _run_chain, "scores": _evaluate, "row": _draw_row}


def run_demo(
    out: Path,
    *,
    requests: int = 12,
    seed: int = 0,
    order: str = "a",
    workers: int | None = None,
    on_progress: Callable[[float, float], None] = lambda share, seconds_left: None,
) -> dict:
    """Figures of both chains and paths of the files: image grid, chart and edited checkpoint, in `out`.

    Args:
        out: folder to write to.
        requests: number of styles to forget, 1 to 12.
        seed: of training and evaluation.
        order: `a` or `b`, one of the two fixed orders of the requests.
        workers: number of processes; one per core, at most four, if None.
        on_progress: called a few times a second with (share done in [0, 1], seconds left).

    Raises:
        CheckpointError: `out` cannot be written.
    """
    workers = workers or min(os.cpu_count() or 1, 4)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    plan = Plan(REQUEST_ORDERS[order][:requests], seed, free_path(out / "steps"))
    plan.folder.mkdir(parents=True)
    images = [len(STYLE_SUITE.shots(plan.targets[:k], plan.per_cell(k), plan.objects)) for k in plan.marks]
    iterations = sum(preset(run).training.iterations for run in RUNS) * requests
    todo = iterations * _ITERATION_COST + _IMAGE_COST * (len(RUNS) * sum(images) + images[-1])
    try:
        results = _run_jobs(plan, todo, workers, on_progress)
        on_progress(1.0, 0.0)
        runs = {
            run: {
                "after": {str(k): _figures(results["scores", run, k]) for k in plan.marks},
                "seconds_per_request": results["chain", run],
                "details": {str(k): results["scores", run, k] for k in plan.marks},
            }
            for run in RUNS
        }
        base = _figures(results["scores", None, requests])
        rows = [(run or "before", results["row", run]) for run in (None, *RUNS)]
        files = {name: str(path.resolve()) for name, path in _write_results(plan, out, runs, rows).items()}
        return {
            "seed": seed,
            "order": order,
            "targets": list(plan.targets),
            "base": base,
            "runs": runs,
            "files": files,
        }
    finally:
        shutil.rmtree(plan.folder, ignore_errors=True)


def _run_jobs(
    plan: Plan, todo: float, workers: int, on_progress: Callable[[float, float], None]
) -> dict[tuple, Any]:
    """(job name, *arguments) -> result of the job.

    Anchor images come first, then the chains, then the evaluations. The pretrained model is evaluated beside
    the chains.
    """
    context = multiprocessing.get_context("spawn")
    progress = context.Queue()
    begun, done = time.monotonic(), 0.0
    results: dict[tuple, Any] = {}
    jobs: dict[Future, tuple] = {}
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(progress,)
    ) as pool:

        def submit(*key: Any) -> None:
            jobs[pool.submit(_JOBS[key[0]], plan, *key[1:])] = key

        submit("anchors")
        submit("scores", None, len(plan.targets))
        submit("row", None)
        try:
            while jobs:
                finished, _ = wait(jobs, timeout=0.3, return_when=FIRST_COMPLETED)
                done += sum(_drain(progress))
                spent = time.monotonic() - begun
                on_progress(
                    min(done / todo, 0.999),
                    spent * (todo - done) / done if done > 0.02 * todo else todo / workers,
                )
                for job in finished:
                    key = jobs.pop(job)
                    results[key] = job.result()
                    if key[0] == "anchors":
                        for run in RUNS:  # the slower chain first
                            submit("chain", run)
                    elif key[0] == "chain":
                        for k in reversed(plan.marks):
                            submit("scores", key[1], k)
                        submit("row", key[1])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _figures(scores: dict) -> dict:
    return {name: scores[name] for name in METRICS}


def _drain(progress: multiprocessing.Queue) -> Iterable[float]:
    while True:
        try:
            yield progress.get_nowait()
        except queue.Empty:
            return


def _write_results(
    plan: Plan, out: Path, runs: dict, rows: Sequence[tuple[str, list[Image.Image]]]
) -> dict[str, Path]:
    last = len(plan.targets)
    columns = [f"{STYLE_BY_NAME[style].display_name}\n{role}" for style, role in plan.columns]
    grid = labelled_grid(f"Before and after {last} request(s), equal seeds", columns, rows, cell=108)
    points = {run: [(int(k), figures) for k, figures in runs[run]["after"].items()] for run in RUNS}
    curves = metric_chart(f"{last} request(s) one after another", points)
    written = {"pictures": free_path(out / "before-after.png"), "chart": free_path(out / "chart.png")}
    save_image(grid, written["pictures"])
    save_image(curves, written["chart"])
    written["checkpoint"] = save_checkpoint(
        _model_after(plan, "recommended", last), out / f"minicanvas-forgot-{last}.safetensors"
    )
    return written
