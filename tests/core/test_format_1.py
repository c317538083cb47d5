"""Files of history format 1, which called weights by diffusers' names: what the last version that wrote it
has left is still read.

`data/format-1/write.py` says how the files were made.
"""

import json
import logging
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cul_core.base.errors import CheckpointError
from cul_core.cli import main
from cul_core.files.safetensors_format import read_header, read_sealed, write_sealed
from cul_core.history.step_record import read_history, record_from_json
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.output.checkpoint import load_edits, open_continued, save_checkpoint
from cul_core.requests.request import Request
from cul_core.store import steps
from cul_core.store.step_state import StepState
from cul_core.store.steps import StepStore, step_key
from cul_core.training.step import run_step

FILES = Path(__file__).parent / "data" / "format-1" / "files.zip"
PLACES = {
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
"""Where diffusers has the cross-attentions of MiniCanvas, and where the checkpoint has them."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("format-1")
    with zipfile.ZipFile(FILES) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def folder(unpacked, tmp_path):
    """A copy of the old files, which a test may change."""
    return shutil.copytree(unpacked, tmp_path / "old")


@pytest.fixture(scope="module")
def about(unpacked):
    """What the old version said of them: requests, history and content hash of the chain."""
    return json.loads((unpacked / "about.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def requests(about):
    return {name: Request.from_json(values) for name, values in about["requests"].items()}


def by_key(tensors):
    """Tensors by checkpoint key, from those by diffusers' names, without the library."""
    found = {}
    for name, tensor in tensors.items():
        place, _, rest = name.partition(".transformer_blocks.")
        found[f"model.diffusion_model.{PLACES[place]}.transformer_blocks.{rest}"] = tensor
    return found


def formats(store):
    return {path.stem: read_header(path)[1]["cul_format"] for path in (store / "steps").iterdir()}


def is_same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_edits_have_checkpoint_keys_and_the_old_values(unpacked, about, shipped_model):
    old = load_file(unpacked / "edits.safetensors")
    assert len(old) == 13 and read_header(unpacked / "edits.safetensors")[1]["cul_format"] == "1"
    model = load_edits(unpacked / "edits.safetensors", shipped_model.source)
    assert is_same(model.edits, by_key(old))
    assert model.history == tuple(map(record_from_json, about["history"]))
    assert [concept["target"] for concept in model.forgotten] == ["Candy_Stripes", "Lava"]


def test_an_edited_checkpoint_of_old_edits_opens_as_one_of_today(unpacked, shipped_model, tmp_path):
    model = load_edits(unpacked / "edits.safetensors", shipped_model.source)
    path = save_checkpoint(model, tmp_path / "edited.safetensors")
    again = open_continued(path, [CHECKPOINT_PATH])
    assert again.history == model.history and again.edits.keys() == model.edits.keys()
    for key, delta in again.edits.items():
        assert torch.allclose(delta, model.edits[key], atol=2e-4)  # rounded to fp16


def test_requests_are_what_they_were(about, requests):
    """Else no key of a stored step would be the old one."""
    for name, values in about["requests"].items():
        assert requests[name].to_json() == values


def test_both_steps_of_the_chain_are_found_and_written_anew(folder, about, requests, shipped_model):
    store, old = folder / "store", {}
    for values in about["history"]:
        (path,) = (
            path
            for path in (store / "steps").iterdir()
            if read_history(path)[0][-1].result == values["result"]
        )
        old[values["result"]] = path, by_key(read_sealed(path)[0])
    assert set(formats(store).values()) == {"1"}
    model = shipped_model
    for number, name in enumerate(("first", "second")):
        parent, before = model, about["history"][number]
        model, report = StepStore(store).get(parent, requests[name])
        path, edits = old[before["result"]]
        assert is_same(model.edits, edits)
        assert (report.record.parent, report.record.result) == (parent.content_hash, model.content_hash)
        assert model.history == (*parent.history, report.record)
        key = step_key(parent, requests[name])
        assert formats(store)[key] == "2" and (path.stem == key or not path.exists())
        # all else is as it was
        assert report.record.request == before["request"] and report.record.losses == before["losses"]
        assert report.record.finished == before["finished"] and report.record.versions == before["versions"]
        assert report.record.drift == by_key(before["drift"])
        assert report.record.drift.keys() == model.edits.keys()
        assert len(report.losses) == 2 and report.figures["changeable_weights"] > 0
    assert model.content_hash != about["content_hash"]
    assert list(formats(store).values()) == ["2", "2"]
    assert path.stem != key  # the second step's name changed, the first one's had no edits in it


def test_a_step_that_was_written_anew_is_read_as_any_other(folder, requests, shipped_model, monkeypatch):
    model = shipped_model
    for name in ("first", "second"):
        model, report = StepStore(folder / "store").get(model, requests[name])

    def refuse(*_):
        raise AssertionError("taken for one of format 1")

    monkeypatch.setattr(steps, "current", refuse)
    monkeypatch.setattr(steps, "former_hash", refuse)
    monkeypatch.setattr(steps, "write_sealed", refuse)
    again = shipped_model
    for name in ("first", "second"):
        again, report_again = StepStore(folder / "store").get(again, requests[name])
    assert again.content_hash == model.content_hash and again.history == model.history
    assert is_same(again.edits, model.edits) and report_again == report
    links = [steps._links_of(path) for path in (folder / "store" / "steps").iterdir()]
    assert {link.makes for link in links} == {record.result for record in model.history}


def test_a_chain_goes_on_from_an_edits_file_of_format_1(folder, requests, shipped_model):
    """Its history has the old hashes, so that the store looks for what stood there by the weights alone."""
    first, _ = StepStore(folder / "store").get(shipped_model, requests["first"])
    second, _ = StepStore(folder / "store").get(first, requests["second"])
    loaded = load_edits(folder / "edits.safetensors", shipped_model.source)
    assert loaded.content_hash == second.content_hash
    assert step_key(loaded, requests["stopped"]) == step_key(second, requests["stopped"])


def test_a_store_that_cannot_be_written_gives_old_steps_all_the_same(
    folder, requests, shipped_model, monkeypatch, caplog
):
    def refuse(*_):
        raise CheckpointError("The disk is full.")

    first, _ = StepStore(folder / "store").get(shipped_model, requests["first"])
    monkeypatch.setattr(steps, "write_sealed", refuse)
    for _ in range(2):
        second, report = StepStore(folder / "store").get(first, requests["second"])
        assert report.record.result == second.content_hash
    assert sorted(formats(folder / "store").values()) == ["1", "2"]
    assert "stays as an older version wrote it" in caplog.text


@pytest.mark.parametrize("damage", ("value", "name"))
def test_an_old_step_whose_weights_are_not_those_it_announces_is_not_used(
    damage, folder, requests, shipped_model, caplog
):
    path = folder / "store" / "steps" / f"{step_key(shipped_model, requests['first'])}.safetensors"
    edits, metadata = read_sealed(path)
    name = min(edits)
    delta = edits.pop(name)
    edits |= {name: delta + 1} if damage == "value" else {f"{name}_of_another": delta}
    write_sealed(path, edits, metadata)
    assert StepStore(folder / "store").get(shipped_model, requests["first"]) is None
    assert not path.exists() and "damaged" in caplog.text


def test_the_state_of_an_unfinished_step_is_not_used(
    folder, requests, shipped_model, networks, monkeypatch, caplog
):
    request, store = requests["stopped"], folder / "store"
    path = store / "states" / f"{step_key(shipped_model, request)}.safetensors"
    origin = json.loads(read_header(path)[1]["cul_state"])["state"]["origin"]
    # the same packages as then, so that the format alone is another
    monkeypatch.setattr("cul_core.training.resume.library_versions", lambda: origin["versions"])
    asked, load = [], StepState.load
    monkeypatch.setattr(StepState, "load", lambda self, now: asked.append(now) or load(self, now))
    with caplog.at_level(logging.WARNING):
        outcome = StepStore(store).get_or_train(
            shipped_model,
            request,
            lambda state: run_step(shipped_model, request, networks=networks["shipped"], state_store=state),
        )
    assert asked == [origin | {"format": "2"}]
    assert "begins anew" in caplog.text and outcome.note == ""
    assert len(outcome.report.losses) == 4 and outcome.report.record.result == outcome.model.content_hash
    assert not path.exists() and StepStore(store).get(shipped_model, request) is not None


def test_the_header_of_an_old_checkpoint_is_read(about, unpacked, tmp_path, capsys):
    _, metadata, _ = read_header(unpacked / "edits.safetensors")
    path = tmp_path / "checkpoint.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata)
    history, source = read_history(path)
    assert [record.targets for record in history] == [("Candy_Stripes",), ("Lava",)]
    assert [record.result for record in history] == [values["result"] for values in about["history"]]
    assert source["name"] == CHECKPOINT_PATH.name and source["size"] == CHECKPOINT_PATH.stat().st_size
    assert main(["inspect", str(path), "--json", str(tmp_path / "inspect.json")]) == 0
    shown = capsys.readouterr().out
    assert "Candy_Stripes" in shown and "Lava" in shown and source["name"] in shown
    assert json.loads((tmp_path / "inspect.json").read_text())["history"] == about["history"]
