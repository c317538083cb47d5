"""Files that vanish, change, or are damaged while they are needed: a clear error or a repetition, never a
wrong result."""

import os
import random
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from crash import requests

from cul_core.base.errors import Cancelled, ModelError
from cul_core.files.locks import lock_of, try_locked
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.load_diffusers import NetworkCache
from cul_core.output.checkpoint import open_model, save_checkpoint
from cul_core.store import eviction
from cul_core.store.steps import StepStore
from cul_core.training.step import run_step


@pytest.fixture(scope="module")
def networks():
    return NetworkCache()


@pytest.fixture(scope="module")
def original():
    return open_model(CHECKPOINT_PATH)


@pytest.fixture(scope="module")
def request_():
    return requests()[0]


@pytest.fixture(scope="module")
def trained(original, request_, networks, tmp_path_factory):
    """(a store with a finished step, an unfinished one and anchors, the step's model and report)."""
    folder = tmp_path_factory.mktemp("store")
    store = StepStore(folder, every_seconds=0)

    def stopped(state_store):
        run_step(original, request_, store=store.anchors, networks=networks, state_store=state_store)
        raise Cancelled("now")  # its last state stays

    with pytest.raises(Cancelled):
        store.get_or_train(original, request_, stopped)
    state = next(folder.glob("states/*"))
    kept = state.read_bytes()
    outcome = store.get_or_train(original, request_, trainer(store, original, request_, networks))
    assert outcome.note == f", resumed at iteration {request_.training.iterations}" and not state.exists()
    state.write_bytes(kept)
    return folder, outcome


def trainer(store, model, request, networks):
    return lambda state_store: run_step(
        model, request, store=store.anchors, networks=networks, state_store=state_store
    )


@pytest.fixture
def copy(tmp_path):
    path = tmp_path / "copy.safetensors"
    shutil.copy(CHECKPOINT_PATH, path)
    return path


