"""Inputs that nobody thought of: made by hypothesis from what the formats look like, and by Atheris from what
the header reader does."""

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from refusals import is_one_sentence, write_file

from cul_core.base.config import canonical_json
from cul_core.base.errors import CheckpointError, ConceptError, CulError, ModelError
from cul_core.concepts.concept import LONGEST_NAME, Concept
from cul_core.concepts.name_lists import parse_names
from cul_core.concepts.parsing import parse_concept, parse_keep, parse_requests
from cul_core.files.paths import check_portable
from cul_core.files.safetensors_format import _BITS, read_header
from cul_core.history.step_record import read_history
from cul_core.methods import METHODS
from cul_core.models.sampling import SamplerConfig
from cul_core.output.report import history_text
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers import REGULARIZERS
from cul_core.requests.presets import preset
from cul_core.requests.request import Request

SETTINGS = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
CONFIGS = [
    TrainingConfig,
    SamplerConfig,
    *(entry.config for registry in (METHODS, REGULARIZERS) for entry in registry),
]

texts = st.text(max_size=40) | st.sampled_from(
    ["", "conabl", "ties", "style", "object", "../x", "\x1b[2J", "\ud800", "name"]
)
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**53, 2**63, 2**64, -1, 10**400])
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def survives(call, kinds, count):
    """What `call` gives, or None for an error of these kinds, which must be a sentence; any other fails the
    test."""
    try:
        return call()
    except kinds as error:
        assert is_one_sentence(str(error)), str(error)
        count("bad inputs")
        return None


# --- headers


@st.composite
def headers(draw):
    """A header as the format wants it, and the length of its data: tensors one behind the other in any order
    of names."""
    names = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=6, unique=True)
    )
    header, end = {}, 0
    for name in names:
        if name == "__metadata__":
            continue
        dtype, shape = draw(st.sampled_from(sorted(_BITS))), draw(st.lists(st.integers(0, 5), max_size=3))
        bits = _BITS[dtype]
        for side in shape:
            bits *= side
        if bits % 8 == 0:
            header[name], end = (
                {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]},
                end + bits // 8,
            )
    if draw(st.booleans()):
        safe = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
        header["__metadata__"] = draw(st.dictionaries(safe, safe, max_size=3))
    return header, end


@settings(max_examples=150, **SETTINGS)
@given(made=headers(), spaces=st.integers(0, 8), escaped=st.booleans())
def test_every_header_of_the_format_is_read_as_it_is(tmp_path_factory, made, spaces, escaped):
    header, end = made
    path = tmp_path_factory.getbasetemp() / "good.safetensors"
    write_file(path, json.dumps(header, ensure_ascii=escaped).encode() + b" " * spaces, bytes(end))
    entries, metadata, start = read_header(path)
    assert (
        metadata == header.pop("__metadata__", {})
        and entries == header
        and start + end == path.stat().st_size
    )


@settings(max_examples=400, **SETTINGS)
@given(made=headers(), data=st.data())
def test_a_header_with_one_part_exchanged_is_read_or_refused(tmp_path_factory, count, made, data):
    header, end = made
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    where = [(name,) for name in header] + [
        (name, key) for name in header if name != "__metadata__" for key in header[name]
    ]
    if where:
        *outer, last = data.draw(st.sampled_from(where))
        (header[outer[0]] if outer else header)[last] = data.draw(anything)
    write_file(
        path,
        header,
        bytes(data.draw(st.just(end) | st.integers(0, 64))),
        data.draw(st.none() | st.integers(0, 2**64 - 1)),
    )
    survives(lambda: read_header(path), ModelError, count)


@settings(max_examples=300, **SETTINGS)
@given(content=st.binary(max_size=200))
@example(content=b"")
def test_bytes_are_read_or_refused(tmp_path_factory, count, content):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    for data in (content, len(content).to_bytes(8, "little") + content):
        path.write_bytes(data)
        survives(lambda: read_header(path), ModelError, count)
        survives(lambda: read_history(path), (ModelError, CheckpointError), count)


# --- histories


RECORD = {
    "request": {
        "concepts": [{"target": "x", "kind": "style", "anchor": ""}],
        "method": {"name": "conabl"},
        "regularizers": [],
        "training": {"iterations": 1, "seed": 0},
    },
    "losses": {"a": 1.0},
    "drift": {"a": [1.0, 1.0]},
    "parent": "0",
    "result": "1",
    "seconds": 1.0,
    "finished": "now",
    "versions": {"torch": "2"},
}
SOURCE = {"name": "x", "size": 1, "sha256": "0"}


@settings(max_examples=400, **SETTINGS)
@given(data=st.data())
def test_a_history_with_one_part_exchanged_is_shown_in_lines_or_refused(tmp_path_factory, count, data):
    record, source = json.loads(json.dumps(RECORD)), dict(SOURCE)
    place = data.draw(
        st.sampled_from(
            [
                record,
                record["request"],
                record["request"]["concepts"][0],
                record["request"]["training"],
                source,
            ]
        )
    )
    place[data.draw(st.sampled_from(sorted(place)) | texts)] = data.draw(anything)
    path = tmp_path_factory.getbasetemp() / "lies.safetensors"
    history = json.dumps([record] * data.draw(st.integers(0, 3)))
    write_file(
        path, {"__metadata__": {"cul_format": "1", "cul_history": history, "cul_source": json.dumps(source)}}
    )
    found = survives(lambda: read_history(path), (ModelError, CheckpointError), count)
    if found is not None:
        assert all(line.isprintable() for line in history_text("lies.safetensors", *found).split("\n"))
        canonical_json([vars(record) for record in found[0]])  # can be written again


