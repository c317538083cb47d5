"""Files that somebody made to do harm: each is refused in one sentence, whatever reads it, and nothing in it
is trusted."""

import json
import os
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from refusals import entry, is_one_sentence, refused, write_file
from safetensors.torch import load_file, save_file

from cul_core.base.errors import CheckpointError, ConfigError, ModelError
from cul_core.cli import main
from cul_core.concepts.concept import Concept
from cul_core.files.atomic_write import write_atomically
from cul_core.files.paths import free_path
from cul_core.files.safetensors_format import check_header, read_header, write_sealed
from cul_core.history.step_record import read_history
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.mergers.merge import merge
from cul_core.mergers.ties import TiesConfig
from cul_core.methods.conabl import ConAblConfig
from cul_core.minicanvas.family import MINI
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.families.unet_layout import UNET_PREFIX
from cul_core.models.load_diffusers import load_network
from cul_core.models.recognize import detect_family
from cul_core.models.source import source_of
from cul_core.output.charts import labelled_grid
from cul_core.output.checkpoint import load_edits, open_continued, open_model, save_checkpoint, save_edits
from cul_core.output.report import history_text, model_text
from cul_core.requests.request import Request
from cul_core.store.step_state import StepState

GOOD = {"a": entry()}
FOUR = bytes(4)


def text_of(header):
    return json.dumps(header).encode()


def nested(depth):
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


