"""Files: what is written is exact and complete or not there at all; what is damaged or foreign is refused by
name."""

import errno
import json
import os
import re
import struct
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_layout import sd2_shapes, write_hollow

from cul_core.base.errors import Cancelled, CheckpointError, ModelError, TrainingError
from cul_core.files import safetensors_format
from cul_core.files.safetensors_format import packed_header, read_header, write_sealed
from cul_core.history.step_record import StepRecord, read_history
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods.conabl import ConAbl
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.build_diffusers import _warn_of_newer, require_diffusers
from cul_core.models.families.unet_layout import UNET_PREFIX
from cul_core.models.load_diffusers import NetworkCache, checkpoint_key_map, load_network
from cul_core.models.recognize import detect_family
from cul_core.models.source import source_of
from cul_core.models.weight_roles import keys_with_role
from cul_core.output.checkpoint import (
    difference,
    load_edits,
    open_continued,
    open_model,
    save_checkpoint,
    save_edits,
)
from cul_core.store.model_snapshots import snapshot_model
from cul_core.training.step import run_step


def with_edits(model, request, scale=0.01):
    """The model as a step might leave it: every key and value matrix moved at random, with a record of it."""
    header, _, _ = read_header(model.source.path)
    generator = torch.Generator().manual_seed(len(model.history))
    edits = {
        key: scale * torch.randn(header[key]["shape"], generator=generator)
        for key in keys_with_role(model.family, "text_readers", header)
    }
    result = UnlearnModel(model.source, model.family, edits).content_hash
    record = StepRecord(
        request.to_json(),
        {"unlearn": 0.5},
        {name: [1.0, 1.0] for name in edits},
        model.content_hash,
        result,
        1.5,
        "2026-01-02T03:04:05+00:00",
        {"torch": "2"},
    )
    return model.with_step(edits, record)


def tensor_bytes(path):
    header, _, start = read_header(path)
    data = path.read_bytes()[start:]
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


def recast(source, path, dtype):
    """A copy of a checkpoint in another dtype, with a header of its own."""
    save_file(
        {name: tensor.to(dtype) for name, tensor in load_file(source).items()},
        path,
        metadata={"license": "none"},
    )
    return path


@pytest.fixture
def edited(random_model, make_request):
    return with_edits(random_model, make_request())


@pytest.fixture
def saved(edited, tmp_path):
    return save_checkpoint(edited, tmp_path / "edited.safetensors")


# --- the edited checkpoint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_checkpoint_differs_from_its_source_only_in_the_edited_tensors(
    random_checkpoint, make_request, tmp_path, dtype
):
    model = with_edits(
        open_model(recast(random_checkpoint, tmp_path / "source.safetensors", dtype)), make_request()
    )
    path = save_checkpoint(model, tmp_path / "edited.safetensors")

    (before, old_metadata, _), (after, metadata, _) = read_header(model.source.path), read_header(path)
    assert after == before
    assert old_metadata.items() <= metadata.items()
    # keys and values of seven cross-attentions: two down, one in the middle, four up
    assert len(model.edits) == 14
    old, new = tensor_bytes(model.source.path), tensor_bytes(path)
    assert {key for key in old if old[key] != new[key]} == set(model.edits)
    bases, weights = load_file(model.source.path), load_file(path)
    loaded = load_network(path).weights("all")
    for name, delta in model.edits.items():
        expected = (bases[name].float() + delta).to(dtype)
        assert torch.equal(weights[name], expected)
        assert torch.equal(loaded[name], expected.float())


def test_header_tells_history_and_hashes_of_parent_and_result(random_model, edited, saved):
    history, made_from = read_history(saved)
    assert history == edited.history
    assert history[0].targets == ("Candy_Stripes",) and history[0].request == edited.history[0].request
    assert (history[0].parent, history[0].result) == (random_model.content_hash, edited.content_hash)
    assert made_from == {
        "name": random_model.source.path.name,
        "size": random_model.source.size,
        "sha256": random_model.source.sha256,
    }


