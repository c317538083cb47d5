"""The step store: nothing finished is trained again, damaged or foreign entries are never trusted, and the
size is bounded."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from cul_core.base.bounded_cache import BoundedCache
from cul_core.base.errors import Cancelled, CheckpointError
from cul_core.files.safetensors_format import read_sealed, write_sealed
from cul_core.history.step_record import StepRecord, read_history
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.mergers.merge import merge
from cul_core.mergers.uniform import UniformConfig
from cul_core.models.sampling import SamplerConfig
from cul_core.store import eviction
from cul_core.store.anchors import AnchorStore
from cul_core.store.step_state import StepState
from cul_core.store.steps import PARTS, StepStore, step_key
from cul_core.training.step import StepReport, run_step


@pytest.fixture
def trained(random_model, networks, anchors, make_request):
    def train(target="Candy_Stripes", model=random_model, **settings):
        request = make_request(target, **settings)
        return request, *run_step(model, request, store=anchors, networks=networks["random"])

    return train


def test_a_finished_step_comes_back_the_same_from_another_store_object(trained, random_model, tmp_path):
    request, edited, report = trained()
    assert StepStore(tmp_path).get(random_model, request) is None
    StepStore(tmp_path).put(random_model, request, edited, report)
    found, again = StepStore(tmp_path).get(random_model, request)
    assert found.content_hash == edited.content_hash and found.history == edited.history
    assert all(torch.equal(found.edits[name], edited.edits[name]) for name in edited.edits)
    assert again == report
    (path,) = tmp_path.rglob("*.safetensors")
    assert read_history(path)[0] == edited.history  # like every file we write, it explains itself


def test_the_key_changes_with_everything_the_result_depends_on(trained, random_model, make_request):
    request, edited, _ = trained()
    keys = {
        step_key(random_model, request),
        step_key(edited, request),
        step_key(random_model, make_request("Lava")),
        step_key(random_model, make_request(seed=1)),
        step_key(random_model, make_request(retain=("Lava",))),
        step_key(random_model, make_request(learning_rate=1e-5)),
    }
    assert len(keys) == 6
    assert step_key(random_model, make_request()) == step_key(random_model, request)


def test_a_chain_from_the_store_has_the_history_of_the_chain_that_asks(trained, random_model, tmp_path):
    store = StepStore(tmp_path)
    first_request, first, first_report = trained()
    second_request, second, second_report = trained("Lava", model=first)
    store.put(random_model, first_request, first, first_report)
    store.put(first, second_request, second, second_report)
    one, _ = store.get(random_model, first_request)
    two, _ = store.get(one, second_request)
    assert two.content_hash == second.content_hash and [record.targets for record in two.history] == [
        ("Candy_Stripes",),
        ("Lava",),
    ]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_entry_is_removed_and_trained_again(trained, random_model, tmp_path, damage, caplog):
    request, edited, report = trained()
    StepStore(tmp_path).put(random_model, request, edited, report)
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-100]
    elif damage == "flipped":
        data[-5] ^= 1
    else:
        data = data.replace(b'"cul_step"', b'"cul_stop"')
    path.write_bytes(data)
    assert StepStore(tmp_path).get(random_model, request) is None
    assert not path.exists() and "damaged" in caplog.text


@pytest.fixture
def new_process(monkeypatch):
    """Begins one: what the process before it has used is held no longer."""

    def begin(hours_later=0.0, folder=None):
        monkeypatch.setattr(eviction, "_holders", {})
        for path in folder.rglob("*.safetensors") if folder else ():
            stamp = path.stat().st_mtime_ns - int(hours_later * 3600e9)
            os.utime(path, ns=(stamp, stamp))

    return begin


STEP_BYTES = 400_000
BOUND = int(6.3 * STEP_BYTES)  # room for six steps, as 8 GiB are for SDXL's


def made_step(model, request):
    """A step without its training."""
    number = len(model.history) + 1
    edits = {"w": torch.full((STEP_BYTES // 4,), float(number + request.training.seed))}
    result = UnlearnModel(model.source, model.family, edits).content_hash
    record = StepRecord(request.to_json(), {}, {}, model.content_hash, result, 1.0, "2025-01-01", {})
    return model.with_step(edits, record), StepReport(record, (0.5,), {})


def grow(folder, model, requests, largest=BOUND):
    """(the end of the chain, how many of its steps were trained), each step with a store object of its own,
    as nodes have it."""
    count = 0
    for request in requests:

        def train(state_store, model=model, request=request):
            nonlocal count
            count += 1
            state_store.save({"iteration": 1, "weights": torch.zeros(3 * STEP_BYTES // 4)})
            return made_step(model, request)

        model = StepStore(folder, largest).get_or_train(model, request, train).model
    return model, count


@pytest.fixture
def chain_of(make_request):
    return lambda count, seed=0: [
        make_request(f"Target {number}", seed=100 * seed) for number in range(count)
    ]


@pytest.mark.parametrize("length", [6, 7, 12, 30])
def test_a_chain_that_runs_again_trains_nothing_however_long_it_is(
    length, chain_of, random_model, new_process, tmp_path
):
    assert grow(tmp_path, random_model, chain_of(length))[1] == length
    assert grow(tmp_path, random_model, chain_of(length))[1] == 0
    new_process(hours_later=1000, folder=tmp_path)
    assert grow(tmp_path, random_model, chain_of(length))[1] == 0


def test_a_branch_that_runs_first_costs_the_other_branch_nothing(
    chain_of, random_model, new_process, tmp_path
):
    assert grow(tmp_path, random_model, chain_of(12))[1] == 12
    new_process()
    assert grow(tmp_path, random_model, chain_of(4, seed=1))[1] == 4
    assert grow(tmp_path, random_model, chain_of(12))[1] == 0


def test_the_chain_that_was_used_longest_ago_goes_from_its_end(chain_of, random_model, new_process, tmp_path):
    first, second = chain_of(3, seed=1), chain_of(3, seed=2)
    grow(tmp_path, random_model, first)
    grow(tmp_path, random_model, second)
    grow(tmp_path, random_model, first)
    new_process(hours_later=25, folder=tmp_path)
    grow(tmp_path, random_model, chain_of(2, seed=3))
    assert stored_numbers(tmp_path, random_model, second) == [0]
    assert stored_numbers(tmp_path, random_model, first) == [0, 1, 2]
    new_process(hours_later=25, folder=tmp_path)
    grow(tmp_path, random_model, chain_of(3, seed=4))
    assert stored_numbers(tmp_path, random_model, second) == []
    assert stored_numbers(tmp_path, random_model, first) == [0]


def stored_numbers(folder, model, requests):
    """Numbers of a chain's steps that are stored."""
    found = []
    for number, request in enumerate(requests):
        if (folder / "steps" / f"{step_key(model, request)}.safetensors").is_file():
            found.append(number)
        model = made_step(model, request)[0]
    return found


