"""The command line: `python -m cul_core demo | unlearn | merge | evaluate | benchmark | inspect | store`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .base.errors import Cancelled, ConfigError, CulError, brief_repr

if TYPE_CHECKING:
    import torch

_EXIT_ERROR = 2


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _ProgressLine:
    """One line on a terminal, rewritten in place; in a log, a line for every tenth of the way."""

    def __init__(self):
        self._last_tenth = -1

    def __call__(self, share: float, seconds_left: float) -> None:
        text = f"{100 * share:3.0f} %, {int(seconds_left // 60)}:{int(seconds_left % 60):02d} left"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{text}   " + ("\n" if share >= 1 else ""))
        elif int(10 * share) > self._last_tenth:
            self._last_tenth = int(10 * share)
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def tell(self, text: str) -> None:
        """A message on a line of its own."""
        sys.stderr.write(("\r" if sys.stderr.isatty() else "") + text + "\n")
        sys.stderr.flush()


def _write_json(path: Path | None, values: dict) -> None:
    if path is not None:
        from .files.atomic_write import write_atomically

        data = (json.dumps(values, indent=1) + "\n").encode()
        write_atomically(path, lambda file: file.write(data))


def _can_write(*files: Path | None) -> None:
    """See `check_name` and `check_writable`; before hours of work depend on it."""
    from .files.paths import check_name, check_writable

    for file in files:
        if file is not None:
            check_name(file)
            check_writable(file.parent)


def _within(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{option} is {value}; give a number between {low} and {high}.")


def _usable_device(name: str) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=name).device
    # unknown name, no such device, or PyTorch built without it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"--device is {brief_repr(name)}, which PyTorch cannot use here ({brief_repr(reason)}); give "
            "cpu, or a device of this machine."
        ) from error


def _demo(arguments: argparse.Namespace) -> None:
    from .audits.classifier_scores import table
    from .files.paths import check_writable
    from .minicanvas.demo import run_demo

    _within("--requests", arguments.requests, 1, 12)
    _within("--workers", 1 if arguments.workers is None else arguments.workers, 1, 64)
    check_writable(arguments.out)
    _can_write(arguments.json)
    result = run_demo(
        arguments.out,
        requests=arguments.requests,
        seed=arguments.seed,
        order=arguments.order,
        workers=arguments.workers,
        on_progress=_ProgressLine(),
    )
    runs = result["runs"]
    rows = [("untouched", result["base"])]
    rows += [(f"{run} after {k}", runs[run]["after"][k]) for k in runs["plain"]["after"] for run in runs]
    _say(table(rows))
    for run, values in runs.items():
        _say(f"{run}: {values['seconds_per_request']:.1f} s per request")
    for name, path in result["files"].items():
        _say(f"{name}: {path}")
    _write_json(arguments.json, result)


def _unlearn(arguments: argparse.Namespace) -> None:
    from .audits.memorization import (
        MEMORIZATION,
        memorization_request,
        pixel_correlation,
        read_paraphrases,
        read_picture,
    )
    from .concepts.captions import anchor_prompts
    from .concepts.concept import Concept
    from .concepts.parsing import parse_concept
    from .files.paths import check_writable
    from .minicanvas.family import MINI
    from .models.load_diffusers import NetworkCache
    from .models.recognize import detect_family
    from .output.checkpoint import open_model, save_checkpoint
    from .regularizers.projection import ProjectionConfig
    from .requests.presets import preset
    from .store.anchors import AnchorStore
    from .store.steps import StepStore
    from .training.callbacks import Callbacks
    from .training.compute import Compute
    from .training.step import run_step

    is_picture = arguments.picture is not None
    if is_picture != (arguments.paraphrases is not None) or (is_picture and len(arguments.target) != 1):
        raise ConfigError(
            "A memorized picture needs its caption as the only target, --picture and --paraphrases; give "
            "all three."
        )
    chosen = (MEMORIZATION if is_picture else preset(arguments.preset)).for_family(
        detect_family(arguments.model)
    )
    given = {name: getattr(arguments, name) for name in ("iterations", "learning_rate", "evaluate_every")}
    overrides = {name: value for name, value in given.items() if value is not None}
    chosen = replace(chosen, training=replace(chosen.training, **overrides))
    if arguments.auxiliary is not None:
        if not any(isinstance(part, ProjectionConfig) for part in chosen.regularizers):
            raise ConfigError(
                f"--auxiliary is {brief_repr(arguments.auxiliary)}, which preset {arguments.preset!r} does "
                "not use; leave it out, or choose a preset with gradient projection."
            )
        chosen = replace(
            chosen,
            regularizers=tuple(
                replace(part, auxiliary=arguments.auxiliary) if isinstance(part, ProjectionConfig) else part
                for part in chosen.regularizers
            ),
        )
    if is_picture:
        concepts = [Concept(arguments.target[0], "memorized")]
        similarity, paraphrases = (
            pixel_correlation(read_picture(arguments.picture)),
            read_paraphrases(arguments.paraphrases),
        )
    else:
        concepts = [parse_concept(target, arguments.kind, arguments.anchor) for target in arguments.target]
    kept = [parse_concept(name, arguments.kind) for name in arguments.keep]
    keep = [Concept(concept.target, concept.kind) for concept in kept]
    names = re.sub(r"[^\w-]+", "_", "-".join(concept.name for concept in concepts))
    beginning = os.fsencode(f"{arguments.model.stem[:100]}-without-{names}")[:180].decode(errors="ignore")
    out = arguments.out or Path(f"{beginning}.safetensors")
    _can_write(out, arguments.json)
    if arguments.store is not None:
        check_writable(arguments.store)
    compute = Compute(arguments.dtype, arguments.checkpointing, arguments.compile)
    device = _usable_device(arguments.device)
    model = open_model(arguments.model, arguments.pretrained)
    show = _ProgressLine()
    networks = NetworkCache(arguments.tokenizer)
    if is_picture:
        network = networks.get(model.source, device, compute.dtype_on(device))
        request, rates = memorization_request(
            network,
            concepts[0].name,
            paraphrases,
            similarity,
            retain=keep,
            seed=arguments.seed,
            chosen=chosen,
        )
        for prompt, rate in rates.items():
            _say(f"{rate:4.0%} copies: {prompt}")
    else:
        prompts = anchor_prompts(model.family, concepts)
        request = chosen.request(concepts, retain=keep, anchor_prompts=prompts, seed=arguments.seed)
    watch = Callbacks(
        on_progress=lambda p: show(p.iteration / p.iterations, p.seconds_left), on_message=show.tell
    )
    measure = None
    if request.training.evaluate_every and model.family == MINI:
        from .minicanvas.judge import measure_for

        measure = measure_for(request)
    train = partial(
        run_step,
        model,
        request,
        device=device,
        networks=networks,
        callbacks=watch,
        measure=measure,
        compute=compute,
    )
    note = ""
    if arguments.store is None:
        edited, report = train(store=AnchorStore())
    else:
        store = StepStore(arguments.store)
        outcome = store.get_or_train(
            model, request, lambda state_store: train(store=store.anchors, state_store=state_store)
        )
        edited, report, note = outcome.model, outcome.report, outcome.note
    path = save_checkpoint(edited, out)
    _say(f"forgot {', '.join(c.name for c in request.concepts)} in {report.record.seconds:.1f} s{note}")
    for name, value in report.figures.items():
        _say(f"{name.replace('_', ' ')}: {value:.3g}")
    _say(f"checkpoint: {path.resolve()}")
    _write_json(
        arguments.json,
        {
            "checkpoint": str(path.resolve()),
            "seconds": report.record.seconds,
            "losses": report.losses,
            **report.figures,
        },
    )


def _merge(arguments: argparse.Namespace) -> None:
    from .base.errors import ModelError
    from .history.step_record import read_history
    from .mergers import MERGERS
    from .mergers.merge import merge
    from .models.source import source_of
    from .output.checkpoint import open_model, save_checkpoint
    from .output.report import merge_text

    entry = MERGERS.get(arguments.how)
    given = {
        option: getattr(arguments, option)
        for option in ("strength", "weights", "keep_fraction", "trim", "function")
    }
    values = {option: value for option, value in given.items() if value is not None}
    for option in values:
        if option not in {field.name for field in fields(entry.config)}:
            raise ConfigError(
                f"--{option.replace('_', '-')} is {brief_repr(values[option])}, which {entry.name} does not "
                "use; leave it out."
            )
    config = entry.config.from_json(values)
    _can_write(arguments.out, arguments.json)
    original = source_of(arguments.pretrained)
    for file in arguments.file:
        _, made_from = read_history(file)
        if made_from is None:
            raise ModelError(
                f"{file.name!r} is no checkpoint that continual-unlearning has edited; merge only such files."
            )
        if made_from["sha256"] != original.sha256:
            raise ModelError(
                f"{file.name!r} was made from {brief_repr(made_from['name'])} and not from "
                f"{original.path.name!r}; give the file that all of them were made from as --pretrained."
            )
    merged = merge([open_model(file, original.path) for file in arguments.file], config)
    path = save_checkpoint(merged, arguments.out)
    record = merged.history[-1]
    _say(merge_text(merged))
    _say(f"checkpoint: {path.resolve()}")
    _write_json(
        arguments.json, {"checkpoint": str(path.resolve()), "seconds": record.seconds, **record.request}
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from .audits.classifier_scores import table
    from .base.errors import ConceptError, ModelError
    from .minicanvas.family import MINI
    from .minicanvas.judge import Judge, evaluate
    from .minicanvas.suites import suite_of
    from .minicanvas.world import OBJECTS, STYLE_BY_NAME
    from .models.load_diffusers import NetworkCache
    from .output.checkpoint import open_model

    _within("--pictures", arguments.pictures, 1, 1000)
    model = open_model(arguments.model)
    if model.family != MINI:
        raise ModelError(
            f"{arguments.model.name!r} is a {model.family.display_name} checkpoint, for which there is no "
            "classifier; choose a MiniCanvas checkpoint."
        )
    asked = arguments.target or [concept["target"] for concept in model.forgotten]
    suite, targets = suite_of(asked)
    unknown = [
        name
        for name in arguments.target or ()
        if name not in [target.replace("_", " ") for target in targets] + targets
    ]
    if unknown:
        known = ", ".join(OBJECTS if suite.domain == "object" else STYLE_BY_NAME)
        raise ConceptError(
            f"MiniCanvas has no {suite.domain} {brief_repr(unknown[0])} to score; choose among {known}, of "
            "one kind at a time."
        )
    show, total = _ProgressLine(), len(suite.shots(targets, arguments.pictures))
    scores = evaluate(
        NetworkCache().get(model.source),
        model,
        Judge(),
        targets,
        seed=arguments.seed,
        suite=suite,
        per_cell=arguments.pictures,
        on_batch=lambda done: show(min(done / total, 1), 0.085 * max(total - done, 0)),
    )
    values = scores.to_json()
    _say(table([(arguments.model.name, values)]))
    _say(
        "95 % intervals: "
        + ", ".join(f"{name} {low:.1f}-{high:.1f}" for name, (low, high) in scores.intervals.items())
    )
    for name, row in scores.per_concept.items():
        _say(
            f"{name:28}{row['role']:10} style {row['style']:5.1f}  object {row['object']:5.1f}  "
            f"({row['pictures']} pictures)"
        )
    _write_json(arguments.json, values)


def _benchmark(arguments: argparse.Namespace) -> None:
    from .files.paths import check_writable
    from .minicanvas.benchmark import Cell, grid, result_table, run_benchmark, write_figure
    from .minicanvas.suites import SUITES

    suite = SUITES[arguments.suite]
    _within("--requests", arguments.requests or suite.longest, 1, suite.longest)
    _within("--pictures", arguments.pictures, 1, 100)
    cells = [Cell.parse(name) for name in arguments.cells] if arguments.cells else grid()
    check_writable(arguments.out)

    def show(done: int, total: int, name: str) -> None:
        sys.stderr.write(f"{done} of {total} runs{f': {name}' if name else ''}\n")

    lines = run_benchmark(
        arguments.out,
        cells=cells,
        seeds=arguments.seeds,
        suite=suite,
        orders=arguments.orders,
        requests=arguments.requests,
        pictures=arguments.pictures,
        workers=arguments.workers,
        on_progress=show,
    )
    _say(result_table(lines, arguments.compare == "paper"))
    figure = write_figure(lines, arguments.out)
    _say(f"results: {(arguments.out / 'results.jsonl').resolve()}\nfigure: {figure.resolve()}")
    _write_json(arguments.json, {"lines": lines})


def _store(arguments: argparse.Namespace) -> None:
    from .store.steps import PARTS, StepStore

    if not arguments.folder.is_dir():
        raise ConfigError(
            f"There is no folder {str(arguments.folder)!r}; give the one that unlearn --store or a "
            "benchmark "
            "has made."
        )
    store = StepStore(arguments.folder)
    if arguments.clear:
        _say(store.clear(*(PARTS if arguments.clear == "all" else [arguments.clear])))
    _say(store.describe())
    _write_json(
        arguments.json, {part: {path.name: size for _, size, path in store.files(part)} for part in PARTS}
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from .history.step_record import read_history
    from .output.report import history_text

    history, source = read_history(arguments.file)
    _say(history_text(arguments.file.name, history, source))
    _write_json(arguments.json, {"source": source, "history": [vars(record) for record in history]})


def _parser() -> argparse.ArgumentParser:
    from .minicanvas.models import CHECKPOINT_PATH
    from .training.compute import Compute

    parser = argparse.ArgumentParser(
        prog="cul_core", description="Make a text-to-image model forget, one request after another."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
        return sub

    demo = command(
        "demo",
        _demo,
        "Forget styles of MiniCanvas one after another, plainly and with the recommended preset, and "
        "compare.",
    )
    demo.add_argument("--requests", type=int, default=12, help="how many styles, 1 to 12")
    demo.add_argument(
        "--order", choices=("a", "b"), default="a", help="one of two fixed orders of the requests"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of training and evaluation")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for pictures and checkpoint")
    demo.add_argument("--workers", type=int, help="processes, of one thread each; one per core if not given")

    unlearn = command(
        "unlearn", _unlearn, "Forget one concept (or several at once) and write an edited checkpoint."
    )
    unlearn.add_argument("target", nargs="+", help='what to forget, such as "Candy Stripes"')
    unlearn.add_argument(
        "--model", type=Path, default=CHECKPOINT_PATH, help="checkpoint to start from; an edited one goes on"
    )
    unlearn.add_argument(
        "--pretrained",
        type=Path,
        help="the file an edited checkpoint was made from, to measure drift from there",
    )
    unlearn.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="vocab.json and merges.txt of CLIP, for Stable Diffusion",
    )
    unlearn.add_argument(
        "--device", default="cpu", help="where to train, as PyTorch names it: cpu, cuda, cuda:1, mps"
    )
    for field in fields(Compute):
        if field.name in ("dtype", "checkpointing"):
            unlearn.add_argument(
                f"--{field.name}",
                choices=field.metadata["choices"],
                default=field.default,
                help=field.metadata["help"],
            )
    unlearn.add_argument(
        "--compile", action="store_true", help="compile the network first, which takes minutes"
    )
    unlearn.add_argument("--kind", default="style", help="style, object, celebrity, character or memorized")
    unlearn.add_argument(
        "--anchor",
        default="",
        help="word that takes an object's place; another caption for a memorized picture",
    )
    unlearn.add_argument(
        "--picture", type=Path, metavar="FILE", help="the memorized picture that the target is the caption of"
    )
    unlearn.add_argument(
        "--paraphrases",
        type=Path,
        metavar="FILE",
        help="other captions for it, one a line: those that draw it too are forgotten, the others become "
        "the anchors; a recipe of its own takes the preset's place",
    )
    unlearn.add_argument(
        "--keep", nargs="*", default=[], metavar="CONCEPT", help="what is declared as to be kept"
    )
    unlearn.add_argument(
        "--auxiliary",
        metavar="LIST",
        help="shipped names to keep too: styles, objects, public_figures or scenes, or auto, all that suit "
        "the target",
    )
    unlearn.add_argument(
        "--preset", default="recommended", help="named combination of method and regularizers"
    )
    unlearn.add_argument("--iterations", type=int, help="instead of the preset's")
    unlearn.add_argument("--learning-rate", type=float, help="instead of the preset's")
    unlearn.add_argument("--seed", type=int, default=0, help="seed of the step")
    unlearn.add_argument(
        "--evaluate-every",
        type=int,
        metavar="N",
        help="measure every N updates, stop when the target is gone, and keep the best weights; MiniCanvas "
        "only",
    )
    unlearn.add_argument("--out", type=Path, help="file to write; an existing one is never overwritten")

    unlearn.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="keep the finished step there, and the state of an unfinished one: the same command then goes "
        "on where it was stopped",
    )

    merge = command(
        "merge",
        _merge,
        "Merge edited checkpoints of one file into one that has forgotten what each of them has.",
    )
    merge.add_argument("file", nargs="+", type=Path, help="edited checkpoints to merge")
    merge.add_argument(
        "--pretrained", type=Path, default=CHECKPOINT_PATH, help="the file that all of them were made from"
    )
    merge.add_argument("--how", default="ties", help="uniform, task_arithmetic or ties")
    merge.add_argument(
        "--strength", type=float, help="multiplies the merged change; for ties and task_arithmetic"
    )
    merge.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="WEIGHT",
        help="a factor per file; for ties and task_arithmetic",
    )
    merge.add_argument(
        "--keep-fraction", type=float, help="share of each file's changes that is kept, the largest; for ties"
    )
    merge.add_argument("--trim", help="tensor or global: what that share is of; for ties")
    merge.add_argument("--function", help="mean, sum or max of the changes that agree in sign; for ties")
    merge.add_argument(
        "--out",
        type=Path,
        default=Path("merged.safetensors"),
        help="file to write; an existing one is never overwritten",
    )

    evaluate = command(
        "evaluate", _evaluate, "Score a MiniCanvas checkpoint: what is forgotten, what is left."
    )
    evaluate.add_argument("model", type=Path, help="checkpoint to score")
    evaluate.add_argument(
        "--target", nargs="*", help="forgotten styles; those of the file's history if not given"
    )
    evaluate.add_argument("--pictures", type=int, default=1, help="pictures per style and object")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the pictures")

    benchmark = command(
        "benchmark",
        _benchmark,
        "Measure every way of forgetting on MiniCanvas; goes on where an earlier run stopped.",
    )
    benchmark.add_argument(
        "--suite", choices=("styles", "objects"), default="styles", help="what is forgotten"
    )
    benchmark.add_argument(
        "--cells",
        nargs="*",
        metavar="CELL",
        help="presets, such as plain, or 'plain ties', 'plain simultaneous'; the paper's if not given",
    )
    benchmark.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2], help="seeds of training and evaluation"
    )
    benchmark.add_argument(
        "--orders",
        nargs="+",
        choices=("a", "b"),
        default=["a", "b"],
        help="fixed orders of the requests; the seeds take them in turn",
    )
    benchmark.add_argument("--requests", type=int, help="how many requests; all of the suite if not given")
    benchmark.add_argument("--pictures", type=int, default=1, help="pictures per style and object")
    benchmark.add_argument("--compare", choices=("paper",), help="print the paper's figures beside")
    benchmark.add_argument(
        "--workers", type=int, help="processes, of one thread each; one per core if not given"
    )
    benchmark.add_argument(
        "--out", type=Path, default=Path("benchmark"), help="folder for results, figure and finished steps"
    )

    store = command("store", _store, "Show what a store of finished and unfinished steps holds, or clear it.")
    store.add_argument("--folder", type=Path, default=Path("store"), help="the store")
    store.add_argument(
        "--clear",
        nargs="?",
        const="all",
        choices=("steps", "anchors", "states", "all"),
        help="what to remove from it; what a process is working on stays",
    )

    inspect = command(
        "inspect", _inspect, "Print what was forgotten in a file, when, how, and from which parent."
    )
    inspect.add_argument("file", type=Path, help="any file this package wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on stderr for an error a user can mend."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names are shown on any terminal
    try:
        arguments.run(arguments)
    except CulError as error:
        sys.stderr.write(f"error: {error}\n")
        return _EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {Cancelled('Cancelled; nothing was written.')}\n")
        return 130
    return 0
