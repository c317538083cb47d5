"""The demonstration: forget styles one after another, plainly and with the recommended preset, and measure both.

Chains and evaluations are jobs for a few processes of one thread each; every picture has its own generator, so the figures do
not depend on how the jobs were spread.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from ..anchors import AnchorStore
from ..chain import UnlearnModel
from ..checkpoint import load_edits, open_model, save_checkpoint, save_edits
from ..concepts import Concept
from ..diffusion import SamplerConfig
from ..evaluation.pictures import Line, chart, labelled_grid, to_image
from ..evaluation.scores import METRICS, Shot
from ..loading import BundleCache, source_of
from ..presets import preset
from ..safetensor_files import free_path
from ..training import Callbacks, run_step
from . import models
from .judge import Judge, evaluate, shots_for, take
from .world import EVALUATION_TEMPLATE, OBJECTS, PLAIN_TEMPLATES, REQUEST_ORDERS, STYLE_BY_NAME, styles_in

RUNS = ("plain", "recommended")
_ITERATION_COST, _PICTURE_COST = 0.15, 0.085  # seconds on one thread, only for the first guess of the time left
ANCHOR_COUNT = 100


def anchor_prompts() -> tuple[str, ...]:
    """Captions of plain pictures, every object in every wording."""
    return tuple(template.format(object=name) for template in PLAIN_TEMPLATES for name in OBJECTS)


def declared_concepts() -> tuple[Concept, ...]:
    """What a careful user of MiniCanvas would list as to be kept: the declared styles."""
    return tuple(Concept(style) for style in styles_in("declared"))


def reported_requests(requests: int) -> list[int]:
    """After which requests figures are reported: 1, 4, 8, 12 for the full list, else after each."""
    return [1, 4, 8, 12] if requests == 12 else list(range(1, requests + 1))


@dataclass(frozen=True)
class Plan:
    """What a demonstration does; travels to the worker processes."""

    targets: tuple[str, ...]
    seed: int
    folder: Path
    model_path: Path = models.CHECKPOINT_PATH


_progress: multiprocessing.Queue | None = None


def _start_worker(progress: multiprocessing.Queue) -> None:
    global _progress
    _progress = progress
    torch.set_num_threads(1)


def _tell(cost: float) -> None:
    _progress.put(cost)


def _edits_path(plan: Plan, run: str, k: int) -> Path:
    return plan.folder / f"{run}-{k}.edits.safetensors"


def _run_chain(plan: Plan, run: str) -> float:
    """Forgets the targets in order, leaving the edits after each reported request; returns seconds per request."""
    model, bundles, store = open_model(plan.model_path), BundleCache(), AnchorStore(plan.folder)
    callbacks = Callbacks(on_progress=lambda progress: _tell(_ITERATION_COST))
    seconds = []
    for k, target in enumerate(plan.targets, 1):
        request = preset(run).request(
            [Concept(target)], retain=declared_concepts(), anchor_prompts=anchor_prompts(), seed=plan.seed * 1000 + k, anchor_seed=plan.seed
        )
        model, report = run_step(model, request, callbacks=callbacks, store=store, bundles=bundles)
        seconds.append(report.record.seconds)
        if k in reported_requests(len(plan.targets)):
            save_edits(model, _edits_path(plan, run, k))
    return sum(seconds) / len(seconds)


def _model_after(plan: Plan, run: str | None, k: int) -> UnlearnModel:
    return load_edits(_edits_path(plan, run, k), source_of(plan.model_path)) if run else open_model(plan.model_path)


def _evaluate(plan: Plan, run: str | None, k: int, per_cell: int) -> dict:
    bundle = BundleCache().get(source_of(plan.model_path))
    told = 0

    def on_batch(done: int) -> None:
        nonlocal told
        _tell(_PICTURE_COST * (done - told))
        told = done

    scores = evaluate(
        bundle,
        _model_after(plan, run, k),
        Judge(),
        plan.targets[:k],
        seed=plan.seed,
        per_cell=per_cell,
        objects=objects_asked(plan),
        on_batch=on_batch,
    )
    return scores.to_json()


def _make_anchors(plan: Plan) -> None:
    model = open_model(plan.model_path)
    bundle = BundleCache().get(model.source)
    AnchorStore(plan.folder).anchor_latents(model.source, bundle, anchor_prompts(), ANCHOR_COUNT, SamplerConfig(), plan.seed)


def per_cell(k: int, requests: int) -> int:
    """Pictures per style and object: two at the end of the full demonstration and for its untouched model, else one."""
    return 2 if k == requests == 12 else 1


def objects_asked(plan: Plan) -> Sequence[str]:
    """Every object in the full demonstration, every other one in a short one, which should take a short time."""
    return OBJECTS if len(plan.targets) == 12 else OBJECTS[::2]


def run_demo(
    out: Path, *, requests: int = 12, seed: int = 0, order: str = "a", workers: int | None = None,
    on_progress: Callable[[float, float], None] = lambda share, seconds_left: None,
) -> dict:  # fmt: skip
    """Run both chains, evaluate them, write pictures and the edited checkpoint to `out`; returns figures and paths.

    `on_progress(share done, seconds left)` is called a few times a second.

    Raises:
        CheckpointError: `out` cannot be written.
    """
    workers = workers or min(os.cpu_count() or 1, 4)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    plan = Plan(REQUEST_ORDERS[order][:requests], seed, free_path(out / "steps"))
    plan.folder.mkdir(parents=True)
    marks = reported_requests(requests)
    pictures_asked = {k: len(shots_for(plan.targets[:k], per_cell(k, requests), objects_asked(plan))) for k in marks}
    iterations = sum(preset(run).training.iterations for run in RUNS) * requests
    todo = iterations * _ITERATION_COST + _PICTURE_COST * (len(RUNS) * sum(pictures_asked.values()) + pictures_asked[marks[-1]])
    try:
        scores, seconds = _run_jobs(plan, marks, todo, workers, on_progress)
        on_progress(1.0, 0.0)
        runs = {run: {"after": {str(k): _figures(scores[run, k]) for k in marks}, "seconds_per_request": seconds[run],
                      "details": {str(k): scores[run, k] for k in marks}} for run in RUNS}  # fmt: skip
        result = {"seed": seed, "order": order, "targets": list(plan.targets), "base": _figures(scores[None, requests]), "runs": runs}
        return result | {"files": {name: str(path.resolve()) for name, path in _write_results(plan, out, runs).items()}}
    finally:
        shutil.rmtree(plan.folder, ignore_errors=True)


def _run_jobs(
    plan: Plan, marks: Sequence[int], todo: float, workers: int, on_progress: Callable[[float, float], None]
) -> tuple[dict[tuple[str | None, int], dict], dict[str, float]]:
    """Scores by (run, request) and seconds per request by run; anchors first, then chains, then evaluations as they become possible."""
    requests = len(plan.targets)
    context = multiprocessing.get_context("spawn")
    progress = context.Queue()
    begun, done = time.monotonic(), 0.0
    scores: dict[tuple[str | None, int], dict] = {}
    seconds: dict[str, float] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(progress,)) as pool:
        jobs: dict[Future, tuple] = {pool.submit(_make_anchors, plan): ("anchors",)}
        try:
            while jobs:
                finished, _ = wait(jobs, timeout=0.3, return_when=FIRST_COMPLETED)
                done += sum(_drain(progress))
                spent = time.monotonic() - begun
                on_progress(min(done / todo, 0.999), spent * (todo - done) / done if done > 0.02 * todo else todo / workers)
                for job in finished:
                    kind, *which = jobs.pop(job)
                    if kind == "anchors":
                        job.result()
                        jobs |= {pool.submit(_run_chain, plan, run): ("chain", run) for run in RUNS}
                        jobs[pool.submit(_evaluate, plan, None, requests, per_cell(requests, requests))] = ("scores", None, requests)
                    elif kind == "chain":
                        seconds[which[0]] = round(job.result(), 2)
                        for k in reversed(marks):
                            jobs[pool.submit(_evaluate, plan, which[0], k, per_cell(k, requests))] = ("scores", which[0], k)
                    else:
                        scores[tuple(which)] = job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return scores, seconds


def _figures(scores: dict) -> dict:
    return {name: scores[name] for name in METRICS}


def _drain(progress: multiprocessing.Queue) -> Iterable[float]:
    while True:
        try:
            yield progress.get_nowait()
        except queue.Empty:
            return


def _write_results(plan: Plan, out: Path, runs: dict) -> dict[str, Path]:
    last = len(plan.targets)
    final = {run: _model_after(plan, run, last) for run in RUNS}
    bundle = BundleCache().get(source_of(plan.model_path))
    shown: Sequence[tuple[str, str]] = [
        *((style, "forgotten") for style in plan.targets[:4]),
        *((style, "declared") for style in styles_in("declared")[:4]),
        *((style, "hidden") for style in styles_in("hidden")[:4]),
    ]
    shots = [Shot(EVALUATION_TEMPLATE.format(object=OBJECTS[i % len(OBJECTS)], style=STYLE_BY_NAME[style].display_name), style,
                  OBJECTS[i % len(OBJECTS)], "picture", 0) for i, (style, _) in enumerate(shown)]  # fmt: skip
    rows = [(label, [to_image(picture) for picture in take(bundle, model, shots, plan.seed)])
            for label, model in (("before", open_model(plan.model_path)), *((run, final[run]) for run in RUNS))]  # fmt: skip
    columns = [f"{STYLE_BY_NAME[style].display_name}\n{role}" for style, role in shown]
    grid = labelled_grid(f"Before and after {last} request(s), equal seeds", columns, rows, cell=108)
    panels = {
        title: [Line(run, [(int(k), figures[key]) for k, figures in runs[run]["after"].items()]) for run in RUNS]
        for title, key in (
            ("UA (forgotten)", "ua"),
            ("IRA declared", "ira_declared"),
            ("IRA hidden", "ira_hidden"),
            ("CRA (objects)", "cra"),
        )
    }
    curves = chart(f"{last} request(s) one after another", panels, "request")
    written = {"pictures": free_path(out / "before-after.png"), "chart": free_path(out / "chart.png")}
    grid.save(written["pictures"])
    curves.save(written["chart"])
    written["checkpoint"] = save_checkpoint(final["recommended"], out / f"minicanvas-forgot-{last}.safetensors")
    return written