@pytest.mark.parametrize("change", ["removed", "cut", "altered", "folder"])
def test_a_source_that_changes_between_opening_and_training_or_saving_is_an_error_that_says_so(
    change, copy, trained, tmp_path, count
):
    model = open_model(copy)
    edited = model.with_step(trained[1].model.edits, trained[1].model.history[0])
    data = copy.read_bytes()
    if change in ("removed", "folder"):
        copy.unlink()
    if change == "folder":
        copy.mkdir()
    if change == "cut":
        copy.write_bytes(data[: len(data) // 2])
    if change == "altered":
        copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for attempt in (
        lambda: NetworkCache().get(model.source),
        lambda: save_checkpoint(edited, tmp_path / "out/a.safetensors"),
    ):
        with pytest.raises(ModelError, match=r"copy\.safetensors"):
            attempt()
        count("file changed under us")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("change", ["removed", "cut", "altered", "replaced"])
def test_a_source_that_changes_while_it_is_copied_leaves_nothing_behind(
    change, copy, trained, tmp_path, count
):
    model = open_model(copy)
    edited = model.with_step(trained[1].model.edits, trained[1].model.history[0])
    data, chunks = copy.read_bytes(), []

    def on_chunk():
        chunks.append(1)
        if len(chunks) == 2:
            if change == "removed":
                copy.unlink()
            elif change == "cut":
                os.truncate(copy, len(data) // 2)
            elif change == "altered":
                with copy.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([data[-1] ^ 1]))
            else:
                other = copy.with_name("other")
                other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
                os.replace(other, copy)

    with pytest.raises(ModelError, match=r"copy\.safetensors|source checkpoint became shorter"):
        save_checkpoint(edited, tmp_path / "out/a.safetensors", on_chunk)
    assert not list(tmp_path.glob("out/.*")) and not list(tmp_path.glob("out/*"))
    count("file changed under us")


def test_a_loaded_model_does_not_depend_on_its_file_any_more(tmp_path, original, networks):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "fp32.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(CHECKPOINT_PATH).items()}, path)
    network = NetworkCache().get(open_model(path).source)
    before = {name: tensor.clone() for name, tensor in network.unet.state_dict().items()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.unet.state_dict().items())


@pytest.mark.parametrize("part", ["steps", "states", "anchors"])
def test_a_damaged_file_of_the_store_is_never_used(
    part, trained, original, request_, networks, tmp_path, count, caplog
):
    """Of each kind, 20 copies with a bit flipped, 20 cut short, and some that are something else."""
    folder, outcome = trained
    chosen = random.Random(part)
    data = next((folder / part).glob("*.safetensors")).read_bytes()
    name = next((folder / part).glob("*.safetensors")).name
    bad = []
    for _ in range(20):
        flipped = bytearray(data)
        flipped[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        bad += [bytes(flipped), data[: chosen.randrange(len(data))]]
    bad += [b"", bytes(len(data)), data + b"x", b"\xff" * 100]
    for number, damaged in enumerate(bad):
        store = StepStore(tmp_path / str(number))
        path = tmp_path / str(number) / part / name
        path.parent.mkdir(parents=True)
        path.write_bytes(damaged)
        if part == "steps":
            assert store.get(original, request_) is None
        elif part == "states":

            def train(state_store):
                assert state_store.load({"any": "origin"}) is None
                return outcome.model, outcome.report

            assert store.get_or_train(original, request_, train).note == ""
        else:
            from cul_core.store.anchors import _AnchorFile

            assert _AnchorFile(path, 0).read(24) == []
        assert not path.exists()
        count("damaged stored file")
    assert caplog.text.count("damaged") >= len(bad)


def test_a_store_that_vanishes_while_a_step_trains_is_made_anew(trained, original, request_, tmp_path, count):
    outcome = trained[1]
    store = StepStore(tmp_path / "store", every_seconds=0)

    def train(state_store):
        state_store.save({"iteration": 1})
        shutil.rmtree(tmp_path / "store")
        state_store.save({"iteration": 2})
        shutil.rmtree(tmp_path / "store")
        return outcome.model, outcome.report

    assert store.get_or_train(original, request_, train).note == ""
    assert StepStore(tmp_path / "store").get(original, request_)[0].content_hash == outcome.model.content_hash
    count("file changed under us")


def test_a_clock_that_jumps_removes_nothing_that_is_in_use(trained, original, tmp_path, monkeypatch, count):
    outcome = trained[1]
    size = next((trained[0] / "steps").glob("*")).stat().st_size
    store = StepStore(tmp_path, largest_bytes=int(2.5 * size))
    others = [replace(requests()[1], anchor_seed=number) for number in range(4)]
    now, day = time.time_ns(), 25 * 3600 * 10**9
    # years ahead, then back, then a day
    for jump, other in zip((0, 10**18, -(10**18), -(10**18) + day), others, strict=True):
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: now + jump)
        monkeypatch.setattr(eviction, "_holders", {})  # as another process
        StepStore(tmp_path, largest_bytes=int(2.5 * size)).put(original, other, outcome.model, outcome.report)
        count("clock jump")
    found = [store.get(original, other) is not None for other in others]
    assert found == [False, False, True, True]  # the least recently used are gone, whatever the clock said


def test_of_two_processes_one_trains_and_the_other_takes_its_result(trained, original, request_, tmp_path):
    outcome, store, other = trained[1], StepStore(tmp_path), StepStore(tmp_path)
    waited, notes = threading.Event(), []

    def slow(state_store):
        assert waited.wait(60)
        return outcome.model, outcome.report

    first = threading.Thread(target=lambda: notes.append(store.get_or_train(original, request_, slow).note))
    first.start()
    while not list(tmp_path.glob("locks/*.lock")):
        time.sleep(0.01)
    notes.append(
        other.get_or_train(
            original, request_, lambda state_store: pytest.fail("both trained"), waited.set
        ).note
    )
    first.join()
    assert sorted(notes) == ["", ", kept from an earlier run"]


def test_who_waits_for_another_process_can_cancel(original, request_, tmp_path):
    def cancel():
        raise Cancelled("no longer")

    store = StepStore(tmp_path)
    state = store._path("states", "abc")
    with (
        try_locked(lock_of(tmp_path / "locks", state)) as is_ours,
        try_locked(lock_of(tmp_path / "locks", state)) as is_theirs,
    ):
        assert is_ours and not is_theirs
    from cul_core.store.steps import step_key

    with (
        try_locked(lock_of(tmp_path / "locks", store._path("states", step_key(original, request_)))),
        pytest.raises(Cancelled),
    ):
        store.get_or_train(original, request_, None, cancel)


def test_what_is_trained_now_is_neither_evicted_nor_cleared(original, request_, tmp_path):
    store, seen = StepStore(tmp_path, largest_bytes=1, every_seconds=0), []

    def train(state_store):
        state_store.save({"iteration": 1})
        os.utime(state_store.path, (1000, 1000))
        StepStore(tmp_path, largest_bytes=1)._evict()
        seen.append(StepStore(tmp_path).clear("states"))
        assert state_store.path.exists()
        os.utime(state_store.path)
        raise Cancelled("now")

    with pytest.raises(Cancelled):
        store.get_or_train(original, request_, train)
    assert "1 are in use" in seen[0]
    StepStore(tmp_path, largest_bytes=1)._evict()
    (state,) = tmp_path.rglob("*.safetensors")  # a step that was stopped today goes on
    os.utime(state, (1000, 1000))
    StepStore(tmp_path, largest_bytes=1)._evict()
    assert not list(tmp_path.rglob("*.safetensors"))
