"""The step store: nothing finished is trained again, damaged or foreign entries are never trusted, and the size is bounded."""

import os

import pytest
import torch
from safetensors.torch import save_file

from cul_core.anchors import AnchorStore
from cul_core.chain import read_history
from cul_core.diffusion import SamplerConfig
from cul_core.errors import Cancelled, CheckpointError
from cul_core.safetensor_files import read_sealed, write_sealed
from cul_core.store import PARTS, StepState, StepStore, step_key
from cul_core.training import run_step


@pytest.fixture
def trained(random_model, bundles, anchors, make_request):
    def train(target="Candy_Stripes", model=random_model, **settings):
        request = make_request(target, **settings)
        return request, *run_step(model, request, store=anchors, bundles=bundles["random"])

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
        step_key(random_model, request), step_key(edited, request), step_key(random_model, make_request("Lava")),
        step_key(random_model, make_request(seed=1)), step_key(random_model, make_request(retain=("Lava",))),
        step_key(random_model, make_request(learning_rate=1e-5)),
    }  # fmt: skip
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
    assert two.content_hash == second.content_hash and [record.targets for record in two.history] == [("Candy_Stripes",), ("Lava",)]


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


def test_the_oldest_steps_go_first_and_those_in_use_stay(trained, random_model, tmp_path):
    finished = [trained(seed=seed) for seed in range(4)]
    size = None
    for number, (request, edited, report) in enumerate(finished[:3]):
        StepStore(tmp_path).put(random_model, request, edited, report)
        path = tmp_path / "steps" / f"{step_key(random_model, request)}.safetensors"
        size = path.stat().st_size
        os.utime(path, (1000 + number, 1000 + number))
    store = StepStore(tmp_path, largest_bytes=int(2.5 * size))
    assert store.get(random_model, finished[0][0])  # in use from here on, and the most recent
    store.put(random_model, *finished[3])
    assert [StepStore(tmp_path).get(random_model, request) is not None for request, *_ in finished] == [True, False, False, True]


def test_a_store_that_cannot_be_written_says_so_and_leaves_nothing(trained, random_model, tmp_path):
    (tmp_path / "steps").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        StepStore(tmp_path).put(random_model, *trained())
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]


def test_damaged_or_unwritable_anchors_are_drawn_again(random_model, random_bundle, tmp_path, caplog):
    def latents(folder):
        store = AnchorStore(folder)
        return store.anchor_latents(random_model.source, random_bundle, ("a cat",), 2, SamplerConfig(steps=1), 0)

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
    assert [path.parent.name for _, _, path in StepStore(tmp_path).files(*PARTS)] == ["states", "steps", "steps"]
    assert not (tmp_path / "steps/.abc.x.cul-part").exists()


def test_the_store_says_what_is_in_it_and_forgets_what_it_is_told_to(trained, random_model, tmp_path):
    store = StepStore(tmp_path)
    request, edited, report = trained()
    store.put(random_model, request, edited, report)
    state = StepState(tmp_path / "states/abc.safetensors", request, 0)
    state.save({"iteration": 2})
    (tmp_path / "steps/bad.safetensors").write_text("bad")
    text = store.describe()
    assert "2 finished steps" in text and "Candy_Stripes (" in text and "3 iterations" in text and "a damaged file" in text
    assert "1 unfinished steps" in text and "Candy_Stripes (stopped after iteration 2 of 3)" in text
    assert "removed 1 files" in store.clear("states") and not state.path.exists()
    assert "removed 2 files" in store.clear(*PARTS) and "0 finished steps, 0.0 MB" in store.describe()


def test_anchors_go_on_where_they_were_stopped(random_model, random_bundle, tmp_path):
    def latents(folder, stop_after=None, asked=None):
        store = AnchorStore(folder, every_seconds=0)
        done = []
        return store.anchor_latents(random_model.source, random_bundle, ("a cat", "a dog"), 40, SamplerConfig(steps=1), 0,
                                    should_stop=lambda: stop_after is not None and len(done) >= stop_after,
                                    on_batch=lambda made, count: (done.append(made), asked is not None and asked.append(made)))  # fmt: skip

    whole, asked = latents(None), []
    for _ in range(2):
        with pytest.raises(Cancelled):
            latents(tmp_path, 1, asked)
    assert torch.equal(latents(tmp_path, asked=asked), whole)
    assert asked == [16, 32, 40]


def test_a_step_that_an_older_version_has_stored_is_found(trained, random_model, tmp_path):
    request, edited, report = trained()
    store = StepStore(tmp_path)
    store.put(random_model, request, edited, report)
    (path,) = tmp_path.glob("steps/*")
    tensors, metadata = read_sealed(path)
    save_file(tensors, path, metadata)  # has no seal
    found, again = StepStore(tmp_path).get(random_model, request)
    assert found.content_hash == edited.content_hash and again == report