HEADERS = {
    # lengths
    "length 0": (b"", b"", 0),
    "length 1": (b"{}", b"", 1),
    "length 2^63": (GOOD, FOUR, 1 << 63),
    "length 2^64 - 1": (GOOD, FOUR, (1 << 64) - 1),
    "length 2^31": (GOOD, FOUR, 1 << 31),
    "length of the file": (GOOD, FOUR, len(text_of(GOOD)) + 12),
    "one byte over the file": (GOOD, FOUR, len(text_of(GOOD)) + 5),
    "one byte into the data": (GOOD, FOUR, len(text_of(GOOD)) + 1),
    "one byte short": (GOOD, FOUR, len(text_of(GOOD)) - 1),
    # what is not the JSON of the format
    "nested 500": (nested(500),),
    "nested 100,000": (nested(100_000),),
    "objects nested": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000,),
    "a list": (b"[1, 2]",),
    "a string": (b'"abc"',),
    "a number": (b"12",),
    "null": (b"null",),
    "empty braces and more": (b"{}{}",),
    "key twice": (b'{"a":%s,"a":%s}' % ((text_of(entry()),) * 2), FOUR),
    "part of an entry twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{"x":"y"},"a":%s}' % text_of(entry()), FOUR),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR),
    "Infinity": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', FOUR),
    "-Infinity": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-Infinity,4]}}', FOUR),
    "5000 digits": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000), FOUR),
    "byte order mark": (b"\xef\xbb\xbf" + text_of(GOOD), FOUR),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), FOUR),
    "UTF-32": (json.dumps(GOOD).encode("utf-32"), FOUR),
    "leading spaces": (b"  " + text_of(GOOD), FOUR),
    "leading NUL": (b"\0" + text_of(GOOD), FOUR),
    "trailing NUL": (text_of(GOOD) + b"\0", FOUR),
    "latin-1": (b'{"a\xe9":{}}',),
    "cut UTF-8": (b'{"a\xf0\x9f":{}}',),
    "overlong UTF-8": (b'{"a\xc0\xaf":{}}',),
    "surrogate in UTF-8": (b'{"\xed\xa0\x80":{}}',),
    "lone surrogate": (b'{"\\ud800":%s}' % text_of(entry()), FOUR),
    "single quotes": (b"{'a': 1}",),
    "comment": (b'{/**/"a":1}',),
    "trailing comma": (b'{"a":%s,}' % text_of(entry()), FOUR),
    "control character": (b'{"a\n":%s}' % text_of(entry()), FOUR),
    # metadata
    **{
        f"metadata {value}": ({"__metadata__": value, **GOOD}, FOUR)
        for value in (
            1,
            True,
            [],
            "text",
            {"a": 1},
            {"a": None},
            {"a": {}},
            {"a": ["b"]},
            {"a": True},
            0,
            "",
            False,
        )
    },
    "metadata with a lone surrogate": (b'{"__metadata__":{"a":"\\udfff"},"a":%s}' % text_of(entry()), FOUR),
    # entries
    **{f"entry {value}": ({"a": value}, FOUR) for value in (None, 1, "x", [], {}, True, 1.5)},
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "more keys": ({"a": {**entry(), "x": 1}}, FOUR),
    **{
        f"dtype {value}": ({"a": entry(dtype=value)}, FOUR)
        for value in (
            "f32",
            "F128",
            "",
            "X" * 10_000,
            None,
            32,
            ["F32"],
            {"F32": 1},
            "object",
            "O",
            "float32",
            "F32\0",
        )
    },
    **{
        f"shape {value}": ({"a": {**entry(), "shape": value}}, FOUR)
        for value in (
            None,
            1,
            "1",
            {},
            {"1": 1},
            [True],
            [1.0],
            [-1],
            ["1"],
            [None],
            [[1]],
            [2],
            [0],
            [1, 1, 2],
            [1 << 62],
            [1 << 63],
            [1 << 64],
            [1 << 32, 1 << 32],
            [-1, -1],
            [0, 1 << 63],
            [1 << 62, 1 << 62, 0],
            [10**400],
        )
    },
    "shape overflows to 4": ({"a": entry((1 << 62, 1 << 62, 1 << 62), (0, 4))}, FOUR),
    "a thousand huge dimensions": ({"a": entry([10**18] * 1000, (0, 4))}, FOUR),
    **{
        f"offsets {value}": ({"a": {**entry(), "data_offsets": value}}, FOUR)
        for value in (
            None,
            4,
            "04",
            [],
            [0],
            [0, 4, 8],
            {"0": 0, "1": 4},
            [4, 0],
            [-4, 0],
            [0, -4],
            [0.0, 4.0],
            [False, 4],
            ["0", "4"],
            [None, 4],
            [0, 1 << 63],
            [1 << 63, (1 << 63) + 4],
            [0, 10**400],
            [0, 3],
            [0, 5],
            [1, 5],
            [4, 8],
            [[0], [4]],
        )
    },
    "overlap": ({"a": entry((2,), (0, 8)), "b": entry((2,), (4, 12))}, bytes(12)),
    "the same place": ({"a": entry(), "b": entry()}, FOUR),
    "one within the other": ({"a": entry((3,), (0, 12)), "b": entry((1,), (4, 8))}, bytes(12)),
    "gap": ({"a": entry(), "b": entry((1,), (8, 12))}, bytes(12)),
    "gap at the beginning": ({"a": entry((1,), (4, 8))}, bytes(8)),
    "data behind the end": (GOOD, bytes(8)),
    "data missing": (GOOD, bytes(3)),
    "no data": (GOOD, b""),
    "odd half bytes": ({"a": entry((1,), (0, 1), "F4")}, b"\0"),
    "dtype too wide": ({"a": entry((1,), (0, 4), "F64")}, FOUR),
    "dtype too narrow": ({"a": entry((1,), (0, 4), "F16")}, FOUR),
    "empty beyond the end": ({**GOOD, "b": entry((0,), (8, 8))}, FOUR),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_the_format_does_not_allow_is_refused(tmp_path, count, name):
    path = write_file(tmp_path / "bad.safetensors", *HEADERS[name])
    for read in (read_header, open_model, read_history):
        error = refused(lambda read=read: read(path))
        assert isinstance(error, ModelError) and "bad.safetensors" in str(error)
    count("bad inputs")


