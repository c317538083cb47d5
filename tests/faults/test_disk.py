"""A disk that is full, read-only or broken, at every single write: files are whole or absent, and a step
still gives its result."""

import errno
import logging
import os
import stat
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
from crash import Trouble
from PIL import Image

from cul_core.base.errors import CheckpointError, TrainingError
from cul_core.cli.common import write_json
from cul_core.concepts.concept import Concept
from cul_core.files.atomic_write import write_atomically
from cul_core.files.safetensors_format import read_header, read_sealed
from cul_core.history.step_record import StepRecord
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.output.charts import save_image
from cul_core.output.checkpoint import open_model, save_checkpoint, save_edits
from cul_core.output.lora import save_difference, save_lora
from cul_core.requests.request import Request
from cul_core.store.anchors import _AnchorFile
from cul_core.store.model_snapshots import snapshot_model
from cul_core.store.step_state import StepState
from cul_core.store.steps import StepStore
from cul_core.training.step import StepReport

NAME = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_{}.weight"
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)


@pytest.fixture(scope="module")
def original():
    return open_model(CHECKPOINT_PATH)


@pytest.fixture(scope="module")
def request_():
    return Request((Concept("Lava"),), ConAblConfig(), anchor_prompts=("A star image.",))


@pytest.fixture(scope="module")
def step(original, request_):
    """(edited model, its report), as a training would give them."""
    header, _, _ = read_header(original.source.path)
    edits = {name: torch.full(header[name]["shape"], 1e-3) for name in map(NAME.format, "kv")}
    result = UnlearnModel(original.source, original.family, edits)
    record = StepRecord(
        request_.to_json(),
        {"unlearn": 0.5},
        {},
        original.content_hash,
        result.content_hash,
        1.0,
        "2026-01-01",
        {},
    )
    return original.with_step(edits, record), StepReport(record, (1.0, 0.5), {"protected_rank": 3.0})


STATE = {"iteration": 2, "losses": [1.0, 0.5], "weights": {"w": torch.ones(64, 64)}, "origin": {}}


@pytest.fixture
def writers(step, original, request_):
    """Name -> (a call that writes into a folder, whether it says so when that fails)."""
    edited, report = step

    def get_or_train(folder):
        def train(state_store):
            state_store.load({})
            state_store.save(STATE)
            return step

        outcome = StepStore(folder, every_seconds=0).get_or_train(original, request_, train)
        assert outcome.model.content_hash == edited.content_hash and outcome.report == report

    return {
        "checkpoint": (lambda folder: save_checkpoint(edited, folder / "a.safetensors"), True),
        "edits": (lambda folder: save_edits(edited, folder / "a.safetensors"), True),
        "diff": (lambda folder: save_difference(edited, folder / "a.safetensors"), True),
        "lora": (lambda folder: save_lora(edited, folder / "a.safetensors", 2), True),
        "picture": (lambda folder: save_image(Image.new("RGB", (300, 300)), folder / "a.png"), True),
        "json": (lambda folder: write_json(folder / "a.json", {"a": [1] * 5000}), True),
        "finished step": (lambda folder: StepStore(folder).put(original, request_, edited, report), True),
        "state": (lambda folder: StepState(folder / "states/a.safetensors", request_, 0).save(STATE), False),
        "anchors": (
            lambda folder: _AnchorFile(folder / "a.safetensors", 0).write([torch.ones(2, 4, 8, 8)]),
            False,
        ),
        "step": (get_or_train, False),
    }


