"""Chains of six steps on MiniCanvas in processes that are killed at random moments, or refused their writes.

Run as a program it prints one JSON object. It is a process of its own because it forks, which only a process
of one thread may do: what takes long to load is loaded once, and every attempt is a fork of that.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from cul_core.concepts.concept import Concept
from cul_core.files import atomic_write, safetensors_format
from cul_core.files.safetensors_format import read_sealed
from cul_core.methods.conabl import ConAblConfig
from cul_core.methods.esd import ESDConfig
from cul_core.methods.sculpmem import SculpMemConfig
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.sampling import SamplerConfig
from cul_core.output.checkpoint import open_model, save_checkpoint
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.distillation import DistillationConfig
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.regularizers.weight_anchor import L2SPConfig
from cul_core.requests.request import Request
from cul_core.store import anchors
from cul_core.store import steps as stores
from cul_core.store.steps import StepStore, step_key
from cul_core.training import step as training
from cul_core.training.callbacks import Callbacks
from cul_core.training.step import run_step

TARGETS = ("Candy_Stripes", "Lava", "Frost", "Denim", "Blueprint", "Neon_Cyan")
PROMPTS = ("A star image.", "a house", "an image of a cat", "a picture of a boat")
PHASES = (
    "loading",
    "anchors",
    "writing anchors",
    "preparation",
    "updates",
    "writing a state",
    "writing a result",
    "evicting",
    "reading",
    "writing the checkpoint",
)
EVENTS = {
    "anchors": 4,
    "writing anchors": 12,
    "preparation": 5,
    "updates": 12,
    "writing a state": 80,
    "writing a result": 40,
    "evicting": 3,
    "reading": 6,
    "writing the checkpoint": 12,
}
"""Phases in which a process kills itself, and about how many events they have until the first step is
done."""
MOST_KILLS_A_CHAIN = 50


def requests() -> list[Request]:
    """Six steps that between them use every kind of state."""
    ours = ConAblConfig(teacher="pretrained")
    how = [
        (ours, (ProjectionConfig(),), {}),
        (ESDConfig(trajectories=1, trajectory_steps=2, refresh_every=2), (), {}),
        (SculpMemConfig(warm_up=1, interval=1, distillation=1.0), (), {}),
        (ours, (SelFTConfig(states=2),), {"evaluate_every": 2}),
        (ours, (DistillationConfig(trajectories=1, trajectory_steps=2, refresh_every=2),), {}),
        (ours, (L2SPConfig(),), {"schedule": "linear"}),
    ]
    return [
        Request(
            (Concept(target),),
            method,
            regularizers,
            TrainingConfig(iterations=3, batch_size=1, seed=number, **settings),
            retain=(Concept("Navy_Stripes"),),
            anchor_prompts=PROMPTS,
            anchor_count=24,
            anchor_sampler=SamplerConfig(steps=2),
            anchor_seed=number // 3,
        )
        for number, (target, (method, regularizers, settings)) in enumerate(zip(TARGETS, how, strict=True))
    ]


def measure(network, check):
    check()
    weight = network.weights("text_readers")[
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    ]
    return 50 + 10 * torch.tanh(weight.mean()).item(), 50.0


class Trouble:
    """What happens to a process: events are counted by the phase they happen in, and one of them may kill it
    or fail.

    Args:
        phase: shared with the parent, which wants to know in which phase the process died.
        kill_at: (phase, number of the event there) at which the process kills itself.
        fail_at: number of the write of any kind, from 0, that fails, and with it all that follow.
    """

    def __init__(self, phase: mmap.mmap, kill_at=None, fail_at=None, error=None):
        self._shared, self._kill_at, self._fail_at, self._error = phase, kill_at, fail_at, error
        self.events, self.writes = Counter(), 0

    def event(self) -> None:
        phase = PHASES[self._shared[0]]
        if (phase, self.events[phase]) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.events[phase] += 1

    def write(self, takes_space: bool, before_failing=lambda: None) -> None:
        """A call that changes the disk is about to be made; `before_failing` does half of it."""
        phase = PHASES[self._shared[0]]
        if (phase, self.events[phase]) == self._kill_at:
            before_failing()
        self.event()
        self.writes += 1
        if (
            self._fail_at is not None
            and self.writes > self._fail_at
            and (takes_space or self._error.errno != errno.ENOSPC)
        ):
            before_failing()
            raise self._error

    @contextmanager
    def during(self, phase: str):
        before, self._shared[0] = self._shared[0], PHASES.index(phase)
        self.event()
        try:
            yield
        finally:
            self._shared[0] = before

    def within(self, owner, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            with self.during(phase):
                return original(*args, **kwargs)

        self._set(owner, name, wrapped)

    def on_call(self, owner, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.write(name in ("replace", "fsync", "mkdir"))
            return original(*args, **kwargs)

        self._set(owner, name, wrapped)

    def install(self, set_attribute=setattr) -> None:
        """Wrap what the library calls; for good, unless `set_attribute` is a monkeypatch's."""
        self._set = set_attribute
        for owner, name, phase in (
            (anchors.AnchorStore, "anchor_latents", "anchors"),
            (anchors._AnchorFile, "write", "writing anchors"),
            (training, "train", "updates"),
            (stores.StepState, "save", "writing a state"),
            (stores.StepStore, "put", "writing a result"),
            (stores.StepStore, "_evict", "evicting"),
            (stores.StepStore, "get", "reading"),
            (stores.StepState, "load", "reading"),
        ):
            self.within(owner, name, phase)
        for name in ("replace", "fsync", "utime", "unlink", "mkdir"):
            self.on_call(os, name)
        make, open_handle = os.open, os.fdopen

        def make_file(path, *args, **kwargs):
            if str(path).endswith(atomic_write.LEFTOVER):
                self.write(True)
            return make(path, *args, **kwargs)

        self._set(os, "open", make_file)
        self._set(os, "fdopen", lambda *args, **kwargs: _File(open_handle(*args, **kwargs), self))


