"""A step that is stopped, at whatever moment, goes on to the same bits as one that is not; a state that does
not fit is never used."""

import json
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from short import SHORT

from cul_core.base.errors import Cancelled, CheckpointError, MemoryShortError, TrainingError
from cul_core.files.safetensors_format import write_sealed
from cul_core.methods import METHODS
from cul_core.methods.conabl import ConAbl
from cul_core.parts.part import LossTerms
from cul_core.regularizers import REGULARIZERS
from cul_core.requests.presets import PRESETS
from cul_core.store import step_state as step_states
from cul_core.store.step_state import StepState
from cul_core.store.steps import StepStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.resume import joined, split
from cul_core.training.step import run_step

SHORTER = {
    "esd": {"refresh_every": 2},
    "distillation": {"refresh_every": 2},
    "sculpmem": {"warm_up": 2, "interval": 1},
}


def short(config):
    """A config whose mechanics are all seen within five iterations."""
    name = config.registry_name
    values = SHORT.get(name, {}) | SHORTER.get(name, {})
    return replace(config, **values)


def rows():
    yield from (
        pytest.param(entry.config(), (), {}, id=entry.name)
        for entry in METHODS
        if not entry.cls.is_closed_form
    )
    yield from (
        pytest.param(METHODS.get("conabl").config(), (entry.config(),), {}, id=entry.name)
        for entry in REGULARIZERS
    )
    both = tuple(REGULARIZERS.get(name).config() for name in ("selft", "projection", "distillation"))
    sculpmem = METHODS.get("sculpmem").config
    yield pytest.param(
        sculpmem(distillation=1.0, warm_up_form="train"),
        both[1:2],
        {"schedule": "linear"},
        id="sculpmem-projection",
    )
    yield pytest.param(
        sculpmem(loss="sm", importance="abs", form="reference"), (), {"group": "attn2"}, id="sculpmem-sm"
    )
    yield pytest.param(METHODS.get("esd").config(), both, {"weight_decay": 0.01}, id="esd-all")
    yield pytest.param(
        METHODS.get("conabl").config(replay=0.3, preservation=1.0, augmentations=1, flip=True),
        (),
        {"evaluate_every": 2},
        id="measured",
    )


@pytest.fixture
def runner(random_model, random_network, networks, anchors):
    """Runs a request on the random model; further arguments are callbacks.

    `asks` are the questions whether to stop that are answered with no, and then with yes.
    """

    def run(request, state_store=None, asks=None, model=None, **watch):
        count = 0

        def should_stop():
            nonlocal count
            count += 1
            return asks is not None and count > asks

        def measure(network, check):
            check()
            weight = network.weights("text_readers")[
                "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
            ]
            return 50 + 10 * torch.tanh(weight.mean()).item(), 50.0

        networks["random"].last_result.clear()  # as in a program that starts
        callbacks = Callbacks(should_stop=should_stop, **watch)
        edited, report = run_step(
            model or random_model,
            request,
            callbacks=callbacks,
            store=anchors,
            networks=networks["random"],
            measure=measure if request.training.evaluate_every else None,
            state_store=state_store,
        )
        return edited, report, count

    return run