def test_what_the_format_allows_is_read(tmp_path):
    allowed = {
        "b": entry((1,), (0, 4)),
        "a": entry((2, 2), (4, 12), "BF16"),
        "empty": entry((0, 1 << 40), (4, 4)),
        "scalar": entry((), (12, 14), "F16"),
        "quarter": entry((2,), (14, 15), "F4"),
        "name \0 " + "x" * 10_000: entry((3,), (15, 18), "U8"),
    }
    for metadata in ({}, {"": "", "key": "\u0000 any text \U0001f600"}):
        header = allowed | ({"__metadata__": metadata} if metadata else {})
        path = write_file(tmp_path / "good.safetensors", text_of(header) + b"   ", bytes(18))
        entries, found, start = read_header(path)
        assert entries == allowed and found == metadata and start == path.stat().st_size - 18
    assert (
        read_header(write_file(tmp_path / "null.safetensors", {"__metadata__": None, **GOOD}, FOUR))[1] == {}
    )


def worst_headers():
    """(what to do with it, text), one at a time: up to sixty megabytes each."""
    many = 300_000
    yield "read", b'{"__metadata__":{"a":"\xf0\x9f\x98\x80' + b"x" * 49_000_000 + b'"}}'
    yield "refused", b'{"a":[' + b",".join([b"[]"] * many) + b"]}"
    yield "refused", b'{"a":[' + b",".join([b"[]"] * 9_000_000) + b"]}"
    yield "refused", b'{"a":[' + b"1," * 24_000_000 + b"1]}"
    yield "refused", b"{" + b",".join(b'"%d":{}' % i for i in range(many)) + b"}"
    yield (
        "read",
        b"{"
        + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(many // 3))
        + b"}",
    )
    yield "refused", b'{"a":' + b"[" * 9_000_000 + b"]" * 9_000_000 + b"}"
    yield "read", b"{" + b" " * 49_000_000 + b"}"
    yield "refused", b"{" + b" " * 60_000_000 + b"}"


_READ = """
import resource, sys
from pathlib import Path
from cul_core.base.errors import ModelError
from cul_core.files.safetensors_format import read_header

mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 600_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for path in sys.argv[1:]:
    try:
        read_header(Path(path))
        print("read")
    except ModelError as error:
        print("refused", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does it")
def test_the_largest_and_worst_headers_cost_bounded_memory_and_time(tmp_path, count):
    paths, expected = [], []
    for i, (verdict, text) in enumerate(worst_headers()):
        paths.append(tmp_path / f"{i}.safetensors")
        paths[-1].write_bytes(struct.pack("<Q", len(text)) + text)
        expected.append(verdict)
    done = subprocess.run(
        [sys.executable, "-c", _READ, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == expected
    assert all(is_one_sentence(line) for line in said if line.startswith("refused"))
    count("bad inputs", expected.count("refused"))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"harm")


def pickled(path):
    path.write_bytes(b"\x80\x04}\x94\x8c\x05state\x94]\x94s.")


DISGUISED = {
    "zip": zipped,
    "pickle": pickled,
    "torch": lambda path: torch.save({"a": torch.zeros(3)}, path),
    "empty": Path.touch,
    "seven bytes": lambda path: path.write_bytes(bytes(7)),
    "eight bytes": lambda path: path.write_bytes(bytes(8)),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 9),
    "html": lambda path: path.write_text("<!doctype html><title>404</title>" * 9),
    "folder": Path.mkdir,
    "GGUF": lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + bytes(99)),
    "PNG": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
    "FIFO": os.mkfifo if hasattr(os, "mkfifo") else Path.touch,
    "loop": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a folder": lambda path: path.symlink_to("."),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "sparse terabyte": lambda path: os.truncate(write_file(path, GOOD), 1 << 40),
}


@pytest.mark.parametrize("kind", DISGUISED)
def test_what_only_has_the_name_of_a_model_is_refused_without_waiting(tmp_path, count, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path("odd.safetensors")
    DISGUISED[kind](path)
    for read in (open_model, read_history, source_of):
        assert "odd.safetensors" in str(refused(lambda read=read: read(path)))
    count("bad inputs")


@pytest.mark.parametrize(
    "name",
    [
        "a\0b.safetensors",
        "x" * 5000 + ".safetensors",
        "x" * 300 + ".safetensors",
        "\ud800.safetensors",
        "a/" * 3000,
    ],
)
def test_a_path_that_no_system_knows_is_refused(tmp_path, count, name):
    for use in (
        open_model,
        read_history,
        free_path,
        lambda path: write_atomically(path, lambda file: file.write(b"x")),
    ):
        refused(lambda use=use: use(tmp_path / name))
        count("bad inputs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "/", "."])
def test_a_path_without_a_name_is_not_written(count, name):
    for use in (free_path, lambda path: write_atomically(path, lambda file: file.write(b"x"))):
        refused(lambda use=use: use(Path(name)))
        count("bad inputs")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path, count, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(CHECKPOINT_PATH.read_bytes())
    assert "pickle" in str(refused(lambda: open_model(path)))
    count("bad inputs")


# --- links: reading goes through them, for users link folders of models; writing never does


def test_a_model_behind_links_is_read(tmp_path):
    (tmp_path / "folder").symlink_to(CHECKPOINT_PATH.parent, target_is_directory=True)
    (tmp_path / "linked.safetensors").symlink_to(tmp_path / "folder" / CHECKPOINT_PATH.name)
    assert open_model(tmp_path / "linked.safetensors").source.sha256 == source_of(CHECKPOINT_PATH).sha256


def test_writing_never_goes_through_a_link(tmp_path, edited, count):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    for name, target in (("to-a-file.safetensors", outside), ("broken.safetensors", tmp_path / "new.txt")):
        (folder / name).symlink_to(target)
        assert save_edits(edited, folder / name).name == name.replace(".", "_2.")
        write_atomically(folder / name, lambda file: file.write(b"{}"))
        assert not (folder / name).is_symlink() and (folder / name).read_bytes() == b"{}"
        count("bad inputs")
    assert outside.read_text() == "mine" and not (tmp_path / "new.txt").exists()


# --- checkpoints that are well-formed and not what they claim


@pytest.fixture(scope="module")
def shipped():
    return load_file(CHECKPOINT_PATH)


@pytest.fixture(scope="module")
def model():
    return open_model(CHECKPOINT_PATH)


@pytest.fixture(scope="module")
def edited(model):
    names = (
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight",
    )
    parameters = load_network(CHECKPOINT_PATH).weights("all")
    made = UnlearnModel(
        model.source, model.family, {name: torch.full_like(parameters[name].data, 0.01) for name in names}
    )
    return merge([made], TiesConfig())


def first_conv(tensors, value):
    return tensors | {f"{UNET_PREFIX}input_blocks.0.0.weight": value}


def to_k(tensors):
    return next(
        name
        for name in sorted(tensors)
        if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight")
    )


SPOILT = {
    "scalar first layer": lambda t: first_conv(t, torch.zeros(())),
    "flat first layer": lambda t: first_conv(t, torch.zeros(64)),
    "empty first layer": lambda t: first_conv(t, torch.zeros(0, 4, 3, 3)),
    "five dimensions": lambda t: first_conv(t, torch.zeros(64, 4, 3, 3, 1)),
    "nine channels": lambda t: first_conv(t, torch.zeros(64, 9, 3, 3)),
    "scalar key": lambda t: t | {to_k(t): torch.zeros(())},
    "flat key": lambda t: t | {to_k(t): torch.zeros(192)},
    **{
        f"UNet in {dtype}": lambda t, dtype=dtype: t | {to_k(t): t[to_k(t)].to(dtype)}
        for dtype in (torch.int8, torch.int64, torch.float64, torch.bool, torch.complex64, torch.float8_e5m2)
    },
}
MISSHAPEN = {
    "no key": lambda t: {name: value for name, value in t.items() if name != to_k(t)},
    "square key": lambda t: t | {to_k(t): torch.zeros(5, 192)},
    "strange name": lambda t: t | {f"{UNET_PREFIX}input_blocks.x.y.z": torch.zeros(1)},
    "far block": lambda t: t | {f"{UNET_PREFIX}input_blocks.99999999.0.in_layers.0.weight": torch.zeros(1)},
    "prefix only": lambda t: t | {UNET_PREFIX: torch.zeros(1)},
    "dots": lambda t: t | {f"{UNET_PREFIX}......": torch.zeros(1)},
    "scalar text": lambda t: (
        t | {next(name for name in t if name.endswith("token_embedding.weight")): torch.zeros(())}
    ),
    "no text": lambda t: {name: value for name, value in t.items() if "cond_stage" not in name},
    "no picture": lambda t: {name: value for name, value in t.items() if "first_stage" not in name},
    "scalar picture": lambda t: t | {next(name for name in t if "taesd_decoder" in name): torch.zeros(())},
    "doubled conv": lambda t: t | {f"{UNET_PREFIX}out.2.weight": torch.zeros(8, 64, 3, 3)},
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_unet_of_another_shape_or_dtype_is_refused_at_once(tmp_path, shipped, count, kind):
    save_file(SPOILT[kind](shipped), tmp_path / "spoilt.safetensors")
    assert "spoilt.safetensors" in str(refused(lambda: open_model(tmp_path / "spoilt.safetensors")))
    count("bad inputs")


@pytest.mark.parametrize("kind", MISSHAPEN)
def test_tensors_that_do_not_fit_are_refused_when_they_are_loaded(tmp_path, shipped, count, kind):
    save_file(MISSHAPEN[kind](shipped), tmp_path / "spoilt.safetensors")
    assert "spoilt.safetensors" in str(refused(lambda: load_network(tmp_path / "spoilt.safetensors")))
    count("bad inputs")


@pytest.mark.parametrize("kind", ["no key", "square key", "broadcast"])
def test_a_checkpoint_that_claims_another_as_its_source_must_have_its_shapes(
    tmp_path, shipped, edited, count, kind
):
    change = MISSHAPEN.get(kind, lambda t: t | {f"{UNET_PREFIX}out.2.bias": torch.zeros(1)})
    path = tmp_path / "claims.safetensors"
    save_file(change(shipped), path, metadata=edited.metadata())
    assert "claims.safetensors" in str(refused(lambda: open_model(path, CHECKPOINT_PATH)))
    count("bad inputs")


EDITS = {
    "unknown name": lambda e: {"../../etc/passwd": torch.zeros(2)},
    "other shape": lambda e: {min(e): torch.zeros(3)},
    "broadcast": lambda e: {min(e): torch.zeros(1, 1)},
    "half": lambda e: {name: value.half() for name, value in e.items()},
    "integers": lambda e: {name: value.long() for name, value in e.items()},
    "empty": lambda e: {min(e): torch.zeros(0)},
    "double": lambda e: {name: value.double() for name, value in e.items()},
    "diffusers' name": lambda e: {"conv_out.bias": torch.zeros(4)},
    "another part's key": lambda e: {"first_stage_model.taesd_decoder.1.bias": torch.zeros(64)},
}


def test_damaged_neighbours_do_not_keep_a_checkpoint_from_being_opened(tmp_path, edited, count):
    path = save_checkpoint(edited, tmp_path / "edited.safetensors")
    (tmp_path / "damaged").mkdir()
    cut = tmp_path / "damaged" / CHECKPOINT_PATH.name
    os.truncate(write_file(cut, GOOD), CHECKPOINT_PATH.stat().st_size)
    for neighbour in (tmp_path / "nowhere" / CHECKPOINT_PATH.name, cut):
        assert open_continued(path, [neighbour]).edits == {}
        assert open_continued(path, [neighbour, CHECKPOINT_PATH]).source.path == CHECKPOINT_PATH
        count("bad inputs")


@pytest.mark.parametrize("kind", EDITS)
def test_edits_that_fit_no_weight_of_their_source_are_refused(tmp_path, model, edited, count, kind):
    path = tmp_path / "edits.safetensors"
    save_file(EDITS[kind](dict(edited.edits)), path, metadata=edited.metadata())
    assert isinstance(refused(lambda: load_edits(path, model.source)), CheckpointError)
    count("bad inputs")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_edits_that_are_not_finite_are_neither_merged_nor_saved(tmp_path, model, edited, count, value):
    broken = model.with_step(
        {name: torch.full_like(delta, value) for name, delta in edited.edits.items()}, edited.history[0]
    )
    back = load_edits(save_edits(broken, tmp_path / "edits.safetensors"), model.source)
    refused(lambda: merge([back, edited], TiesConfig()))
    refused(lambda: save_checkpoint(back, tmp_path / "out.safetensors"))
    count("bad inputs", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["edits.safetensors"]


def test_a_header_that_could_not_be_read_again_is_not_written(tmp_path, edited, count):
    assert isinstance(
        refused(lambda: save_checkpoint(edited, tmp_path / "a.safetensors", metadata={"x": "[" * 1_100_000})),
        CheckpointError,
    )
    count("bad inputs")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError):
        check_header(b" " * 50_000_001)


UNREADABLE = {
    "a million values": ({}, {"x": "[" * 1_100_000}),
    "fifty megabytes": ({}, {"x": "x" * 50_000_001}),
    "no text": ({"\ud800": torch.ones(1)}, {}),
    "metadata that are no text": ({}, {"x": 1}),
    "the metadata's own name": ({"__metadata__": torch.ones(1)}, {}),
    "the seal's own name": ({"sha256": torch.ones(1)}, {}),
    "a dtype without a code": ({"a": torch.ones(1, dtype=torch.complex64)}, {}),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_could_not_be_read_again_is_not_sealed(name, tmp_path, count):
    error = refused(lambda: write_sealed(tmp_path / "a.safetensors", *UNREADABLE[name]))
    assert isinstance(error, CheckpointError)
    assert list(tmp_path.iterdir()) == []
    count("bad inputs")


def test_a_state_too_long_to_be_read_again_leaves_the_one_before(tmp_path, model, count, caplog):
    request = Request((Concept("Lava"),), ConAblConfig(), anchor_prompts=("A star image.",))
    state_store = StepState(tmp_path / "a.safetensors", request, 0)
    state_store.save({"iteration": 1, "losses": [0.5], "origin": {}})
    state_store.save({"iteration": 2, "losses": [0.5] * 1_100_000, "origin": {}})
    assert state_store.load({})["iteration"] == 1
    assert "cannot go on from here" in caplog.text and "damaged" not in caplog.text
    count("bad inputs")


# --- history: what a stranger's file says about itself


def step(**changes):
    request = {
        "concepts": [{"target": "Candy Stripes", "kind": "style", "anchor": ""}],
        "method": {"name": "conabl"},
        "regularizers": [],
        "training": {"iterations": 3, "seed": 0},
        "retain": [],
        "anchor_prompts": ["a"],
        "anchor_count": 1,
        "anchor_sampler": {},
        "anchor_seed": 0,
    }
    record = {
        "losses": {"unlearn": 0.5},
        "drift": {"a": [1.0, 1.0]},
        "parent": "0" * 64,
        "result": "1" * 64,
        "seconds": 1.5,
        "finished": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2"},
    }
    return {"request": request | changes.pop("request", {}), **record, **changes}


def merged(**changes):
    request = {
        "concepts": [],
        "merge": {"name": "ties"},
        "models": ["0" * 64],
        "last_steps": [None],
    } | changes
    return step() | {"request": request}


def concept(**changes):
    return {"request": {"concepts": [{"target": "x", "kind": "style", "anchor": ""} | changes]}}


SOURCE = {"name": CHECKPOINT_PATH.name, "size": 1, "sha256": "0" * 64}
DEEP = json.loads("[" * 200 + "]" * 200)
HISTORIES = {
    **{
        f"history {text[:20]}": text
        for text in (
            "",
            "null",
            "1",
            '"x"',
            "{}",
            "[1]",
            "[null]",
            "[[]]",
            "[{}]",
            '["x"]',
            "[" * 100_000,
            "NaN",
            "[{" * 5000,
            '{"0":{}}',
        )
    },
    **{
        f"{key} is {str(value)[:20]}": json.dumps([step(**{key: value})])
        for key, values in {
            "losses": (None, 1, [], {"a": "x"}, {"a": float("nan")}, {"a": 1e300}, {"a": True}, {"a": None}),
            "drift": (
                None,
                [],
                {"a": 1},
                {"a": []},
                {"a": [1]},
                {"a": [1, "x"]},
                {"a": [float("inf"), 1]},
                {"a": [10**40, 1]},
            ),
            "parent": (None, 1, [], {}, "x" * 10_000),
            "result": (None, 1, ["a"], "x" * 10_000),
            "finished": (None, 1, {}, "x" * 10_000),
            "seconds": (None, "1", [], float("nan"), float("inf"), True, 10**40),
            "versions": (None, [], 1, {"a": 1}, {"a": DEEP}),
            "request": (),
            "more": (1, None),
        }.items()
        for value in values
    },
    **{
        f"request.{key} is {str(value)[:20]}": json.dumps([step(request={key: value})])
        for key, values in {
            "concepts": (None, 1, "x", {}, [1], ["x"], [{}], [None], []),
            "method": (None, 1, "conabl", [], {}, {"name": 1}, {"name": None}),
            "regularizers": (None, 1, "x", [1], [{}], [{"name": []}]),
            "training": (
                None,
                1,
                [],
                {},
                {"iterations": "3", "seed": 0},
                {"iterations": 3, "seed": None},
                {"iterations": True, "seed": 0},
            ),
            "retain": (DEEP, float("nan")),
            "extra": (DEEP, 1e999),
        }.items()
        for value in values
    },
    **{
        f"concept {key} is {str(value)[:20]}": json.dumps([step(**concept(**{key: value}))])
        for key, values in {
            "target": (None, 1, [], {}, True, "x" * 1001),
            "kind": (None, 1, [], "", "styles", "x" * 10_000),
            "anchor": (None, 1, {}, "x" * 1001),
            "other": ("x",),
        }.items()
        for value in values
    },
    **{
        f"merge: {str(changes)[:40]}": json.dumps([merged(**changes)])
        for changes in (
            {"merge": None},
            {"merge": {}},
            {"merge": {"name": 1}},
            {"models": None},
            {"models": [1]},
            {"last_steps": []},
            {"last_steps": [1]},
            {"concepts": [{"target": "x", "kind": "style", "anchor": ""}]},
            {"concepts": None},
            {"models": "x" * 300},
        )
    },
    "10,001 steps": json.dumps([step(drift={}, losses={}, versions={})] * 10_001),
    "10,001 concepts": json.dumps(
        [step(request={"concepts": [{"target": "x", "kind": "style", "anchor": ""}] * 10_001})]
    ),
}
SOURCES = [
    "",
    "null",
    "1",
    "[]",
    "{}",
    '{"name":1,"size":1,"sha256":""}',
    '{"name":"x","size":"1","sha256":""}',
    '{"name":"x","size":1,"sha256":null}',
    json.dumps({**SOURCE, "name": "x" * 300}),
    json.dumps({**SOURCE, "sha256": "x" * 65}),
    json.dumps({**SOURCE, "size": float("nan")}),
    "[" * 100_000,
]


def claiming(path, **entries):
    metadata = {
        "cul_format": "1",
        "cul_source": json.dumps(SOURCE),
        "cul_history": json.dumps([step(), merged()]),
    } | entries
    return write_file(path, {"__metadata__": metadata, **GOOD}, FOUR)


def test_the_history_that_the_bad_ones_are_made_of_is_read(tmp_path):
    history, source = read_history(claiming(tmp_path / "a.safetensors"))
    assert [record.targets for record in history] == [("Candy Stripes",), ()] and source == SOURCE
    assert "Candy Stripes" in history_text("a.safetensors", history, source)


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_history_that_is_not_what_we_write_is_refused(tmp_path, count, kind):
    path = claiming(tmp_path / "lies.safetensors", cul_history=HISTORIES[kind])
    assert isinstance(refused(lambda: read_history(path)), CheckpointError)
    count("bad inputs")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source[:30])
def test_a_source_that_is_not_what_we_write_is_refused(tmp_path, count, source):
    path = claiming(tmp_path / "lies.safetensors", cul_source=source)
    assert isinstance(refused(lambda: read_history(path)), CheckpointError)
    count("bad inputs")


@pytest.mark.parametrize("value", ["", "0", "3", "x" * 100_000, "\x1b[2J", "1 "])
def test_a_history_of_another_format_is_refused(tmp_path, count, value):
    refused(lambda: read_history(claiming(tmp_path / "lies.safetensors", cul_format=value)))
    count("bad inputs")


NASTY = [
    "\x1b[2J\x1b[31mred",
    "\a\b\r\n",
    "a\u202etxt.exe",
    "\u2066x",
    "\x9b31m",
    "\u2028",
    "\x00",
    "\ue000",
    "\u200b",
]
MARKUP = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[[click|https://evil.example]]",
    "../../../etc/passwd",
    "C:\\CON",
    "{name}",
]


@pytest.mark.parametrize("text", NASTY)
def test_names_in_a_history_are_shown_escaped(tmp_path, capsys, count, text):
    record = step(
        **concept(target=f"T{text}T"), finished=text, parent=text, result=text, versions={text: text}
    )
    record["request"] |= {"method": {"name": text}, "regularizers": [{"name": text}]}
    lies = merged(merge={"name": text, text: text}, models=[text], last_steps=[text])
    path = claiming(
        tmp_path / "lies.safetensors",
        cul_history=json.dumps([record, lies]),
        cul_source=json.dumps({**SOURCE, "name": text}),
    )
    assert main(["inspect", str(path), "--json", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines) and lines[1].count("T") >= 2
    written = (tmp_path / "out.json").read_text()
    assert written.isascii() and all(line.isprintable() for line in written.splitlines())
    history, _ = read_history(path)
    assert model_text(UnlearnModel(source_of(CHECKPOINT_PATH), MINI, {}, history)).isprintable()
    count("bad inputs")


@pytest.mark.parametrize("text", NASTY + MARKUP)
def test_names_in_a_history_reach_no_file_name(tmp_path, shipped, count, text):
    named = step(**concept(target=f"T{text}T"))
    metadata = {
        "cul_format": "1",
        "cul_source": json.dumps({**SOURCE, "name": text}),
        "cul_history": json.dumps([named]),
    }
    path = tmp_path / "lies.safetensors"
    save_file(shipped, path, metadata=metadata)
    for opened in (open_model(path), open_continued(path, [CHECKPOINT_PATH])):
        assert opened.source.path == path and not opened.edits
    save_edits(opened, tmp_path / "edits.safetensors")
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["edits.safetensors", "lies.safetensors"]
    count("bad inputs")


@pytest.mark.parametrize("label", ["x" * 1_000_000, "x\n" * 500_000, " ".join(["word"] * 200_000)])
def test_a_label_takes_bounded_room_in_a_picture(label, count):
    from PIL import Image

    cell = Image.new("RGB", (8, 8))
    assert max(labelled_grid(label, [label, "b"], [(label, [cell, cell])]).size) < 5000
    count("bad inputs")


def test_shapes_of_a_foreign_file_do_not_break_the_search_for_its_family(tmp_path, count):
    for names in ([f"{UNET_PREFIX}input_blocks.0.0.weight"], [f"{UNET_PREFIX}x.attn2.to_k.weight"]):
        for shape in ((), (0,), (1,)):
            header = {name: entry(shape, (0, 4 if 0 not in shape else 0)) for name in names}
            path = write_file(tmp_path / "odd.safetensors", header, FOUR if 0 not in shape else b"")
            refused(lambda path=path: detect_family(path))
            count("bad inputs")


def test_a_merge_of_nothing_or_by_nothing_is_refused(edited, count):
    for models, config in (
        ([], TiesConfig()),
        ([edited], None),
        ([edited], "ties"),
        ([edited], {"name": "ties"}),
        ([edited], 1),
    ):
        error = refused(lambda models=models, config=config: merge(models, config))
        assert isinstance(error, ModelError | ConfigError)
        count("bad inputs")


def test_a_length_that_would_be_negative_is_refused(tmp_path, count):
    path = tmp_path / "negative.safetensors"
    for length in (-1, -8, -(1 << 63)):
        path.write_bytes(struct.pack("<q", length) + text_of(GOOD) + FOUR)
        refused(lambda: read_header(path))
        count("bad inputs")