def test_header_holds_no_path(random_model, edited, saved, tmp_path):
    for path in (saved, save_edits(edited, tmp_path / "edits.safetensors")):
        header = path.read_bytes()[8 : read_header(path)[2]].decode()
        assert random_model.source.path.name in header
        assert "/" not in header and "\\\\" not in header


def test_existing_file_is_never_overwritten(edited, saved, tmp_path):
    before = saved.read_bytes()
    assert save_checkpoint(edited, saved) == tmp_path / "edited_2.safetensors"
    assert save_edits(edited, saved) == tmp_path / "edited_3.safetensors"
    assert saved.read_bytes() == before


def test_edit_that_is_not_finite_is_refused_before_anything_is_written(edited, tmp_path):
    name = min(edited.edits)
    broken = edited.edits[name].clone()
    broken[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=f"{name}.*not finite"):
        save_checkpoint(
            replace(edited, edits={**edited.edits, name: broken}), tmp_path / "new" / "a.safetensors"
        )
    assert list(tmp_path.iterdir()) == []


def test_edit_too_large_for_the_dtype_of_the_file_is_refused(random_model, make_request, tmp_path):
    with pytest.raises((TrainingError, CheckpointError)):
        save_checkpoint(with_edits(random_model, make_request(), scale=1e6), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("calls", [0, 3])
def test_systems_that_cannot_copy_inside_the_kernel_write_the_same_bytes(
    edited, tmp_path, monkeypatch, calls
):
    monkeypatch.setattr("cul_core.output.checkpoint._CHUNK", 1 << 16)
    usual = save_checkpoint(edited, tmp_path / "usual.safetensors").read_bytes()
    left, copy = [None] * calls, getattr(os, "copy_file_range", None)

    def fail(*arguments):
        if not left:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        left.pop()
        return copy(*arguments)

    monkeypatch.setattr("os.copy_file_range", fail, raising=False)
    assert save_checkpoint(edited, tmp_path / "other.safetensors").read_bytes() == usual


# --- writing that is interrupted


def test_cancelled_writing_leaves_nothing_behind(edited, tmp_path, monkeypatch):
    monkeypatch.setattr("cul_core.output.checkpoint._CHUNK", 1 << 16)
    calls = []

    def cancel():
        calls.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        if len(calls) == 40:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        save_checkpoint(edited, tmp_path / "a.safetensors", on_chunk=cancel)
    assert calls[-1] > 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [save_checkpoint, save_edits])
