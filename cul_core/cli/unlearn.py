"""The command `unlearn`: runs one request and writes an edited checkpoint."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..audits.memorization import (
    MEMORIZATION,
    memorization_request,
    pixel_correlation,
    read_image,
    read_paraphrases,
)
from ..base.errors import CheckpointError, ConfigError, ModelError
from ..concepts.concept import Concept
from ..concepts.parsing import parse_concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from ..models.recognize import detect_family
from ..models.source import PREDICTIONS
from ..requests.request import Request
from ..requests.resolve import Overrides, adapt, resolve
from ..store.steps import KEPT, Outcome, StepStore
from ..training.data_parallel import Processes
from .common import (
    ProgressLine,
    add_command,
    add_lora,
    add_tokenizer,
    check_can_write,
    check_within,
    say,
    usable_device,
    write_json,
    write_lora,
)

_RESCUE = "kept-steps"
"""Folder for a finished step whose checkpoint could not be written."""


def add(commands: Any) -> None:
    """Add the command to argparse's group."""
    from ..minicanvas.models import CHECKPOINT_PATH
    from ..output.checkpoint import ROUNDINGS
    from ..training.compute import Compute

    parser = add_command(
        commands, "unlearn", run, "Forget one concept, or several together, and write an edited checkpoint."
    )
    parser.add_argument("target", nargs="+", help='concept to forget, such as "Candy Stripes"')
    parser.add_argument(
        "--model",
        type=Path,
        default=CHECKPOINT_PATH,
        help="checkpoint to start from; an edited one is edited further",
    )
    parser.add_argument(
        "--pretrained",
        type=Path,
        help="the checkpoint that an edited one was made from; drift is then measured from it",
    )
    add_tokenizer(parser)
    parser.add_argument(
        "--device", default="cpu", help="PyTorch's name of the device to train on: cpu, cuda, cuda:1, mps"
    )
    for field in fields(Compute):
        if field.name in ("dtype", "checkpointing"):
            parser.add_argument(
                f"--{field.name}",
                choices=field.metadata["choices"],
                default=field.default,
                help=field.metadata["help"],
            )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network first; this takes minutes"
    )
    parser.add_argument(
        "--kind",
        default="style",
        help="kind of the targets: style, object, celebrity, character or memorized",
    )
    parser.add_argument(
        "--anchor",
        default="",
        help="replaces the target in prompts: a word for an object, another caption for a memorized image",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="the memorized image; the target is its caption"
    )
    parser.add_argument(
        "--paraphrases",
        type=Path,
        metavar="FILE",
        help="other captions of the memorized image, one a line: captions that reproduce it are forgotten "
        "too, the others are the anchors; a recipe of its own replaces the preset",
    )
    parser.add_argument("--keep", nargs="*", default=[], metavar="CONCEPT", help="concepts to keep")
    parser.add_argument(
        "--auxiliary",
        metavar="LIST",
        help="list of shipped names to keep too: styles, objects, public_figures, scenes, or auto for those "
        "that suit the target",
    )
    parser.add_argument(
        "--preset", default="recommended", help="combination of method, regularizers and training settings"
    )
    parser.add_argument("--iterations", type=int, help="number of updates; the preset's if not given")
    parser.add_argument("--learning-rate", type=float, help="the preset's if not given")
    parser.add_argument("--seed", type=int, default=0, help="seed of the step")
    parser.add_argument(
        "--evaluate-every",
        type=int,
        metavar="N",
        help="measure every N updates, stop when the target is forgotten, and keep the best weights; "
        "MiniCanvas only",
    )
    parser.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        default="auto",
        help="what the model predicts; auto: as its file says",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="auto",
        help="rounding of edited weights to the file's precision",
    )
    parser.add_argument(
        "--anchor-steps", type=int, help="sampling steps of an anchor image; the preset's if not given"
    )
    parser.add_argument(
        "--anchor-guidance",
        type=float,
        help="guidance scale of the anchor images; 1 is none, as distilled models need it",
    )
    parser.add_argument("--out", type=Path, help="file to write; an existing file is never overwritten")
    add_lora(parser)
    parser.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="folder for finished steps and the state of unfinished ones: the same command then resumes",
    )


