"""Writes `files.zip` again, by the version of commit 67b9a72, the last that wrote format 1: run it with a
checkout of that commit on PYTHONPATH.

A mask of SelFT leaves nearly all values of the edits zero, so that they take little room.
"""

import json
import sys
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from cul_core.checkpoint import open_model, save_edits
from cul_core.config import TrainingConfig
from cul_core.errors import Cancelled

from cul_core.concepts import Concept
from cul_core.methods.esd import ESDConfig
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.regularizers.selft import SelFTConfig
from cul_core.store import StepStore
from cul_core.training import Callbacks, Request, run_step

HERE = Path(__file__).parent


def request_of(target, iterations=2):
    return Request(
        concepts=(Concept(target),),
        method=ESDConfig(trajectories=1, trajectory_steps=2),
        regularizers=(SelFTConfig(kept_fraction=0.01, states=2),),
        training=TrainingConfig(iterations=iterations, batch_size=2),
        anchor_prompts=("a house", "an image of a cat"),
        anchor_count=2,
    )


def train_with(model, request, state):
    return run_step(model, request, keeper=state)


def write(folder):
    store, model = StepStore(folder / "store", every_seconds=0), open_model(CHECKPOINT_PATH)
    requests = {"first": request_of("Candy_Stripes"), "second": request_of("Lava")}
    for request in requests.values():
        train = partial(train_with, model, request)
        model = store.get_or_train(model, request, train).model
    save_edits(model, folder / "edits.safetensors")
    requests["stopped"], updates = request_of("Denim", iterations=4), []
    callbacks = Callbacks(on_progress=updates.append, should_stop=lambda: len(updates) > 1)
    pretrained = open_model(CHECKPOINT_PATH)
    try:
        store.get_or_train(
            pretrained,
            requests["stopped"],
            lambda state: run_step(pretrained, requests["stopped"], keeper=state, callbacks=callbacks),
        )
    except Cancelled:
        pass
    about = {
        "requests": {name: request.to_json() for name, request in requests.items()},
        "history": [asdict(record) for record in model.history],
        "content_hash": model.content_hash,
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        write(Path(name))
        with zipfile.ZipFile(HERE / "files.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(Path(name).rglob("*")):
                if path.is_file() and path.suffix in (".safetensors", ".json"):
                    archive.write(path, path.relative_to(name).as_posix())
                    sys.stdout.write(f"{path.relative_to(name)} {path.stat().st_size}\n")