def stopped_again_and_again(runner, request, path, model, asks, seed=0):
    """(edited model, report, how often it was stopped): each time at a random question of the second half of
    its training's `asks`."""
    *_, before = runner(
        replace(request, training=replace(request.training, iterations=0, evaluate_every=0)), model=model
    )
    chosen, stops = random.Random(seed), 0
    while stops < 20:
        try:
            edited, report, _ = runner(
                request, StepState(path, request, 1e9), chosen.randint((before + asks) // 2, asks - 1), model
            )
            return edited, report, stops
        except Cancelled:
            stops += 1
    pytest.fail("no progress")


@pytest.mark.parametrize(("method", "regularizers", "settings"), list(rows()))
def test_every_method_and_regularizer_goes_on_to_the_same_bits(
    method, regularizers, settings, runner, make_request, tmp_path
):
    request = make_request(
        method=short(method), regularizers=map(short, regularizers), **({"iterations": 5} | settings)
    )
    first, *_ = runner(make_request("Lava", iterations=1))
    whole, report, asks = runner(request, model=first)
    resumed, again, stops = stopped_again_and_again(
        runner, request, tmp_path / "state.safetensors", first, asks
    )
    assert stops >= 1 and resumed.content_hash == whole.content_hash
    assert (
        again.losses == report.losses
        and again.figures == report.figures
        and again.record.losses == report.record.losses
    )


def test_every_preset_is_made_of_what_the_table_has():
    for entry in PRESETS.values():
        assert METHODS.of(entry.method) and all(REGULARIZERS.of(config) for config in entry.regularizers)


# --- the tree of a state, as JSON and tensors


def through_a_file(tree):
    plain, tensors = split(tree)
    return joined(json.loads(json.dumps(plain)), tensors)


def same(one, other):
    """Whether two trees are equal, with the same types and the same order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


NAMES_IN_STATES = st.sampled_from(
    ["tensor", "plain", "tuple", "a", "b", "a/b", "/", "", "~", "~1", "~0"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | NAMES_IN_STATES
    | st.integers(0, 99).map(torch.tensor)
)


def branches(children):
    lists = st.lists(children, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(NAMES_IN_STATES, children, max_size=3)


@given(st.recursive(LEAVES, branches, max_leaves=12))
def test_every_tree_comes_back_from_a_file_as_it_was(tree):
    assert same(through_a_file(tree), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": "/a"},
        {"tensor": torch.tensor(1)},
        {"tensor": {"tensor": "x"}},
        {"plain": {"tensor": "x"}},
        {"tuple": [1]},
        {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
        {"a~1b": torch.tensor(1), "a/b": torch.tensor(2), "a~b": torch.tensor(3)},
        {"0": torch.tensor(1)},
        [],
        {},
        (),
        {"a": [], "b": {}, "c": ()},
        (1, (torch.tensor(2), [3])),
        torch.tensor(1),
        float("inf"),
    ],
    ids=repr,
)
def test_what_looks_like_the_files_own_marks_comes_back_too(tree):
    assert same(through_a_file(tree), tree)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"a": {1: 2}}, "'/a' has the key 1"),
        ({"a": {None: 2}}, "'/a' has the key None"),
        ([{1, 2}], "'/0' is a set"),
        ({"a": torch.float32}, "'/a' is a dtype"),
        ({"a": b"x"}, "'/a' is a bytes"),
    ],
    ids=["number as key", "None as key", "set", "dtype", "bytes"],
)
def test_what_would_come_back_as_something_else_is_refused(tree, said, tmp_path, make_request, caplog):
    with pytest.raises(CheckpointError, match=said):
        split(tree)
    state_store = StepState(tmp_path / "a.safetensors", make_request(), 0)
    state_store.save({"iteration": 1, "origin": {}, "parts": tree})
    assert not list(tmp_path.iterdir()) and "the state of the step is not kept" in caplog.text


def test_a_state_of_an_older_version_is_joined_as_before():
    plain = {"parts": [{"seen": 3, "masks": {"a.b": {"tensor": "/parts/0/masks/a.b"}}}], "losses": [1.0]}
    tree = joined(plain, {"/parts/0/masks/a.b": torch.tensor([1, 2])})
    assert same(tree, {"parts": [{"seen": 3, "masks": {"a.b": torch.tensor([1, 2])}}], "losses": [1.0]})
    assert split(tree)[0] == plain


def kept(runner, request, path, after=3):
    """Stops a step at its `after`-th update, which leaves its state in a file."""
    seen = []

    class Stopped(Exception):
        pass

    class Keeper(StepState):
        def offer(self, state):
            seen.append(1)
            if len(seen) == after:
                self.save(state())
                raise Stopped

    with pytest.raises(Stopped):
        runner(request, Keeper(path, request, 1e9))
    return path


def test_a_step_that_is_killed_after_its_last_update_is_measured_and_finished(runner, make_request, tmp_path):
    request = make_request(evaluate_every=3)
    whole, report, _ = runner(request)
    state_store = StepState(kept(runner, request, tmp_path / "s.safetensors"), request, 1e9)
    resumed, again, _ = runner(request, state_store)
    assert (
        state_store.resumed_at == 3
        and resumed.content_hash == whole.content_hash
        and again.figures == report.figures
    )


def test_the_time_of_earlier_runs_counts(runner, make_request, tmp_path):
    request = make_request()
    path = kept(runner, request, tmp_path / "s.safetensors", after=2)

    class Late(StepState):
        def load(self, origin):
            return super().load(origin) | {"seconds": 1000.0}

    _, report, _ = runner(request, Late(path, request, 1e9))
    assert 1000 < report.record.seconds < 1600


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_state_is_removed_and_the_step_begins_anew(runner, make_request, tmp_path, damage, caplog):
    request = make_request()
    whole, *_ = runner(request)
    path = kept(runner, request, tmp_path / "s.safetensors", after=2)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
    else:
        data = b"not a state"
    path.write_bytes(data)
    state_store = StepState(path, request, 1e9)
    assert runner(request, state_store)[0].content_hash == whole.content_hash
    assert state_store.resumed_at == 0 and not path.exists() and "damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("library_versions", lambda: {"torch": "0.1"}), ("FORMAT", "1")],
    ids=["torch", "names"],
)
def test_a_state_of_other_versions_or_another_device_is_not_used(
    name, value, runner, make_request, tmp_path, monkeypatch, caplog
):
    request = make_request()
    whole, *_ = runner(request)
    path = kept(runner, request, tmp_path / "s.safetensors", after=2)
    monkeypatch.setattr(f"cul_core.training.resume.{name}", value)
    state_store = StepState(path, request, 1e9)
    assert runner(request, state_store)[0].content_hash == whole.content_hash
    assert state_store.resumed_at == 0 and "other versions" in caplog.text


def test_a_state_that_does_not_fit_is_refused_in_words(runner, make_request, tmp_path):
    path = kept(runner, make_request(), tmp_path / "s.safetensors", after=2)
    request = make_request(group="attn2")
    with pytest.raises(TrainingError, match="does not fit it .*run the step again"):
        runner(request, StepState(path, request, 1e9))


def test_a_step_that_is_stopped_while_weights_change_keeps_what_it_last_wrote(
    runner, make_request, tmp_path, monkeypatch
):
    request = make_request(iterations=4)
    whole, *_ = runner(request)
    original, path = ConAbl.mask, tmp_path / "s.safetensors"
    calls = []

    def interrupted(self, name, weight):
        calls.append(name)
        if len(calls) == 14 * 2 + 5:  # in the midst of the third update
            raise KeyboardInterrupt
        return original(self, name, weight)

    monkeypatch.setattr(ConAbl, "mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner(request, StepState(path, request, 0))
    state_store = StepState(path, request, 1e9)
    assert runner(request, state_store)[0].content_hash == whole.content_hash and state_store.resumed_at == 2


# --- short memory


@pytest.fixture
def store(tmp_path):
    """A store that writes no state before a step is stopped."""
    return StepStore(tmp_path, every_seconds=1e9)


@pytest.fixture
def get_or_train(runner, random_model):
    """Trains a request in a store; further arguments are callbacks."""

    def run(store, request, **watch):
        return store.get_or_train(
            random_model, request, lambda state_store: runner(request, state_store, **watch)[:2]
        )

    return run


@contextmanager
def memory_runs_out(network, is_time):
    """Every call of the UNet runs out of memory while `is_time()`."""

    def fail(unet, inputs):
        if is_time():
            raise torch.OutOfMemoryError("out of memory, as injected by a test")

    handle = network.unet.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def runs_out_after(updates, network, store, request, get_or_train, is_time=lambda: True, **watch):
    """The error of a step whose memory runs out once this many updates are done and `is_time()`."""
    seen = []
    with memory_runs_out(network, lambda: len(seen) >= updates and is_time()):
        with pytest.raises(MemoryShortError) as caught:
            get_or_train(store, request, on_progress=seen.append, **watch)
    assert len(seen) == updates
    return str(caught.value)


def test_a_step_out_of_memory_goes_on_to_its_bits(runner, get_or_train, random_network, make_request, store):
    request = make_request(iterations=10)
    whole, report, _ = runner(request)
    said = runs_out_after(9, random_network, store, request, get_or_train)
    assert said.startswith("The memory of cpu is too short")
    assert said.endswith("run the step again with more free memory, it goes on from iteration 9 of 10.")
    outcome = get_or_train(store, request)
    assert outcome.note == ", resumed at iteration 9"
    assert outcome.model.content_hash == whole.content_hash and outcome.report.losses == report.losses
    assert not store.files("states")


def test_memory_that_ends_before_any_update_leaves_no_state(
    get_or_train, random_network, make_request, store
):
    said = runs_out_after(0, random_network, store, make_request(), get_or_train)
    assert "too short" in said and "goes on" not in said and not store.files("states")


def test_a_preview_out_of_memory_leaves_a_state(runner, get_or_train, random_network, make_request, store):
    request, watch = make_request(iterations=4), {"preview_prompts": ("a cat",), "preview_every": 2}
    whole, *_ = runner(request)

    def is_drawn():
        return not torch.is_grad_enabled()

    said = runs_out_after(2, random_network, store, request, get_or_train, is_drawn, **watch)
    assert said.endswith("it goes on from iteration 2 of 4.")
    outcome = get_or_train(store, request, **watch)
    assert outcome.note == ", resumed at iteration 2" and outcome.model.content_hash == whole.content_hash


def test_memory_that_ends_in_a_measurement_leaves_the_state(runner, get_or_train, make_request, store):
    request = make_request(iterations=4, evaluate_every=2)
    whole, *_ = runner(request)
    with pytest.MonkeyPatch.context() as patch:

        def measured(*_):
            raise torch.OutOfMemoryError("out of memory, as injected by a test")

        patch.setattr("cul_core.training.step.EarlyStopping.is_time", measured)
        with pytest.raises(MemoryShortError, match=r"it goes on from iteration 1 of 4\.$"):
            get_or_train(store, request)
    outcome = get_or_train(store, request)
    assert outcome.note == ", resumed at iteration 1" and outcome.model.content_hash == whole.content_hash


def test_memory_that_runs_out_while_weights_change_leaves_the_state_that_was_written_last(
    runner, get_or_train, make_request, tmp_path, monkeypatch
):
    request, store, calls = make_request(iterations=4), StepStore(tmp_path, every_seconds=0), []
    whole, *_ = runner(request)
    original = ConAbl.mask

    def mask(self, name, weight):
        calls.append(name)
        if len(calls) == 14 * 2 + 5:  # in the midst of the third update
            raise torch.OutOfMemoryError("out of memory, as injected by a test")
        return original(self, name, weight)

    monkeypatch.setattr(ConAbl, "mask", mask)
    with pytest.raises(MemoryShortError, match=r"it goes on from iteration 2 of 4\.$"):
        get_or_train(store, request)
    outcome = get_or_train(store, request)
    assert outcome.note == ", resumed at iteration 2" and outcome.model.content_hash == whole.content_hash


def test_a_loss_that_became_nan_leaves_no_state(get_or_train, make_request, tmp_path, monkeypatch):
    store, original, calls = StepStore(tmp_path, every_seconds=0), ConAbl.loss, []

    def loss(self, *arguments):
        calls.append(len(store.files("states")))
        loss = original(self, *arguments)
        return LossTerms(loss.total * (float("nan") if len(calls) == 3 else 1), loss.terms)

    monkeypatch.setattr(ConAbl, "loss", loss)
    with pytest.raises(TrainingError, match="became nan at iteration 3"):
        get_or_train(store, make_request())
    assert calls == [0, 1, 1] and not store.files("states")


# --- stopping while a state takes long to write


class Disk:
    """Takes the place of `time` in the store; every state that is written takes `seconds`."""

    def __init__(self):
        self.now, self.seconds, self.written = 0.0, 0.0, []

    def write(self, path, tensors, metadata):
        write_sealed(path, tensors, metadata)
        if "cul_state" in metadata:
            self.now += self.seconds
            self.written.append(json.loads(metadata["cul_state"])["state"]["iteration"])

    def monotonic(self):
        return self.now

    def time_ns(self):
        return int(self.now * 1e9)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(step_states, "write_sealed", disk.write)
    monkeypatch.setattr(step_states, "time", disk)
    return disk


def stopped_after(updates, disk, store, request, get_or_train, seconds_each=1000.0):
    """States that were written of a step that is cancelled after this many updates."""

    def on_progress(progress):
        disk.now += seconds_each
        if progress.iteration == updates:
            raise Cancelled("now")

    with pytest.raises(Cancelled):
        get_or_train(store, request, on_progress=on_progress)
    return disk.written


@pytest.mark.parametrize(
    ("seconds", "lost", "written"),
    [(0.5, 0.1, [2, 3]), (4.0, 100.0, [2, 3]), (4.0, 1.0, [2]), (40.0, 100.0, [2])],
    ids=["quick", "slower than that", "slower than what is lost", "slow"],
)
def test_who_cancels_waits_briefly(seconds, lost, written, disk, get_or_train, runner, make_request, store):
    request, offer = make_request(iterations=5), StepState.offer
    whole, *_ = runner(request)
    disk.seconds, offers = seconds, []

    def offer_at_two(self, state):
        offers.append(state)
        self._due = disk.now + (len(offers) != 2)
        offer(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepState, "offer", offer_at_two)
        assert stopped_after(3, disk, store, request, get_or_train, lost) == written
    outcome = get_or_train(store, request)
    assert outcome.note == f", resumed at iteration {written[-1]}"
    assert outcome.model.content_hash == whole.content_hash


@pytest.mark.parametrize(("speed", "written"), [(1e9, [3]), (1e3, [])], ids=["small", "large"])
def test_the_first_is_judged_by_size(speed, written, disk, get_or_train, make_request, store, monkeypatch):
    monkeypatch.setattr(step_states, "_BYTES_PER_SECOND", speed)
    assert stopped_after(3, disk, store, make_request(iterations=5), get_or_train) == written


def test_short_memory_keeps_any_state(disk, get_or_train, random_network, make_request, store, monkeypatch):
    monkeypatch.setattr(step_states, "_BYTES_PER_SECOND", 1e3)
    runs_out_after(2, random_network, store, make_request(), get_or_train)
    assert disk.written == [2]


def test_a_tree_is_the_same_after_it_was_taken_apart():
    tree = {"a": [torch.ones(2), {"b": torch.zeros(1), "c": None}], "d": -float("inf"), "e": [], "f": {}}
    plain, tensors = split(tree)
    assert sorted(tensors) == ["/a/0", "/a/1/b"] and "tensor" in plain["a"][0]
    again = joined(plain, tensors)
    assert (
        torch.equal(again["a"][0], tree["a"][0])
        and again["a"][1]["c"] is None
        and (again["d"], again["e"], again["f"])
        == (
            -float("inf"),
            [],
            {},
        )
    )