NAMES = (
    "checkpoint",
    "edits",
    "diff",
    "lora",
    "picture",
    "json",
    "finished step",
    "state",
    "anchors",
    "step",
)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
def test_a_write_that_fails_leaves_a_whole_file_or_none(
    name, code, writers, tmp_path, monkeypatch, count, caplog
):
    caplog.set_level(logging.CRITICAL)
    write, says_so = writers[name]
    clean = tmp_path / "clean"
    clean.mkdir()
    write(clean)
    whole = {path: data for path, data in contents(clean).items()}
    for number in range(1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        trouble = Trouble(bytearray(1), fail_at=number, error=OSError(code, os.strerror(code)))
        with monkeypatch.context() as patched:
            trouble.install(patched.setattr)
            try:
                write(folder)
                failed = False
            except CheckpointError as error:
                failed = True
                assert "could not be written" in str(error) and os.strerror(code) in str(error)
        if trouble.writes <= number:
            break
        for path, data in contents(folder).items():
            # where nothing can be removed, this stays for the next run
            if code == errno.ENOSPC or path.suffix != ".cul-part":
                assert data == whole.get(path, data) and path.suffix != ".cul-part", (number, path)
        assert failed or not says_so or whole.keys() <= contents(folder).keys(), number
        write(folder)
        assert whole.keys() <= contents(folder).keys()
        count("failed write")
    assert number > 5


def test_a_state_that_cannot_be_replaced_stays(request_, tmp_path, monkeypatch, count):
    path = tmp_path / "states/a.safetensors"
    StepState(path, request_, 0).save(STATE)
    before = path.read_bytes()
    for number in range(6):
        with monkeypatch.context() as patched:
            Trouble(bytearray(1), fail_at=number, error=OSError(errno.ENOSPC, "full")).install(
                patched.setattr
            )
            StepState(path, request_, 0).save({**STATE, "iteration": 3})
        assert path.read_bytes() == before and StepState(path, request_, 0).load({})["iteration"] == 2
        count("failed write")


# --- permissions of what is written


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_files_mode_follows_the_umask_which_is_never_changed(umask, tmp_path, monkeypatch, count):
    """The umask is the whole process's: while it is 0, another thread's files are writable by anybody."""
    before = os.umask(umask)
    try:

        def refuse(*_):
            pytest.fail("the umask was changed")

        seen = []

        def write(file):
            file.write(b"x")
            seen.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())

        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", refuse)
            write_atomically(tmp_path / "a.json", write)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert seen == [0o666 & ~umask]
    count("umask")


def test_a_name_that_another_process_took_for_its_unfinished_file_is_left_alone(tmp_path, monkeypatch, count):
    tokens = iter(["same", "other"])
    monkeypatch.setattr("cul_core.files.atomic_write.secrets.token_hex", lambda count: next(tokens))
    (tmp_path / ".a.same.cul-part").write_bytes(b"theirs")
    write_atomically(tmp_path / "a.json", lambda file: file.write(b"ours"))
    assert (tmp_path / ".a.same.cul-part").read_bytes() == b"theirs"
    assert (tmp_path / "a.json").read_bytes() == b"ours"
    count("taken name")


# --- Windows, which neither replaces nor removes a file that a program has open


DENIED = PermissionError(errno.EACCES, "Access is denied")


def denied_first(times, call):
    """`call`, which is denied the first `times` times; and a list of its arguments."""
    seen = []

    def wrapped(*arguments, **named):
        seen.append(arguments)
        if len(seen) <= times:
            raise DENIED
        return call(*arguments, **named)

    return wrapped, seen


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("cul_core.files.atomic_write.time.sleep", lambda seconds: None)


def test_a_file_that_is_open_for_a_moment_is_replaced_after_it(tmp_path, monkeypatch, no_waiting, count):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    replace_, seen = denied_first(3, os.replace)
    monkeypatch.setattr(os, "replace", replace_)
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and len(seen) == 4
    assert list(tmp_path.iterdir()) == [path]
    count("open file")


def test_a_file_that_stays_open_is_left_and_the_error_says_why(tmp_path, monkeypatch, no_waiting, count):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", denied_first(1000, os.replace)[0])
    said = "'a.json' could not be written .*Access is denied.*close what has it open"
    with pytest.raises(CheckpointError, match=said):
        write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    count("open file")


@pytest.mark.usefixtures("no_waiting")
def test_a_state_that_stays_open_fails_no_step(
    request_, step, original, tmp_path, monkeypatch, count, caplog
):
    store = StepStore(tmp_path)

    def train(state_store):
        state_store.save(STATE)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", denied_first(1000, os.replace)[0])
            state_store.save({**STATE, "iteration": 3})
        assert state_store.load({})["iteration"] == 2
        return step

    assert store.get_or_train(original, request_, train).note == ", resumed at iteration 2"
    assert "the state of the step is not kept" in caplog.text
    count("open file")


def test_a_stored_file_that_is_open_stays_and_fails_no_step(
    request_,
    step,
    original,
    tmp_path,
    monkeypatch,
    count,
):
    old = tmp_path / "steps" / f"{0:064x}.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"x" * 100)
    os.utime(old, (1, 1))
    monkeypatch.setattr(os, "unlink", denied_first(1000, os.unlink)[0])
    outcome = StepStore(tmp_path, largest_bytes=10).get_or_train(original, request_, lambda state_store: step)
    assert outcome.model is step[0] and outcome.note == "" and old.exists()
    count("open file")