def test_a_step_stays_while_an_unfinished_one_that_builds_on_it_is_used(
    chain_of, random_model, new_process, tmp_path
):
    """Another process trains the third step for more than a day; of the first two nothing was used
    meanwhile."""
    *before, last = chain_of(3)
    model, _ = grow(tmp_path, random_model, before)
    new_process(hours_later=100, folder=tmp_path)

    def train(state_store):
        state_store.save({"iteration": 1})
        new_process()
        grow(tmp_path, random_model, chain_of(6, seed=1))
        raise Cancelled("now")

    with pytest.raises(Cancelled):
        StepStore(tmp_path, BOUND).get_or_train(model, last, train)
    assert stored_numbers(tmp_path, random_model, before) == [0, 1]


def test_models_behind_a_merge_stay_with_the_step_that_builds_on_it(
    chain_of, make_request, random_model, new_process, tmp_path
):
    branches = [chain_of(2, seed=seed) for seed in (1, 2)]
    merged = merge([grow(tmp_path, random_model, branch)[0] for branch in branches], UniformConfig())
    new_process(hours_later=100, folder=tmp_path)
    grow(tmp_path, merged, [make_request("last")])
    new_process()
    grow(tmp_path, random_model, chain_of(6, seed=3))
    assert [stored_numbers(tmp_path, random_model, branch) for branch in branches] == [[0, 1], [0, 1]]