def test_full_disk_is_reported_and_leaves_nothing_behind(edited, tmp_path, monkeypatch, write):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="'a.safetensors' could not be written .*No space left"):
        write(edited, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_reported(edited, tmp_path):
    (tmp_path / "taken").write_text("keep me")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(edited, tmp_path / "taken" / "a.safetensors")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep me"]


def test_source_that_was_exchanged_since_it_was_opened_is_refused(random_checkpoint, make_request, tmp_path):
    source = tmp_path / "source.safetensors"
    source.write_bytes(random_checkpoint.read_bytes())
    model = with_edits(open_model(source), make_request())
    source.write_bytes(random_checkpoint.read_bytes()[:-4096] + bytes(4096))
    with pytest.raises(ModelError, match="source.safetensors"):
        save_checkpoint(model, tmp_path / "a.safetensors")


# --- files that are refused


def truncated(source, folder):
    (folder / "cut.safetensors").write_bytes(source.read_bytes()[:-1000])
    return folder / "cut.safetensors"


def cut_within_the_header(source, folder):
    (folder / "stub.safetensors").write_bytes(source.read_bytes()[:100])
    return folder / "stub.safetensors"


def too_long(source, folder):
    (folder / "long.safetensors").write_bytes(source.read_bytes() + b"more")
    return folder / "long.safetensors"


def missing(source, folder):
    return folder / "nowhere.safetensors"


def a_folder(source, folder):
    (folder / "folder.safetensors").mkdir()
    return folder / "folder.safetensors"


def garbage(source, folder):
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder / "noise.safetensors"


def empty(source, folder):
    (folder / "empty.safetensors").touch()
    return folder / "empty.safetensors"


def pickled(source, folder):
    (folder / "model.ckpt").write_bytes(source.read_bytes())
    return folder / "model.ckpt"


def _with_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def header_that_is_a_list(source, folder):
    return _with_header(folder / "list.safetensors", [1, 2])


def header_without_offsets(source, folder):
    return _with_header(
        folder / "offsets.safetensors", {"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}
    )


def header_without_shapes(source, folder):
    return _with_header(folder / "shapes.safetensors", {"a": {"data_offsets": [0, 4]}}, bytes(4))


def another_kind_of_model(source, folder):
    save_file({"lora_up.weight": torch.zeros(4, 4)}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def another_width(source, folder):
    tensors = load_file(source) | {f"{UNET_PREFIX}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    save_file(tensors, folder / "wide.safetensors")
    return folder / "wide.safetensors"


BAD_FILES = [
    truncated,
    cut_within_the_header,
    too_long,
    missing,
    a_folder,
    garbage,
    empty,
    pickled,
    header_that_is_a_list,
    header_without_offsets,
    header_without_shapes,
    another_kind_of_model,
    another_width,
]


@pytest.mark.parametrize("make", BAD_FILES, ids=lambda make: make.__name__)
def test_file_that_is_no_usable_checkpoint_is_refused_by_name(random_checkpoint, tmp_path, make):
    path = make(random_checkpoint, tmp_path)
    with pytest.raises(ModelError, match=path.name):
        open_model(path)


def without_a_unet_tensor(tensors):
    del tensors[f"{UNET_PREFIX}out.2.bias"]


def without_a_text_tensor(tensors):
    del tensors[next(name for name in tensors if name.endswith("token_embedding.weight"))]


def without_an_autoencoder_tensor(tensors):
    del tensors[next(name for name in tensors if "taesd_decoder" in name)]


def with_a_tensor_of_another_shape(tensors):
    tensors[f"{UNET_PREFIX}out.2.bias"] = torch.zeros(5)


@pytest.mark.parametrize(
    "spoil",
    [
        without_a_unet_tensor,
        without_a_text_tensor,
        without_an_autoencoder_tensor,
        with_a_tensor_of_another_shape,
    ],
)
def test_checkpoint_with_missing_or_misshapen_tensors_is_refused_by_name(random_checkpoint, tmp_path, spoil):
    tensors = load_file(random_checkpoint)
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(ModelError, match="spoilt.safetensors"):
        load_network(tmp_path / "spoilt.safetensors")


def test_checkpoint_whose_tensors_overlap_is_refused_by_name(random_checkpoint, tmp_path):
    header, _, start = read_header(random_checkpoint)
    first, second, *_ = header
    header[first]["data_offsets"] = header[second]["data_offsets"]
    path = _with_header(tmp_path / "overlap.safetensors", header, random_checkpoint.read_bytes()[start:])
    with pytest.raises(ModelError, match=path.name):
        load_network(path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"cul_format": "99"}, "history format '99'"),
        ({"cul_history": "[{"}, "history in 'odd.safetensors' is damaged"),
        ({"cul_history": '[{"target": "Lava"}]'}, "history in 'odd.safetensors' is damaged"),
        ({"cul_source": "null"}, "history in 'odd.safetensors' is damaged"),
    ],
)
def test_history_that_cannot_be_read_is_refused(random_checkpoint, edited, tmp_path, entries, said):
    save_file(
        load_file(random_checkpoint), tmp_path / "odd.safetensors", metadata=edited.metadata() | entries
    )
    with pytest.raises(CheckpointError, match=said):
        open_model(tmp_path / "odd.safetensors", random_checkpoint)


# --- coming back


def test_edits_come_back_bit_for_bit(random_model, edited, tmp_path):
    back = load_edits(save_edits(edited, tmp_path / "edits.safetensors"), random_model.source)
    assert back.content_hash == edited.content_hash and back.history == edited.history
    assert back.edits.keys() == edited.edits.keys()
    assert all(
        torch.equal(back.edits[name], delta) and delta.dtype == torch.float32
        for name, delta in edited.edits.items()
    )


def test_edits_of_another_source_are_refused(random_checkpoint, edited, tmp_path):
    other = source_of(recast(random_checkpoint, tmp_path / "other.safetensors", torch.float32))
    path = save_edits(edited, tmp_path / "edits.safetensors")
    with pytest.raises(
        CheckpointError,
        match=f"'edits.safetensors' belong to '{random_checkpoint.name}', not to 'other.safetensors'",
    ):
        load_edits(path, other)
    with pytest.raises(CheckpointError, match="belong to 'no model'"):
        load_edits(random_checkpoint, other)


def test_equal_file_elsewhere_is_the_same_source(random_checkpoint, edited, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(random_checkpoint.read_bytes())
    back = load_edits(save_edits(edited, tmp_path / "edits.safetensors"), source_of(copy))
    assert back.source.path == copy and back.content_hash == edited.content_hash


def test_opened_checkpoint_keeps_its_history_and_counts_its_weights_as_pretrained(edited, saved):
    opened = open_model(saved)
    assert opened.history == edited.history and opened.source.path == saved and not opened.edits


def test_earlier_targets_of_an_opened_checkpoint_are_previous_ones_of_the_next_step(
    saved, make_request, monkeypatch
):
    class BlankAnchors:
        def anchor_latents(self, source, network, prompts, count, *others, **settings):
            return torch.zeros(count, *network.family.latent_shape)

    class Seen(Exception):
        pass

    def look(method, context):
        raise Seen(context)

    monkeypatch.setattr(ConAbl, "prepare", look)
    with pytest.raises(Seen) as caught:
        run_step(open_model(saved), make_request("Lava"), store=BlankAnchors())
    context = caught.value.args[0]
    assert [concept.target for concept in context.previous] == ["Candy_Stripes"]
    assert all(torch.equal(weight, context.pretrained[name]) for name, weight in context.start.items())


def test_with_its_source_at_hand_the_edits_come_back_within_fp16_rounding(random_checkpoint, edited, saved):
    opened = open_model(saved, random_checkpoint)
    assert opened.history == edited.history and opened.source.path == random_checkpoint
    assert opened.edits.keys() == edited.edits.keys()
    bases = load_file(random_checkpoint)
    for name, delta in edited.edits.items():
        # rounding to fp16 is at most half a unit in the last of 11 significant bits, or 2^-25 where numbers
        # are subnormal
        bound = (bases[name].float() + delta).abs() * 2**-11 + 2**-25
        assert ((opened.edits[name] - delta).abs() <= bound).all()
    assert difference(random_checkpoint, random_checkpoint) == {}


def test_edits_of_format_1_whose_names_are_diffusers_own_are_the_same_model(random_model, edited, tmp_path):
    path = save_edits(edited, tmp_path / "edits.safetensors")
    names = {key: name for name, key in checkpoint_key_map(random_model.source.path).items()}
    old = {names[key]: delta for key, delta in load_file(path).items()}
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight" in old
    save_file(old, path, metadata=edited.metadata() | {"cul_format": "1"})
    found = load_edits(path, random_model.source)
    assert found.content_hash == edited.content_hash and found.history == edited.history
    save_file(
        old | {"conv_out.weird": torch.zeros(4)}, path, metadata=edited.metadata() | {"cul_format": "1"}
    )
    with pytest.raises(CheckpointError, match="conv_out.weird.*fits no weight"):
        load_edits(path, random_model.source)


def test_pretrained_file_that_the_checkpoint_was_not_made_from_is_refused(random_checkpoint, saved, tmp_path):
    other = recast(random_checkpoint, tmp_path / "other.safetensors", torch.float32)
    with pytest.raises(
        ModelError,
        match=f"'other.safetensors' is not .* '{saved.name}' was made from; .*{random_checkpoint.name}",
    ):
        open_model(saved, other)


def test_pretrained_file_for_a_checkpoint_that_does_not_say_where_it_is_from_is_refused(
    random_checkpoint, tmp_path
):
    other = recast(random_checkpoint, tmp_path / "other.safetensors", torch.float32)
    with pytest.raises(ModelError, match="other.safetensors"):
        open_model(random_checkpoint, other)


def test_chain_continued_from_disk_equals_the_chain_in_memory(
    random_model, make_request, anchors, networks, tmp_path
):
    shared = {"store": anchors, "networks": networks["random"]}
    first, _ = run_step(random_model, make_request(), **shared)
    reloaded = load_edits(save_edits(first, tmp_path / "first.safetensors"), random_model.source)
    in_memory, _ = run_step(first, make_request("Lava", retain=("Navy_Stripes",), seed=1), **shared)
    from_disk, _ = run_step(reloaded, make_request("Lava", retain=("Navy_Stripes",), seed=1), **shared)

    assert in_memory.content_hash == from_disk.content_hash
    assert len({random_model.content_hash, first.content_hash, in_memory.content_hash}) == 3
    history, _ = read_history(save_checkpoint(from_disk, tmp_path / "second.safetensors"))
    assert [record.targets for record in history] == [("Candy_Stripes",), ("Lava",)]
    assert [record.parent for record in history] == [random_model.content_hash, first.content_hash]
    assert [record.result for record in history] == [first.content_hash, in_memory.content_hash]


def test_path_may_be_given_as_text(edited, random_checkpoint, tmp_path):
    path = save_checkpoint(edited, str(tmp_path / "a.safetensors"))
    assert isinstance(path, Path) and open_model(str(path), str(random_checkpoint)).edits


def test_an_edited_checkpoint_goes_on_from_its_original_where_that_is_at_hand(
    edited, saved, random_checkpoint, tmp_path
):
    stranger = tmp_path / random_checkpoint.name
    stranger.write_bytes(random_checkpoint.read_bytes()[:-2] + b"\0\1")
    assert open_continued(saved, [stranger]).edits == {}
    found = open_continued(saved, [stranger, random_checkpoint])
    assert found.source.path == random_checkpoint and found.edits.keys() == edited.edits.keys()
    assert open_continued(random_checkpoint, [saved]).edits == {}


def test_callers_entries_join_the_header_but_never_replace_the_history(edited, tmp_path):
    path = save_checkpoint(
        edited, tmp_path / "e.safetensors", metadata={"workflow": "{}", "cul_history": "forged"}
    )
    _, metadata, _ = read_header(path)
    assert metadata["workflow"] == "{}" and read_history(path)[0] == edited.history


# --- the one package that only the library and the command line need

ROOT = Path(__file__).parents[2]
WANTED = "diffusers>=0.33,<0.36"


@pytest.fixture
def installed(monkeypatch):
    """`installed(version)` makes the library believe that diffusers has it, or is missing (None)."""

    def install(found):
        def version(name):
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr("cul_core.models.build_diffusers.version", version)
        _warn_of_newer.cache_clear()

    yield install
    _warn_of_newer.cache_clear()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "is not installed"),
        ("0.32.9", "has version 0.32.9"),
        ("0.4.2", "has version 0.4.2"),
        ("", "has version ''"),
    ],
)
def test_a_missing_or_old_diffusers_is_named_with_the_command_that_mends_it(installed, found, said, caplog):
    installed(found)
    with pytest.raises(ModelError) as caught:
        require_diffusers()
    assert said in str(caught.value)
    assert str(caught.value).endswith(f'run: {sys.executable} -m pip install "{WANTED}"')
    assert caplog.text == ""