def run(arguments: argparse.Namespace) -> None:
    from ..audits.classification import classifier_of
    from ..files.paths import check_writable
    from ..models.load_diffusers import NetworkCache
    from ..output.checkpoint import open_model, save_checkpoint
    from ..training.callbacks import Callbacks
    from ..training.compute import Compute
    from ..training.data_parallel import joined_processes, own_device
    from ..training.step import run_step

    is_memorized = arguments.picture is not None
    if is_memorized != (arguments.paraphrases is not None) or (is_memorized and len(arguments.target) != 1):
        raise ConfigError(
            "A memorized image needs its caption as the only target, --picture and --paraphrases; give all "
            "three."
        )
    resolved = (_memorization if is_memorized else _plain)(arguments)
    out = arguments.out or _default_file(arguments)
    check_can_write(out, arguments.lora, arguments.json)
    check_within("--lora-rank", arguments.lora_rank, 1, 1024)
    if arguments.store is not None:
        check_writable(arguments.store)
    processes = joined_processes()
    show = ProgressLine(is_silent=processes.rank > 0)
    compute = Compute(arguments.dtype, arguments.checkpointing, arguments.compile)
    device = usable_device(own_device(arguments.device))
    model, networks = (
        open_model(arguments.model, arguments.pretrained, arguments.prediction),
        NetworkCache(arguments.tokenizer),
    )
    check_can_write(out, size=model.source.size)
    if model.family.is_distilled:
        show.tell(
            f"{model.source.name!r} looks like a distilled model: its anchor pictures are drawn in "
            "few steps without guidance; --anchor-steps and --anchor-guidance change that."
        )
    request = resolved(model, lambda: networks.get(model.source, device, compute.dtype_on(device)))
    measure = None
    if request.training.evaluate_every:
        measure = classifier_of(model.family).measure_for(request)
    train = partial(
        run_step,
        model,
        request,
        device=device,
        networks=networks,
        callbacks=Callbacks(
            on_progress=lambda p: show(p.iteration / p.iterations, p.seconds_left),
            on_message=show.tell,
            on_stage=show.stage,
        ),
        measure=measure,
        compute=compute,
        processes=processes,
    )
    try:
        if processes.rank:
            if processes.told(bool):
                train()
            return
        outcome = _outcome(arguments.store, model, request, _announced(train, processes), show.tell)
        if outcome.note.startswith(KEPT):
            processes.told(lambda: False)
    finally:
        processes.close()
    edited, report, rounding = outcome.model, outcome.report, []
    try:
        path = save_checkpoint(edited, out, rounding=arguments.rounding, on_message=rounding.append)
    except (CheckpointError, ModelError) as error:
        folder = arguments.store if outcome.is_kept else _rescued(model, request, outcome)
        raise CheckpointError(f"{error} {_how_to_retry(folder)}") from error
    done = "forgot" if report.record.has_changed else "nothing changed for"
    names = ", ".join(concept.name for concept in request.concepts)
    say(f"{done} {names} in {report.record.seconds:.1f} s{outcome.note}")
    for name, value in report.figures.items():
        say(f"{name.replace('_', ' ')}: {value:.3g}")
    for sentence in rounding:
        say(sentence)
    say(f"checkpoint: {path.resolve()}")
    figures = {"seconds": report.record.seconds, "losses": report.losses, **report.figures}
    lora = write_lora(edited, arguments)
    write_json(arguments.json, {"checkpoint": str(path.resolve()), **figures, **lora})


def _announced(train: Callable[..., Any], processes: Processes) -> Callable[..., Any]:
    """`train`, of which the other processes are told before it begins, so that they take part."""

    def told(**kept: Any) -> Any:
        processes.told(lambda: True)
        return train(**kept)

    return told


def _outcome(
    folder: Path | None,
    model: UnlearnModel,
    request: Request,
    train: Callable[..., Any],
    tell: Callable[[str], None],
) -> Outcome:
    """The step, trained or from the store in `folder`."""
    from ..files.locks import Waiting
    from ..store.anchors import AnchorStore

    if folder is None:
        return Outcome(*train(store=AnchorStore()), is_kept=False)
    store = StepStore(folder)
    return store.get_or_train(
        model,
        request,
        lambda state_store: train(store=store.anchors, state_store=state_store, text_sums=store.texts),
        Waiting(f"Another process trains this step in {str(folder)!r}", tell),
    )


def _rescued(model: UnlearnModel, request: Request, outcome: Outcome) -> Path | None:
    """The first of some folders whose drive keeps the finished step; None if none does."""
    for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        try:
            StepStore(folder / _RESCUE).put(model, request, outcome.model, outcome.report)
            return folder / _RESCUE
        except CheckpointError:
            continue
    return None


def _how_to_retry(folder: Path | None) -> str:
    if folder is None:
        return "The finished step could be kept nowhere."
    return (
        f"The finished step is kept in {str(folder)!r}: the same command with --store {str(folder)!r} and "
        "another --out writes it without training."
    )


def _overrides(arguments: argparse.Namespace) -> Overrides:
    names = ("iterations", "learning_rate", "evaluate_every", "anchor_steps", "anchor_guidance")
    options = {name: getattr(arguments, name) for name in names}
    training = {name: value for name, value in options.items() if value is not None}
    parts = {} if arguments.auxiliary is None else {"projection": {"auxiliary": arguments.auxiliary}}
    return Overrides(training=training, parts=parts, seed=arguments.seed)


def _kept(arguments: argparse.Namespace) -> list[Concept]:
    named = [parse_concept(name, arguments.kind) for name in arguments.keep]
    return [Concept(concept.target, concept.kind) for concept in named]


def _plain(arguments: argparse.Namespace) -> Callable[..., Request]:
    """A function that returns the request of a preset; wrong options are refused before it is called."""
    targets = [parse_concept(target, arguments.kind, arguments.anchor) for target in arguments.target]
    family = detect_family(arguments.model, arguments.prediction)
    request = resolve(arguments.preset, family, targets, _kept(arguments), _overrides(arguments))
    return lambda model, network: request


def _memorization(arguments: argparse.Namespace) -> Callable[..., Request]:
    """A function that returns the request for a memorized image; the function samples images first."""
    similarity = pixel_correlation(read_image(arguments.picture))
    paraphrases, keep = read_paraphrases(arguments.paraphrases), _kept(arguments)
    caption = Concept(arguments.target[0], "memorized").name
    adapt(MEMORIZATION, detect_family(arguments.model, arguments.prediction), _overrides(arguments))

    def make(model: UnlearnModel, network: Callable[[], Network]) -> Request:
        request, rates = memorization_request(
            network(),
            caption,
            paraphrases,
            similarity,
            retain=keep,
            seed=arguments.seed,
            overrides=_overrides(arguments),
        )
        for prompt, rate in rates.items():
            say(f"{rate:4.0%} copies: {prompt}")
        return request

    return make


def _default_file(arguments: argparse.Namespace) -> Path:
    names = [parse_concept(target, arguments.kind, arguments.anchor).name for target in arguments.target]
    joined = re.sub(r"[^\w-]+", "_", "-".join(names))
    beginning = os.fsencode(f"{arguments.model.stem[:100]}-without-{joined}")[:180].decode(errors="ignore")
    return Path(f"{beginning}.safetensors")