class _File:
    """A file whose writes and flushes are events; one that fails has done half of its work."""

    def __init__(self, file, trouble: Trouble):
        self._file, self._trouble = file, trouble

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data) -> int:
        def half() -> None:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()

        self._trouble.write(True, half)
        return self._file.write(data)

    def flush(self) -> None:
        self._trouble.write(True)
        self._file.flush()


class Place:
    """A store, a folder of outputs, and a log that survives its writers."""

    def __init__(self, folder: Path):
        self.store, self.out, self.log = folder / "store", folder / "out", folder / "log"
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, *words) -> None:
        with self.log.open("a") as log:  # never one of the wrapped calls
            log.write(json.dumps(words) + "\n")

    def said(self) -> list:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []


def run_chain(place: Place, networks: NetworkCache, trouble: Trouble, largest_bytes: int) -> None:
    """All six steps and the checkpoint, as far as they are not there; says what it does."""
    store = StepStore(place.store, largest_bytes, every_seconds=0)
    model = open_model(CHECKPOINT_PATH)
    notes = []
    for number, request in enumerate(requests()):

        def train(state_store, model=model, request=request, number=number):
            load = state_store.load

            def loaded(origin):
                state = load(origin)
                place.say("begins", number, state["iteration"] if state else 0)
                return state

            state_store.load = loaded
            with trouble.during("preparation"):
                callbacks = Callbacks(
                    on_progress=lambda progress: trouble.event(), should_stop=lambda: trouble.event() or False
                )
                result = run_step(
                    model,
                    request,
                    callbacks=callbacks,
                    store=store.anchors,
                    networks=networks,
                    measure=measure,
                    state_store=state_store,
                )
            place.say("trained", number)
            return result

        place.say("key", number, step_key(model, request))
        outcome = store.get_or_train(model, request, train)
        notes.append(outcome.note)
        model = outcome.model
    place.say("model", model.content_hash, notes)
    if not list(place.out.glob("*.safetensors")):
        with trouble.during("writing the checkpoint"):
            save_checkpoint(model, place.out / "edited.safetensors", on_chunk=trouble.event)
    place.say("done", model.content_hash)