def test_the_command_works_where_the_interpreters_path_has_spaces(installed, monkeypatch):
    installed(None)
    monkeypatch.setattr(sys, "executable", r"C:\Program Files\ComfyUI\python_embeded\python.exe")
    with pytest.raises(ModelError) as caught:
        require_diffusers()
    assert f'run: "{sys.executable}" -m pip install "{WANTED}"' in str(caught.value)


@pytest.mark.parametrize("found", ["0.33.0", "0.35.2", "0.39.0", "0.42.1", "0.42.9.dev0"])
def test_tested_versions_are_taken_in_silence(installed, found, caplog):
    installed(found)
    require_diffusers()
    assert caplog.text == ""


@pytest.mark.parametrize("found", ["0.43.0", "0.100.0", "1.0", "9.9.1"])
def test_a_newer_diffusers_is_used_with_one_warning_and_nobody_is_sent_to_an_older_one(
    installed, found, caplog
):
    installed(found)
    for _ in range(3):
        require_diffusers()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"diffusers {found} is newer than 0.42" in caplog.text and "it is used anyway" in caplog.text
    assert "install" not in caplog.text


def test_everything_that_asks_for_diffusers_asks_for_the_same(installed):
    installed(None)
    with pytest.raises(ModelError) as caught:
        require_diffusers()
    assert f'"{WANTED}"' in str(caught.value)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert WANTED in pyproject["project"]["optional-dependencies"]["demo"]
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert set(re.findall(r"diffusers[<>=!~][^\"\s]*", text)) == {WANTED}


