"""Drives as users have them: mounts without chmod, flush or rename, short names, little room, no locks."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cul_core.base.errors import CheckpointError
from cul_core.cli import main
from cul_core.concepts.concept import Concept
from cul_core.files.atomic_write import LEFTOVER, leftovers, rehearse, write_atomically
from cul_core.files.locks import Waiting, locked, try_locked
from cul_core.files.safetensors_format import read_header
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.sampling import SamplerConfig
from cul_core.output.checkpoint import open_model, save_checkpoint, save_edits
from cul_core.output.lora import save_difference
from cul_core.requests.presets import Preset
from cul_core.requests.request import Request
from cul_core.store.model_snapshots import snapshot_model
from cul_core.store.steps import StepStore
from cul_core.training.step import run_step

UNSUPPORTED = ("EINVAL", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "ENOTTY", "EPERM", "EACCES")
LOST = ("ENOSPC", "EIO", "EDQUOT", "EROFS")


@pytest.fixture(scope="module")
def edited():
    original = open_model(CHECKPOINT_PATH)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return replace(original, edits={name: torch.full(read_header(CHECKPOINT_PATH)[0][name]["shape"], 0.25)})


@pytest.fixture
def failing(monkeypatch):
    """`failing(call, name of an error)`: from now on `os.call` fails with it."""

    def install(call, code):
        def broken(*arguments, **named):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

        monkeypatch.setattr(os, call, broken)

    return install


@pytest.mark.parametrize("code", UNSUPPORTED)
@pytest.mark.parametrize("call", ["fsync", "chmod", "utime"])
def test_a_drive_that_lacks_a_call_gets_whole_files(call, code, edited, failing, tmp_path, count):
    failing(call, code)
    rehearse(tmp_path / "a.safetensors", 1000)
    written = [
        save_checkpoint(edited, tmp_path / "a.safetensors"),
        save_edits(edited, tmp_path / "b.safetensors"),
        save_difference(edited, tmp_path / "c.safetensors"),
        snapshot_model(tmp_path / "kept", {"a": torch.ones(3)}).path,
    ]
    assert all(read_header(path) for path in written)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        path.name for path in written[:3]
    ]
    count("drive without a call")


@pytest.mark.parametrize("code", LOST)
def test_a_flush_that_lost_data_stays_an_error(code, failing, tmp_path, count):
    failing("fsync", code)
    with pytest.raises(CheckpointError, match=os.strerror(getattr(errno, code))):
        write_atomically(tmp_path / "a.json", lambda file: file.write(b"x"))
    assert not list(tmp_path.iterdir())
    count("flush that lost data")


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP"])
def test_a_drive_that_cannot_rename_gets_a_copy(code, edited, failing, tmp_path, count):
    failing("replace", code)
    path = save_checkpoint(edited, tmp_path / "a.safetensors")
    assert read_header(path) and list(tmp_path.iterdir()) == [path]
    count("drive without a call")


@pytest.mark.parametrize("code", ["EBUSY", "ETXTBSY", "EACCES"])
def test_a_rename_that_fails_for_a_moment_is_repeated(code, tmp_path, monkeypatch, count):
    monkeypatch.setattr("cul_core.files.atomic_write.time.sleep", lambda seconds: None)
    rename, failures = os.replace, [OSError(getattr(errno, code), "busy")] * 2

    def busy(*names):
        if failures:
            raise failures.pop()
        rename(*names)

    monkeypatch.setattr(os, "replace", busy)
    write_atomically(tmp_path / "a.json", lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    count("open file")


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("a" * 243 + ".safetensors", 255),
        ("a" * 238 + ".safetensors", 255),
        ("a" * 125 + ".safetensors", 143),
        ("\u00e9" * 65 + ".safetensors", 143),
        ("\u5317" * 43 + ".safetensors", 143),
        ("\U0001f600" * 60 + ".safetensors", 255),
        ("a.json", 143),
    ],
)
def test_a_name_that_fits_is_written(name, longest, tmp_path, monkeypatch, count):
    create = os.open

    def limited(path, *arguments, **named):
        if len(os.fsencode(os.path.basename(path))) > longest:
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        return create(path, *arguments, **named)

    monkeypatch.setattr(os, "open", limited)
    rehearse(tmp_path / name)
    assert not list(tmp_path.iterdir())
    write_atomically(tmp_path / name, lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    count("long name")


def test_a_name_too_long_for_the_drive_is_refused_by_the_rehearsal(tmp_path, monkeypatch, count):
    create = os.open

    def limited(path, *arguments, **named):
        if len(os.fsencode(os.path.basename(path))) > 143:
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        return create(path, *arguments, **named)

    monkeypatch.setattr(os, "open", limited)
    with pytest.raises(CheckpointError, match="File name too long.*give a shorter name"):
        rehearse(tmp_path / ("a" * 140 + ".safetensors"))
    assert not list(tmp_path.iterdir())
    count("long name")


def test_leftovers_of_a_long_name_are_found(tmp_path):
    (tmp_path / f".{'a' * 64}.12345678{LEFTOVER}").touch()
    assert len(list(leftovers(tmp_path, "a" * 64))) == 1


@pytest.fixture
def disk(tmp_path):
    """`disk(megabytes)`: the folder of a file system of its own of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = partial(subprocess.run, capture_output=True)

    def make(megabytes):
        options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if not hasattr(os, "geteuid") or mount(options).returncode:
            pytest.skip("no file system can be mounted here")
        return folder

    yield make
    mount(["umount", str(folder)])