def forked(phase: mmap.mmap, run) -> int:
    """Process id of a fork that runs `run` and ends."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException as error:
            logging.exception("%s", error)
        finally:
            os._exit(code)
    return child


class Harness:
    def __init__(self, folder: Path, seed: int):
        torch.set_num_threads(1)
        self.folder, self.random, self.phase = folder, random.Random(seed), mmap.mmap(-1, 1)
        self.problems: list[str] = []
        self.networks = NetworkCache()
        self.networks.get(open_model(CHECKPOINT_PATH).source)  # what takes long
        begun = time.monotonic()
        undisturbed = Place(folder / "undisturbed")
        self.attempt(undisturbed)
        self.seconds = time.monotonic() - begun
        said = undisturbed.said()
        self.expected = next(words[1] for words in said if words[0] == "done")
        self.writes = next(words[1] for words in said if words[0] == "writes")
        self.keys = {words[1]: words[2] for words in said if words[0] == "key"}
        self.checkpoint = self.tensor_bytes(undisturbed.out / "edited.safetensors")
        self.files = sorted((undisturbed.store / "steps").glob("*.safetensors"))
        self.bytes = sum(path.stat().st_size for path in undisturbed.store.rglob("*.safetensors"))

    @staticmethod
    def tensor_bytes(path: Path) -> bytes:
        """What a checkpoint holds but for its header, which says when it was made."""
        _, _, start = safetensors_format.read_header(path)
        return path.read_bytes()[start:]

    def attempt(self, place: Place, kill_at=None, after_seconds=None, **trouble) -> int:
        """Wait status of a process that runs the chain, killed or not."""
        self.phase[0] = 0

        def run() -> None:
            troubled = Trouble(self.phase, kill_at, **trouble)
            troubled.install()
            run_chain(place, self.networks, troubled, self.bytes if hasattr(self, "bytes") else 1 << 40)
            place.say("writes", troubled.writes)

        child = forked(self.phase, run)
        if after_seconds is not None:
            time.sleep(after_seconds)
            os.kill(child, signal.SIGKILL)  # not yet waited for, so it is still this child
        return os.waitpid(child, 0)[1]

    # --- kills

    def kill_many(self, kills: int) -> Counter:
        """Runs chains until so many processes were killed; the phases they died in."""
        died = Counter()
        chain = 0
        while died.total() < kills:
            place = Place(self.folder / f"chain-{chain}")
            self.add_old_files(place)
            most = min(MOST_KILLS_A_CHAIN, kills - died.total())
            for _ in range(most):
                before = self.finished(place), self.iteration(place)
                lines = len(place.said())
                if self.random.random() < 0.4:
                    status = self.attempt(place, after_seconds=self.random.random() ** 2 * self.seconds * 0.3)
                else:
                    early = [
                        phase
                        for phase in EVENTS
                        if died.total() % MOST_KILLS_A_CHAIN > 0.8 * MOST_KILLS_A_CHAIN
                        or phase != "writing the checkpoint"
                    ]
                    rare = [phase for phase in early if died[phase] < kills // 25]
                    phase = self.random.choice(rare or early)
                    status = self.attempt(place, (phase, self.random.randrange(EVENTS[phase])))
                self.check(place, before, place.said()[lines:])
                if os.WIFSIGNALED(status):
                    died[PHASES[self.phase[0]]] += 1
                else:
                    break
            if os.WIFSIGNALED(status):
                status = self.attempt(place)
            self.check_end(place, status)
            shutil.rmtree(place.store.parent)
            chain += 1
        return died

    def add_old_files(self, place: Place) -> None:
        """Steps of other chains, for which there will be no room."""
        (place.store / "steps").mkdir(parents=True)
        for number, path in enumerate(self.files[:3]):
            old = place.store / "steps" / f"{number:064x}.safetensors"
            shutil.copy(path, old)
            os.utime(old, (1000 + number, 1000 + number))

    def finished(self, place: Place) -> set[int]:
        """Numbers of the steps whose results are in the store; all of its files must be whole."""
        for path in place.store.rglob("*.safetensors"):
            read_sealed(path)
        return {
            number
            for number, key in self.keys.items()
            if (place.store / "steps" / f"{key}.safetensors").is_file()
        }

    def iteration(self, place: Place) -> dict[int, int]:
        """Iterations whose states are in the store, by the number of the step."""
        found = {}
        for number, key in self.keys.items():
            path = place.store / "states" / f"{key}.safetensors"
            if path.is_file():
                found[number] = json.loads(read_sealed(path)[1]["cul_state"])["state"]["iteration"]
        return found

    def check(self, place: Place, before: tuple[set[int], dict[int, int]], said: list) -> None:
        """Nothing that was there before an attempt was made again, and files are whole or absent."""
        finished, states = before
        for words in said:
            if words[0] == "begins" and words[1] in finished:
                self.problems.append(f"finished step {words[1]} was trained again")
            if words[0] == "begins" and words[2] != states.get(words[1], 0):
                self.problems.append(
                    f"step {words[1]} began at {words[2]} where its state was at {states.get(words[1], 0)}"
                )
        if not finished <= (now := self.finished(place)):
            self.problems.append(f"finished steps {finished - now} were lost")
        for path in place.out.glob("*.safetensors"):
            if self.tensor_bytes(path) != self.checkpoint:
                self.problems.append(f"{path.name} is half-written")

    def check_end(self, place: Place, status: int) -> None:
        said = place.said()
        if status or said[-2:-1] != [["done", self.expected]]:
            self.problems.append(f"a chain ended with {said[-1:]} and status {status}")
            return
        if left := [
            path.name
            for path in place.store.rglob("*")
            if path.parent.name == "states" or path.suffix == ".cul-part"
        ]:
            self.problems.append(f"left behind: {left}")
        if self.finished(place) != set(self.keys) or not list(place.out.glob("edited.safetensors")):
            self.problems.append("not everything is there at the end")

    # --- writes that fail

    def fail_writes(self, error: OSError, samples: int) -> dict:
        """The chain with its k-th write and all that follow failing, for `samples` k spread over it, each in
        an empty place; then again."""
        total, survived = self.writes, 0
        for k in range(0, samples * (total // samples), total // samples):
            place = Place(self.folder / f"full-{k}")
            self.attempt(place, fail_at=k, error=error)
            models = [words for words in place.said() if words[0] == "model"]
            if [words[1] for words in models] != [self.expected]:
                self.problems.append(f"write {k} failed and the chain gave {models}")
            self.finished(place)
            for path in place.out.glob("*.safetensors"):
                if self.tensor_bytes(path) != self.checkpoint:
                    self.problems.append(f"{path.name} is half-written after write {k} failed")
            if self.attempt(place):
                self.problems.append(f"the run after write {k} had failed did not work")
            if left := [path.name for path in place.store.rglob("*.cul-part")]:
                self.problems.append(f"left behind after write {k} failed: {left}")
            shutil.rmtree(place.store.parent)
            survived += 1
        return {"writes": total, "survived": survived}


def main() -> None:
    folder, seed, task = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    logging.basicConfig(level=logging.ERROR)
    harness = Harness(folder, seed)
    result = {"seconds": harness.seconds}
    if task == "kill":
        result["died"] = harness.kill_many(int(sys.argv[4]))
    else:
        result |= harness.fail_writes(
            OSError(int(sys.argv[4]), os.strerror(int(sys.argv[4]))), int(sys.argv[5])
        )
    sys.stdout.write(json.dumps({**result, "problems": harness.problems}) + "\n")


if __name__ == "__main__":
    main()