# --- settings and requests


@settings(max_examples=300, **SETTINGS)
@given(config=st.sampled_from(CONFIGS), data=st.data())
def test_settings_are_taken_or_refused(count, config, data):
    names = st.sampled_from(sorted(config.__dataclass_fields__)) | texts
    values = data.draw(st.dictionaries(names, anything, max_size=3) | anything)
    made = survives(lambda: config.from_json(values), CulError, count)
    if made is not None:
        assert config.from_json(json.loads(canonical_json(made.to_json()))) == made


REQUEST = json.loads(
    canonical_json(
        preset("trained")
        .request([Concept("x")], retain=[Concept("y")], anchor_prompts=["z"], seed=0)
        .to_json()
    )
)


@settings(max_examples=400, **SETTINGS)
@given(data=st.data())
def test_requests_are_taken_or_refused(count, data):
    values = json.loads(json.dumps(REQUEST))
    place = data.draw(
        st.sampled_from(
            [
                values,
                values["concepts"][0],
                values["method"],
                values["regularizers"][0],
                values["training"],
                values["anchor_sampler"],
            ]
        )
    )
    place[data.draw(st.sampled_from(sorted(place)) | texts)] = data.draw(anything)
    made = survives(lambda: Request.from_json(values), CulError, count)
    if made is not None:
        assert Request.from_json(json.loads(canonical_json(made.to_json()))).hash == made.hash
    survives(lambda: Request.from_json(data.draw(anything)), CulError, count)


# --- what people type


typed = (
    st.text(max_size=200)
    | st.text(alphabet=string.ascii_letters + " \t\n,+->:#_;.'\"()[]*?\\|^${}", max_size=200)
    | st.lists(
        st.sampled_from(
            [
                "style",
                "object",
                ":",
                "->",
                " + ",
                ",",
                "\n",
                "#",
                "cat",
                "_",
                " ",
                "(a+)+",
                "\\",
                "\x85",
                "\u2028",
                "\x1b",
                ".",
            ]
        ),
        max_size=40,
    ).map("".join)
)


@settings(max_examples=500, **SETTINGS)
@given(
    text=typed,
    kind=st.sampled_from(["style", "object", "celebrity", "character", "memorized"]),
    anchor=st.just("") | texts,
)
def test_what_is_typed_becomes_concepts_or_is_refused(count, text, kind, anchor):
    for call in (
        lambda: [[parse_concept(text, kind, anchor)]],
        lambda: [parse_keep(text, kind)],
        lambda: parse_requests(text, kind, anchor),
        lambda: [parse_names(text, kind)],
    ):
        for concepts in survives(call, ConceptError, count) or ():
            for concept in concepts:
                assert (
                    concept.name.strip()
                    and len(concept.name) <= LONGEST_NAME
                    and concept.name in concept.prompt
                )
                assert Concept.from_json(json.loads(canonical_json(concept.to_json()))) == concept
                assert concept.mentioned_in(f"a {concept.target} b") and concept.mentioned_in(concept.target)
                for prompt in concept.target_prompts(f"a photo of a {concept.anchor} in a room"):
                    assert concept.name in prompt


@settings(max_examples=400, **SETTINGS)
@given(name=st.text(max_size=30) | st.text(alphabet="aC.O N:/\\*?\0", max_size=12))
def test_a_prefix_is_refused_or_stays_in_its_folder(tmp_path_factory, count, name):
    if survives(lambda: check_portable(name) is None, CheckpointError, count):
        folder = tmp_path_factory.getbasetemp()
        path = Path(folder, f"{name}_00001_.safetensors".replace("\\", "/"))
        assert folder in path.resolve().parents and not re.search(r'[\x00-\x1f:*?"<>|]', name)


# --- the header reader, guided by its coverage


def test_fuzzing_reaches_more_of_the_header_reader_than_its_seeds_and_finds_no_crash(tmp_path, count):
    pytest.importorskip("atheris")
    program = Path(__file__).parents[1] / "fuzz" / "fuzz_header.py"
    options = ["-runs=4000", "-seed=1", "-timeout=5", "-rss_limit_mb=1000", f"-artifact_prefix={tmp_path}/"]
    # a process counts the peak of the one that started it as its own: a small one between them keeps that of
    # these tests out
    between = [
        sys.executable,
        "-c",
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)",
    ]
    command = [*between, sys.executable, str(program), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (int(re.search(rf"{mark}\s+cov: (\d+)", done.stderr)[1]) for mark in ("INITED", "DONE"))
    assert after > before > 0 and list(tmp_path.iterdir()) == []
    count("fuzzed headers", 4000)