def test_kept_weights_that_are_open_stay_and_the_next_oldest_goes(tmp_path, monkeypatch, count):
    paths = [snapshot_model(tmp_path, {"a": torch.full((100,), float(value))}).path for value in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    monkeypatch.setattr(os, "unlink", denied_first(1, os.unlink)[0])
    most = 3 * paths[0].stat().st_size
    new = snapshot_model(tmp_path, {"a": torch.full((100,), 9.0)}, largest_bytes=most).path
    assert set(tmp_path.glob("*.safetensors")) == {paths[0], paths[2], new}
    count("open file")


def test_kept_weights_in_a_folder_that_cannot_be_written_are_found(tmp_path, monkeypatch, count):
    source = snapshot_model(tmp_path, {"a": torch.ones(3)})
    monkeypatch.setattr(os, "utime", denied_first(1000, os.utime)[0])
    assert snapshot_model(tmp_path, {"a": torch.ones(3)}) == source
    count("open file")


# --- a crash of the whole machine


def test_a_rename_is_on_the_disk_before_the_file_counts_as_written(tmp_path, monkeypatch, count):
    """The folder is flushed after the rename; where it cannot be, the file is written all the same."""
    events, flush, rename = [], os.fsync, os.replace

    def is_folder(handle):
        return stat.S_ISDIR(os.fstat(handle).st_mode)

    def fsync(handle):
        events.append("folder flushed" if is_folder(handle) else "file flushed")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("renamed"), rename(*names)))
    write_atomically(tmp_path / "a.json", lambda file: file.write(b"x"))
    assert events == ["file flushed", "renamed", "folder flushed"]

    def fsync_of_files_only(handle):
        if is_folder(handle):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync_of_files_only)
    write_atomically(tmp_path / "b.json", lambda file: file.write(b"x"))
    make = os.open

    def open_of_files_only(path, *arguments, **named):
        if os.path.isdir(path):
            raise DENIED
        return make(path, *arguments, **named)

    monkeypatch.setattr(os, "open", open_of_files_only)
    write_atomically(tmp_path / "c.json", lambda file: file.write(b"x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]
    count("folder that cannot be flushed", 2)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = partial(subprocess.run, capture_output=True)
    if (
        not hasattr(os, "geteuid")
        or mount(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield folder
    mount(["umount", str(folder)])


def test_a_full_disk_costs_no_result_and_is_not_filled_with_leftovers(
    small_disk, step, original, request_, count
):
    edited, report = step
    store = StepStore(small_disk / "store")
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(edited, small_disk / "a.safetensors")
    assert list(small_disk.iterdir()) == []
    (small_disk / "big").write_bytes(bytes(456 << 10))

    def train(state_store):
        state_store.save({**STATE, "weights": {"w": torch.ones(200, 200)}})
        return step

    outcome = store.get_or_train(original, request_, train)
    assert (
        outcome.model is edited
        and "Not kept for later runs" in outcome.note
        and "No space left" in outcome.note
    )
    assert not list(small_disk.rglob("*.safetensors")) and not list(small_disk.rglob("*.cul-part"))
    (small_disk / "big").unlink()
    assert store.get_or_train(original, request_, lambda state_store: step).note == ""
    assert not subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True).returncode
    read_only = StepStore(small_disk / "store")
    assert read_only.get_or_train(original, request_, None).note == ", kept from an earlier run"
    other = replace(request_, anchor_seed=1)
    assert "Read-only" in read_only.get_or_train(original, other, lambda state_store: step).note
    assert "1 are in use or cannot be removed" in read_only.clear("steps")
    count("full or read-only disk", 4)


def test_a_step_that_became_nan_leaves_no_state_to_go_on_from(original, request_, step, tmp_path, count):
    def broken(state_store):
        state_store.save(STATE)
        raise TrainingError("The loss became nan")

    store = StepStore(tmp_path)
    with pytest.raises(TrainingError):
        store.get_or_train(original, request_, broken)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert (
        store.get_or_train(original, request_, lambda state_store: (state_store.load({}), step)[1]).note == ""
    )
    for path in tmp_path.rglob("*.safetensors"):
        read_sealed(path)
    count("step that became NaN")