def test_a_step_that_cannot_be_removed_keeps_what_it_builds_on(
    chain_of, random_model, new_process, tmp_path, monkeypatch
):
    grow(tmp_path, random_model, chain_of(4))
    new_process(hours_later=25, folder=tmp_path)
    last = max((tmp_path / "steps").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    unlink = os.unlink

    def refuse(path, *args, **kwargs):
        if os.fspath(path) == str(last):
            raise PermissionError(13, "it is open")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refuse)
    grow(tmp_path, random_model, chain_of(5, seed=1))
    assert stored_numbers(tmp_path, random_model, chain_of(4)) == [0, 1, 2, 3]


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """A disk of the given size that the store has for itself."""

    def make(total):
        def disk_of(folder):
            used = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
            return eviction.Disk(total, max(0, total - used))

        monkeypatch.setattr(eviction, "disk_of", disk_of)

    return make


def test_the_bound_follows_the_disk(disk, chain_of, random_model, new_process, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "LEAST_BOUND", BOUND)
    disk(4 * 2 * BOUND)
    grow(tmp_path, random_model, chain_of(8), None)
    new_process(hours_later=25, folder=tmp_path)
    grow(tmp_path, random_model, chain_of(2, seed=1), None)
    assert len(stored_numbers(tmp_path, random_model, chain_of(8))) == 8
    disk(4 * BOUND)
    new_process(hours_later=25, folder=tmp_path)
    grow(tmp_path, random_model, chain_of(3, seed=2), None)
    assert stored_numbers(tmp_path, random_model, chain_of(8)) == [0]


def test_a_nearly_full_disk_keeps_the_beginning_of_the_chain_and_its_reserve(
    disk, chain_of, random_model, new_process, tmp_path
):
    total = 8 * STEP_BYTES
    disk(total)
    grow(tmp_path, random_model, chain_of(1, seed=1))  # used just now, but by another process
    new_process()

    def run():
        model, count = random_model, 0
        for request in chain_of(9):

            def train(state_store, model=model, request=request):
                nonlocal count
                count += 1
                return made_step(model, request)

            outcome = StepStore(tmp_path, BOUND).get_or_train(model, request, train)
            notes.append(outcome.note)
            model = outcome.model
            used = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
            assert total - used >= eviction.Disk(total, 0).reserve - 20_000  # but for headers
        return count

    notes = []
    assert run() == 9
    kept = stored_numbers(tmp_path, random_model, chain_of(9))
    assert kept == list(range(len(kept))) and 3 <= len(kept) < 9
    assert "Not kept for later runs: No space left" in notes[-1] and "free some space" in notes[-1]
    assert stored_numbers(tmp_path, random_model, chain_of(1, seed=1)) == []
    assert run() == 9 - len(kept)