@pytest.mark.parametrize("megabytes", [1, 12])
def test_a_disk_too_small_for_the_checkpoint_is_refused_before_the_training(
    megabytes, disk, monkeypatch, capsys, count
):
    monkeypatch.setattr("cul_core.training.step.run_step", lambda *a, **k: pytest.fail("it trained"))
    folder = disk(megabytes)
    assert main(["unlearn", "Lava", "--preset", "plain", "--out", str(folder / "a.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "'a.safetensors' needs" in said and "free some space there" in said and not list(folder.iterdir())
    count("full or read-only disk")


def test_a_merge_without_room_is_refused_first(edited, disk, tmp_path, capsys, count):
    files = [str(save_checkpoint(edited, tmp_path / name)) for name in ("a.safetensors", "b.safetensors")]
    folder = disk(1)
    assert main(["merge", *files, "--out", str(folder / "m.safetensors")]) == 2
    assert "'m.safetensors' needs" in capsys.readouterr().err
    count("full or read-only disk")


def test_a_file_too_large_for_the_drive_is_refused_by_the_rehearsal(tmp_path, count):
    """FAT32 holds files below 4 GiB; every drive has some limit, and room is no matter of it."""
    path = tmp_path / "a.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cul_core.files.atomic_write.check_room", lambda *_: None)
        with pytest.raises(CheckpointError, match="'a.safetensors' could not be written .*File too large"):
            rehearse(path, 1 << 62)
    assert not list(tmp_path.iterdir())
    count("full or read-only disk")


@pytest.fixture
def few_anchors(monkeypatch):
    full = Preset.request
    monkeypatch.setattr(
        Preset, "request", lambda self, *args, **kwargs: replace(full(self, *args, **kwargs), anchor_count=2)
    )


@pytest.mark.usefixtures("few_anchors")
@pytest.mark.parametrize(("code", "has_store"), [("ENOSPC", False), ("EIO", True)])
def test_a_checkpoint_that_cannot_be_written_after_all_needs_no_second_training(
    code, has_store, tmp_path, monkeypatch, capsys, count
):
    """The disk fails after the rehearsal; the command that the message names writes the file."""
    monkeypatch.chdir(tmp_path)
    store = ["--store", "mine"] if has_store else []
    command = ["unlearn", "Lava", "--preset", "plain", "--iterations", "1", "--out"]

    def failing(*_, **__):
        raise CheckpointError(f"'a' could not be written ({os.strerror(getattr(errno, code))}).")

    with monkeypatch.context() as patched:
        patched.setattr("cul_core.output.checkpoint.save_checkpoint", failing)
        assert main([*command, "a.safetensors", *store]) == 2
    folder = "mine" if has_store else str(tmp_path / "kept-steps")
    said = capsys.readouterr().err
    assert os.strerror(getattr(errno, code)) in said and f"--store {folder!r} and another --out" in said
    monkeypatch.setattr("cul_core.training.step.run_step", lambda *a, **k: pytest.fail("it trained again"))
    assert main([*command, "b.safetensors", "--store", folder]) == 0
    assert "kept from an earlier run" in capsys.readouterr().out and Path("b.safetensors").is_file()
    count("checkpoint that could not be written")


@pytest.mark.usefixtures("few_anchors")
def test_where_no_folder_keeps_the_step_the_message_says_so(tmp_path, monkeypatch, capsys, count):
    monkeypatch.chdir(tmp_path)

    def failing(*_, **__):
        raise CheckpointError("It could not be written.")

    monkeypatch.setattr("cul_core.output.checkpoint.save_checkpoint", failing)
    monkeypatch.setattr(StepStore, "put", failing)
    assert main(["unlearn", "Lava", "--preset", "plain", "--iterations", "1", "--out", "a.safetensors"]) == 2
    assert "could be kept nowhere" in capsys.readouterr().err
    count("checkpoint that could not be written")


@pytest.mark.parametrize("call", ["fsync", "utime"])
def test_a_store_on_a_drive_without_a_call_keeps_steps_states_and_anchors(call, failing, tmp_path, count):
    failing(call, "EINVAL")
    model = open_model(CHECKPOINT_PATH)
    request = Request((Concept("Lava"),), ConAblConfig(), anchor_prompts=("a house",), anchor_count=2)
    request = replace(request, training=replace(request.training, iterations=1, batch_size=2))
    store = StepStore(tmp_path, every_seconds=0)
    states = []

    def train(state_store):
        result = run_step(model, request, store=store.anchors, state_store=state_store)
        states.extend(tmp_path.glob("states/*.safetensors"))
        return result

    outcome = store.get_or_train(model, request, train)
    assert outcome.is_kept and states and len(list(tmp_path.glob("anchors/*.safetensors"))) == 1
    assert StepStore(tmp_path).get(model, request)[0].content_hash == outcome.model.content_hash
    count("drive without a call")


# --- locks


NO_LOCKS = ("ENOLCK", "EOPNOTSUPP", "ENOSYS", "EIO", "EINVAL", "EPERM", "EACCES", "ESTALE", "EBADF", "ENOTTY")


@pytest.fixture
def flock(monkeypatch):
    """`flock(name of an error)`: from now on no file can be locked."""
    fcntl = pytest.importorskip("fcntl")

    def install(code):
        def broken(*_):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

        monkeypatch.setattr(fcntl, "flock", broken)

    return install


@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_drive_without_locks_is_used_without_them_and_this_is_said_once(
    code, flock, tmp_path, caplog, count
):
    flock(code)

    def on_wait():
        pytest.fail("it waits for nobody")

    for _ in range(3):
        with locked(tmp_path / "locks/0e8.lock", on_wait), try_locked(tmp_path / "locks/0e8.lock") as is_ours:
            assert is_ours
    assert caplog.text.count("there are no locks in") == 1
    assert [path.name for path in (tmp_path / "locks").iterdir()] == ["0e8.lock"]
    count("drive without locks")


def test_a_lock_that_somebody_has_is_waited_for(tmp_path, count):
    path = tmp_path / "a.lock"
    with try_locked(path) as is_ours, try_locked(path) as is_theirs:
        assert is_ours and not is_theirs
    with try_locked(path) as is_ours:
        assert is_ours
    count("lock that somebody has")


def test_a_network_drive_that_denies_a_taken_lock_is_waited_for(tmp_path, monkeypatch, count):
    """CIFS has answered EACCES for a lock that another machine has."""
    fcntl = pytest.importorskip("fcntl")
    real = fcntl.flock

    def denied(handle, how):
        try:
            real(handle, how)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    monkeypatch.setattr(fcntl, "flock", denied)
    with try_locked(tmp_path / "a.lock") as is_ours, try_locked(tmp_path / "a.lock") as is_theirs:
        assert is_ours and not is_theirs
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    count("lock that somebody has")


HOLDER = """
import sys, time
from pathlib import Path
from cul_core.files.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path, count):
    path = tmp_path / "a.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert holder.stdout.readline().strip() == b"held"
    with try_locked(path) as is_ours:
        assert not is_ours
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with try_locked(path) as is_ours:
        assert is_ours
    count("lock of a killed process")


def test_waiting_is_said_at_once_and_then_at_intervals(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr("cul_core.files.locks.time.monotonic", lambda: now[0])
    waiting = Waiting("Another process trains this step", said.append)
    for seconds in (0, 1, 59, 60, 61, 130):
        now[0] = 100.0 + seconds
        waiting()
    assert [text.partition(", waiting since ")[0] for text in said] == [
        "Another process trains this step"
    ] * 3
    assert [text.rpartition("(")[2] for text in said] == ["0 s).", "60 s).", "130 s)."]


@pytest.mark.usefixtures("few_anchors")
def test_the_command_line_says_what_it_waits_for(tmp_path, monkeypatch, capsys, count):
    class Enough(Exception):
        pass

    def wait(seconds):
        raise Enough

    monkeypatch.setattr("cul_core.files.locks.time.sleep", wait)
    monkeypatch.setattr("cul_core.store.steps.lock_of", lambda folder, path: tmp_path / "a.lock")
    command = ["unlearn", "Lava", "--preset", "plain", "--out", str(tmp_path / "a.safetensors"), "--store"]
    with try_locked(tmp_path / "a.lock"), pytest.raises(Enough):
        main([*command, str(tmp_path / "store")])
    assert f"trains this step in {str(tmp_path / 'store')!r}, waiting since" in capsys.readouterr().err
    count("lock that somebody has")


def test_who_waits_for_anchor_pictures_is_told(tmp_path, monkeypatch, count):
    said = []

    def wait(seconds):
        raise TimeoutError

    monkeypatch.setattr("cul_core.files.locks.time.sleep", wait)
    monkeypatch.setattr("cul_core.store.anchors.lock_of", lambda folder, path: tmp_path / "a.lock")
    with try_locked(tmp_path / "a.lock"), pytest.raises(TimeoutError):
        StepStore(tmp_path).anchors.anchor_latents(
            open_model(CHECKPOINT_PATH).source,
            None,
            ["a house"],
            2,
            SamplerConfig(),
            0,
            on_message=said.append,
        )
    assert len(said) == 1 and said[0].startswith("Another process draws the anchor pictures, waiting since")
    count("lock that somebody has")