# --- one writer of headers


def test_equal_tensors_and_metadata_make_equal_files_whoever_writes_them(edited, tmp_path):
    """The order of a dict, or of a hash table, changes no byte."""
    first = save_edits(edited, tmp_path / "a.safetensors").read_bytes()
    turned = UnlearnModel(edited.source, edited.family, dict(reversed(edited.edits.items())), edited.history)
    for number in range(8):
        assert save_edits(turned, tmp_path / f"{number}.safetensors").read_bytes() == first


def test_every_writer_packs_its_header_by_the_same_function(edited, tmp_path, monkeypatch):
    packed = []

    def pack(name, *arguments, **named):
        packed.append(name)
        return packed_header(name, *arguments, **named)

    for module in ("files.safetensors_format", "store.model_snapshots", "output.checkpoint"):
        monkeypatch.setattr(f"cul_core.{module}.packed_header", pack)
    save_checkpoint(edited, tmp_path / "checkpoint.safetensors")
    save_edits(edited, tmp_path / "edits.safetensors")
    write_sealed(tmp_path / "sealed.safetensors", edited.edits, {})
    snapshot_model(tmp_path, edited.edits)
    assert packed[:3] == ["checkpoint.safetensors", "edits.safetensors", "sealed.safetensors"]
    assert len(packed) == 4