def test_a_step_takes_the_place_of_its_state_on_a_nearly_full_disk(disk, chain_of, random_model, tmp_path):
    disk(int(3.5 * STEP_BYTES))
    (request,) = chain_of(1)

    def train(state_store):
        state_store.save({"iteration": 1, "weights": torch.zeros(3 * STEP_BYTES // 4)})
        return made_step(random_model, request)

    assert StepStore(tmp_path).get_or_train(random_model, request, train).note == ""
    assert stored_numbers(tmp_path, random_model, [request]) == [0] and not list(
        tmp_path.glob("states/*.safetensors")
    )


def test_a_disk_that_does_not_tell_its_room_is_written(monkeypatch, chain_of, random_model, tmp_path):
    def untold(place):
        raise OSError(38, "not implemented")

    monkeypatch.setattr(eviction.shutil, "disk_usage", untold)
    assert grow(tmp_path / "a", random_model, chain_of(2), None)[1] == 2
    assert grow(tmp_path / "a", random_model, chain_of(2), None)[1] == 0
    monkeypatch.setattr(
        eviction.shutil, "disk_usage", lambda place: type("Usage", (), {"total": 0, "free": 0})
    )
    assert grow(tmp_path / "b", random_model, chain_of(2), None)[1] == 2
    assert grow(tmp_path / "b", random_model, chain_of(2), None)[1] == 0


def test_files_from_the_clocks_future_age_again(chain_of, random_model, new_process, tmp_path, monkeypatch):
    now = time.time_ns()
    grow(tmp_path, random_model, chain_of(3, seed=1))
    # the clock was eleven years ahead, and is right again
    new_process(hours_later=-100_000, folder=tmp_path)
    grow(tmp_path, random_model, chain_of(5, seed=2))
    assert stored_numbers(tmp_path, random_model, chain_of(3, seed=1)) == [0, 1, 2]
    assert max(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")) < now + int(3600e9)
    new_process(hours_later=25, folder=tmp_path)
    grow(tmp_path, random_model, chain_of(1, seed=3))
    assert stored_numbers(tmp_path, random_model, chain_of(3, seed=1)) == []


def test_the_oldest_steps_go_first_and_those_in_use_stay(new_process, trained, random_model, tmp_path):
    finished = [trained(seed=seed) for seed in range(4)]
    size = None
    for number, (request, edited, report) in enumerate(finished[:3]):
        StepStore(tmp_path).put(random_model, request, edited, report)
        path = tmp_path / "steps" / f"{step_key(random_model, request)}.safetensors"
        size = path.stat().st_size
        os.utime(path, (1000 + number, 1000 + number))
    new_process()
    store = StepStore(tmp_path, largest_bytes=int(2.5 * size))
    assert store.get(random_model, finished[0][0])  # in use from here on, and the most recent
    store.put(random_model, *finished[3])
    assert [StepStore(tmp_path).get(random_model, request) is not None for request, *_ in finished] == [
        True,
        False,
        False,
        True,
    ]


def test_a_store_that_cannot_be_written_says_so_and_leaves_nothing(trained, random_model, tmp_path):
    (tmp_path / "steps").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        StepStore(tmp_path).put(random_model, *trained())
    assert {path.name for path in tmp_path.iterdir()} == {"steps", "locks"}


def test_damaged_or_unwritable_anchors_are_drawn_again(random_model, random_network, tmp_path, caplog):
    def latents(folder):
        store = AnchorStore(folder)
        return store.anchor_latents(
            random_model.source, random_network, ("a cat",), 2, SamplerConfig(steps=1), 0
        )

    first = latents(tmp_path / "anchors")
    (path,) = (tmp_path / "anchors").iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    assert torch.equal(latents(tmp_path / "anchors"), first) and "damaged" in caplog.text
    assert torch.equal(latents(tmp_path / "anchors"), first)
    (tmp_path / "file").write_text("in the way")
    assert torch.equal(latents(tmp_path / "file"), first) and "not kept" in caplog.text


def test_everything_is_bounded_and_the_least_recently_used_goes_first(trained, random_model, tmp_path):
    request, edited, report = trained()
    for number, part in enumerate(("anchors", "states", "steps")):
        path = tmp_path / part / f"{'anchors-' if part == 'anchors' else ''}{number}00.safetensors"
        write_sealed(path, {"x": torch.ones(1000)}, {})
        os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / "steps/.abc.x.cul-part").write_bytes(b"half")
    size = path.stat().st_size
    clean = StepStore(tmp_path / "other")
    clean.put(random_model, request, edited, report)
    own = sum(size for _, size, _ in clean.files("steps"))
    StepStore(tmp_path, largest_bytes=own + 2 * size).put(random_model, request, edited, report)
    assert [path.parent.name for _, _, path in StepStore(tmp_path).files(*PARTS)] == [
        "states",
        "steps",
        "steps",
    ]
    assert not (tmp_path / "steps/.abc.x.cul-part").exists()


def test_the_store_says_what_is_in_it_and_forgets_what_it_is_told_to(trained, random_model, tmp_path):
    store = StepStore(tmp_path)
    request, edited, report = trained()
    store.put(random_model, request, edited, report)
    state = StepState(tmp_path / "states/abc.safetensors", request, 0)
    state.save({"iteration": 2})
    (tmp_path / "steps/bad.safetensors").write_text("bad")
    text = store.describe()
    assert (
        "2 finished steps" in text
        and "Candy_Stripes (" in text
        and "3 iterations" in text
        and "a damaged file" in text
    )
    assert "1 unfinished steps" in text and "Candy_Stripes (stopped after iteration 2 of 3)" in text
    assert "removed 1 files" in store.clear("states") and not state.path.exists()
    assert "removed 2 files" in store.clear(*PARTS) and "0 finished steps, 0.0 MB" in store.describe()


def test_anchors_go_on_where_they_were_stopped(random_model, random_network, tmp_path):
    def latents(folder, stop_after=None, asked=None):
        store = AnchorStore(folder, every_seconds=0)
        done = []
        return store.anchor_latents(
            random_model.source,
            random_network,
            ("a cat", "a dog"),
            40,
            SamplerConfig(steps=1),
            0,
            should_stop=lambda: stop_after is not None and len(done) >= stop_after,
            on_batch=lambda made, count: (done.append(made), asked is not None and asked.append(made)),
        )

    whole, asked = latents(None), []
    for _ in range(2):
        with pytest.raises(Cancelled):
            latents(tmp_path, 1, asked)
    assert torch.equal(latents(tmp_path, asked=asked), whole)
    assert asked == [16, 32, 40]


@pytest.mark.parametrize("on_disk", [True, False])
def test_anchors_in_memory_are_bounded_and_come_back_the_same(
    on_disk, random_model, random_network, tmp_path, monkeypatch
):
    store, drawn = AnchorStore(tmp_path if on_disk else None), []

    def latents(seed):
        sampler = SamplerConfig(steps=1)
        return store.anchor_latents(
            random_model.source,
            random_network,
            ("a cat",),
            2,
            sampler,
            seed,
            on_batch=lambda *_: drawn.append(seed),
        )

    first = latents(0)
    monkeypatch.setattr("cul_core.store.anchors._MEMORY_BYTES", 3 * first.nbytes)
    for seed in (1, 2, 0, 3):
        latents(seed)
        assert store._memory.nbytes <= 3 * first.nbytes
    assert drawn == [0, 1, 2, 3]
    latents(0)
    latents(1)
    assert drawn == [0, 1, 2, 3] + ([] if on_disk else [1])
    assert torch.equal(latents(0), first)
    monkeypatch.setattr("cul_core.store.anchors._MEMORY_BYTES", first.nbytes - 1)
    latents(4)
    assert store._memory.nbytes == 0 and torch.equal(latents(0), first)


def test_a_cache_counts_the_bytes_of_what_it_holds():
    cache = BoundedCache(len)
    for key, value in (("a", b"xx"), ("b", b"xxx"), ("a", b"xxxxx"), ("c", b"x")):
        cache.put(key, value)
    assert cache.nbytes == 9 and list(cache) == ["b", "a", "c"]
    assert cache.get("b") == b"xxx" and cache.get("d") is None
    cache.shrink(4)
    assert list(cache) == ["c", "b"] and cache.nbytes == 4
    cache.clear()
    assert cache.nbytes == len(cache) == 0


def test_a_step_that_an_older_version_has_stored_is_found(trained, random_model, tmp_path):
    request, edited, report = trained()
    store = StepStore(tmp_path)
    store.put(random_model, request, edited, report)
    (path,) = tmp_path.glob("steps/*")
    tensors, metadata = read_sealed(path)
    save_file(tensors, path, metadata)  # has no seal
    found, again = StepStore(tmp_path).get(random_model, request)
    assert found.content_hash == edited.content_hash and again == report
