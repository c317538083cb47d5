"""Forgets one request and writes a checkpoint."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..audits.memorization import (
    MEMORIZATION,
    memorization_request,
    pixel_correlation,
    read_paraphrases,
    read_picture,
)
from ..base.errors import ConfigError
from ..concepts.concept import Concept
from ..concepts.parsing import parse_concept
from ..history.unlearn_model import UnlearnModel
from ..models.network import Network
from ..models.recognize import detect_family
from ..requests.request import Request
from ..requests.resolve import Overrides, adapt, resolve
from .common import ProgressLine, add_command, check_can_write, say, usable_device, write_json


def add(commands: Any) -> None:
    """Adds the command to argparse's group."""
    from ..minicanvas.models import CHECKPOINT_PATH
    from ..training.compute import Compute

    parser = add_command(
        commands, "unlearn", run, "Forget one concept (or several at once) and write an edited checkpoint."
    )
    parser.add_argument("target", nargs="+", help='what to forget, such as "Candy Stripes"')
    parser.add_argument(
        "--model", type=Path, default=CHECKPOINT_PATH, help="checkpoint to start from; an edited one goes on"
    )
    parser.add_argument(
        "--pretrained",
        type=Path,
        help="the file an edited checkpoint was made from, to measure drift from there",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="vocab.json and merges.txt of CLIP, for Stable Diffusion",
    )
    parser.add_argument(
        "--device", default="cpu", help="where to train, as PyTorch names it: cpu, cuda, cuda:1, mps"
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
        "--compile", action="store_true", help="compile the network first, which takes minutes"
    )
    parser.add_argument("--kind", default="style", help="style, object, celebrity, character or memorized")
    parser.add_argument(
        "--anchor",
        default="",
        help="word that takes an object's place; another caption for a memorized picture",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="the memorized picture that the target is the caption of"
    )
    parser.add_argument(
        "--paraphrases",
        type=Path,
        metavar="FILE",
        help="other captions for it, one a line: those that draw it too are forgotten, the others become "
        "the anchors; a recipe of its own takes the preset's place",
    )
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="CONCEPT", help="what is declared as to be kept"
    )
    parser.add_argument(
        "--auxiliary",
        metavar="LIST",
        help="shipped names to keep too: styles, objects, public_figures or scenes, or auto, all that suit "
        "the target",
    )
    parser.add_argument(
        "--preset", default="recommended", help="named combination of method and regularizers"
    )
    parser.add_argument("--iterations", type=int, help="instead of the preset's")
    parser.add_argument("--learning-rate", type=float, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the step")
    parser.add_argument(
        "--evaluate-every",
        type=int,
        metavar="N",
        help="measure every N updates, stop when the target is gone, and keep the best weights; MiniCanvas "
        "only",
    )
    parser.add_argument("--out", type=Path, help="file to write; an existing one is never overwritten")

    parser.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="keep the finished step there, and the state of an unfinished one: the same command then goes "
        "on where it was stopped",
    )


def run(arguments: argparse.Namespace) -> None:
    from ..audits.classification import classifier_of
    from ..files.paths import check_writable
    from ..models.load_diffusers import NetworkCache
    from ..output.checkpoint import open_model, save_checkpoint
    from ..store.anchors import AnchorStore
    from ..store.steps import StepStore
    from ..training.callbacks import Callbacks
    from ..training.compute import Compute
    from ..training.step import run_step

    is_memorized = arguments.picture is not None
    if is_memorized != (arguments.paraphrases is not None) or (is_memorized and len(arguments.target) != 1):
        raise ConfigError(
            "A memorized picture needs its caption as the only target, --picture and --paraphrases; give "
            "all three."
        )
    resolved = (_memorization if is_memorized else _plain)(arguments)
    out = arguments.out or _default_file(arguments)
    check_can_write(out, arguments.json)
    if arguments.store is not None:
        check_writable(arguments.store)
    compute = Compute(arguments.dtype, arguments.checkpointing, arguments.compile)
    device = usable_device(arguments.device)
    model, networks = open_model(arguments.model, arguments.pretrained), NetworkCache(arguments.tokenizer)
    request = resolved(model, lambda: networks.get(model.source, device, compute.dtype_on(device)))
    measure = None
    if request.training.evaluate_every:
        measure = classifier_of(model.family).measure_for(request)
    show = ProgressLine()
    train = partial(
        run_step,
        model,
        request,
        device=device,
        networks=networks,
        callbacks=Callbacks(
            on_progress=lambda p: show(p.iteration / p.iterations, p.seconds_left), on_message=show.tell
        ),
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
    say(f"forgot {', '.join(c.name for c in request.concepts)} in {report.record.seconds:.1f} s{note}")
    for name, value in report.figures.items():
        say(f"{name.replace('_', ' ')}: {value:.3g}")
    say(f"checkpoint: {path.resolve()}")
    figures = {"seconds": report.record.seconds, "losses": report.losses, **report.figures}
    write_json(arguments.json, {"checkpoint": str(path.resolve()), **figures})


def _overrides(arguments: argparse.Namespace) -> Overrides:
    given = {name: getattr(arguments, name) for name in ("iterations", "learning_rate", "evaluate_every")}
    training = {name: value for name, value in given.items() if value is not None}
    parts = {} if arguments.auxiliary is None else {"projection": {"auxiliary": arguments.auxiliary}}
    return Overrides(training=training, parts=parts, seed=arguments.seed)


def _kept(arguments: argparse.Namespace) -> list[Concept]:
    named = [parse_concept(name, arguments.kind) for name in arguments.keep]
    return [Concept(concept.target, concept.kind) for concept in named]


def _plain(arguments: argparse.Namespace) -> Callable[..., Request]:
    """What makes the request of a preset; all that can be wrong with the options is said before it is
    called."""
    targets = [parse_concept(target, arguments.kind, arguments.anchor) for target in arguments.target]
    wanted = arguments.preset, detect_family(arguments.model), targets, _kept(arguments)
    request = resolve(*wanted, _overrides(arguments))
    return lambda model, network: request


def _memorization(arguments: argparse.Namespace) -> Callable[..., Request]:
    """What makes the request for a memorized image; it has to draw images first."""
    similarity = pixel_correlation(read_picture(arguments.picture))
    paraphrases, keep = read_paraphrases(arguments.paraphrases), _kept(arguments)
    caption = Concept(arguments.target[0], "memorized").name
    adapt(MEMORIZATION, detect_family(arguments.model), _overrides(arguments))

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