def test_a_header_is_padded_so_that_data_begin_where_they_are_asked_to():
    for length in range(40):
        text = packed_header("a", {}, {"x": "x" * length})
        assert len(text) % 8 == 0 and json.loads(text[8:]) == {"__metadata__": {"x": "x" * length}}
        aligned = packed_header("a", {}, {"x": "x" * length}, alignment=4096, start=5000)
        assert len(aligned) % 4096 == 5000 - 4096


# --- how often a file is read


@pytest.fixture
def headers_read(monkeypatch):
    read, parsed = [], safetensors_format._checked
    monkeypatch.setattr(safetensors_format, "_checked", lambda text: read.append(len(text)) or parsed(text))
    return read


def test_a_checkpoint_is_opened_with_one_look_into_it_and_one_when_it_is_hashed(headers_read):
    model = open_continued(CHECKPOINT_PATH, [])
    assert len(headers_read) == 2
    headers_read.clear()
    NetworkCache().get(model.source)
    assert len(headers_read) == 2


def test_a_written_checkpoint_is_opened_with_one_look_into_it(edited, tmp_path, headers_read):
    saved = save_checkpoint(edited, tmp_path / "saved.safetensors")
    edits = save_edits(edited, tmp_path / "edits.safetensors")
    headers_read.clear()
    again = open_continued(saved, [saved, edited.source.path])
    assert again.source == edited.source and len(headers_read) == 5  # 3 for both files, 2 to compare them
    headers_read.clear()
    load_edits(edits, edited.source)
    assert len(headers_read) == 2


def test_the_family_of_a_checkpoint_is_known_after_one_look(tmp_path, headers_read):
    path = write_hollow(tmp_path / "sd2.safetensors", sd2_shapes())
    assert detect_family(path).name == "sd2" and len(headers_read) == 1
