"""Bad names, lists, numbers, requests as JSON, and command lines: each gives one sentence."""

import dataclasses
import json
import math
import sys
from dataclasses import replace

import pytest
from refusals import is_one_sentence, refused

from cul_core.audits.memorization import MemorizationConfig, read_image, read_paraphrases
from cul_core.base.config import Config, canonical_json, check_number, limits
from cul_core.base.errors import ConceptError, ConfigError, brief_repr
from cul_core.base.registry import Registry
from cul_core.cli import main
from cul_core.concepts.concept import MOST_NAMES, Concept, check_text
from cul_core.concepts.name_lists import parse_names
from cul_core.concepts.parsing import ConceptList, parse_concept, parse_keep, parse_requests
from cul_core.files.paths import check_portable
from cul_core.mergers import MERGERS
from cul_core.methods import METHODS
from cul_core.minicanvas.models import CHECKPOINT_PATH
from cul_core.models.sampling import SamplerConfig
from cul_core.output.report import printable
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers import REGULARIZERS
from cul_core.requests.presets import PRESETS, preset
from cul_core.requests.request import Request

UNSEEN = [
    "\x00",
    "\x07",
    "\x08",
    "\x0b",
    "\x1b",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\x9b",
    "\u2028",
    "\u202a",
    "\u202e",
    "\u2066",
    "\u2069",
    "\ud800",
    "\udfff",
]
NOT_TEXT = [None, 1, 1.5, True, [], {}, b"x", ("x",)]
CONFIGS = {
    entry.config.__name__: entry.config for registry in (METHODS, REGULARIZERS, MERGERS) for entry in registry
} | {
    "TrainingConfig": TrainingConfig,
    "SamplerConfig": SamplerConfig,
    "MemorizationConfig": MemorizationConfig,
}
NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    1e300,
    -1e300,
    2**64,
    -(2**64),
    10**400,
    -(10**400),
    10**5000,
    True,
    None,
    "1",
    [],
    {},
    1j,
    b"1",
    object(),
]


def request_json(**changes):
    made = preset("trained").request(
        [Concept("Candy Stripes")], retain=[Concept("Lava")], anchor_prompts=["a house"], seed=0
    )
    return json.loads(canonical_json(made.to_json())) | changes


# --- names


@pytest.mark.parametrize("text", UNSEEN, ids=ascii)
def test_characters_that_act_instead_of_being_seen_are_refused(count, text):
    for make in (
        lambda: Concept(f"a{text}b"),
        lambda: Concept("a", anchor=f"b{text}c"),
        lambda: Concept(f"a{text}b", "memorized", "c"),
        lambda: Request.from_json(request_json(anchor_prompts=[f"a{text}b"])),
    ):
        assert isinstance(refused(make), ConceptError)
        count("bad inputs")


@pytest.mark.parametrize(
    "text",
    [
        "M\u00fcller",
        "\u5317\u658e",
        "\u0634\u064e\u062c\u064e\u0631\u064e\u0629",
        "\u0915\u094d\u0937\u093f",
        "\U0001f9d1\u200d\U0001f3a8",
        "l'\u00e9t\u00e9",
        "a\tb",
        "a\nb",
        "\u05e9\u05dc\u05d5\u05dd\u200f",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ],
)
def test_names_in_any_language_are_names(text):
    assert Concept(text).prompt and parse_concept(text).target == text.strip().strip("\u200f")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1001,
        "x" * 1_000_000,
        "word " * 200_000,
        "\U0001f600" * 100_000,
        "_" * 1_000_000,
        "-> " * 300_000,
        ":" * 1_000_000,
    ],
)
def test_a_name_as_long_as_a_book_is_refused(count, text):
    for make in (
        lambda: Concept(text),
        lambda: Concept("a", anchor=text),
        lambda: parse_concept(text),
        lambda: parse_requests(text),
        lambda: parse_keep(text),
        lambda: parse_names(text),
        lambda: Request.from_json(request_json(anchor_prompts=[text * 2])),
    ):
        assert isinstance(refused(make), ConceptError)
        count("bad inputs")


@pytest.mark.parametrize("value", NOT_TEXT, ids=repr)
def test_what_is_no_text_is_no_name(count, value):
    for make in (
        lambda: Concept(value),
        lambda: Concept("a", anchor=value),
        lambda: Concept("a", kind=value),
    ):
        assert isinstance(refused(make), ConceptError)
        count("bad inputs")


@pytest.mark.parametrize("separator", ["\n", ", ", "\r\n"])
@pytest.mark.parametrize("many", [MOST_NAMES + 1, 10_000, 100_000])
def test_ten_thousand_concepts_are_refused(count, separator, many):
    text = separator.join(f"name {number}" for number in range(many))
    for parse in (parse_keep, parse_names):
        assert isinstance(refused(lambda parse=parse: parse(text)), ConceptError)
        count("bad inputs")
    if "\n" in separator:
        assert f"{many} names to forget" in str(refused(lambda: parse_requests(text)))
        assert "names to forget" in str(refused(lambda: parse_requests(text.replace("\n", " + "))))
        count("bad inputs", 2)


def test_a_thousand_concepts_are_not_too_many():
    names = [f"name {number}" for number in range(MOST_NAMES)]
    assert (
        len(parse_keep("\n".join(names)))
        == len(parse_names(",".join(names)))
        == len(parse_requests("\n".join(names)))
        == MOST_NAMES
    )
    assert len(ConceptList(tuple(map(Concept, names)), ()).targets) == MOST_NAMES


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "#",
        "# only\n#comments\n",
        "\t",
        "->",
        "style:",
        "style: ->",
        "object: -> cat",
        "a + -> b",
    ],
)
def test_an_empty_list_of_requests_is_refused(count, text):
    assert isinstance(refused(lambda: parse_requests(text)), ConceptError)
    count("bad inputs")


def test_no_text_makes_a_search_slow(count):
    """Names and prompts that begin alike everywhere, and differ at the end: what regular expressions are slow
    at."""
    for part in ("a ", "a_", "aa", "_", " ", "s", "es ", "(a+)+", ".*"):
        name = (part * 500)[:999] + "b"
        prompt = (part * 1000)[:1999] + "c"
        for concept in (Concept(name, "object", "x"), Concept("x", "object", name)):
            begun = [concept.mentioned_in(prompt) for _ in range(100)]
            assert begun == [False] * 100 and concept.target_prompts(prompt) == ()
            count("bad inputs")


# --- names of files


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        ".",
        "../x",
        "a/../../x",
        "a/..",
        "a/./b",
        "a//b",
        "a/",
        "\\\\server\\share",
        "..\\x",
        "C:\\x",
        "C:x",
        "a:b",
        "CON",
        "con",
        "Con.txt",
        "NUL",
        "nul.safetensors",
        "aux/x",
        "x/PRN",
        "COM1",
        "com9.x",
        "LPT1",
        "COM\u00b9",
        "CONIN$",
        "CON .txt",
        "a.",
        "a ",
        " a",
        "a./b",
        "a /b",
        "a\0b",
        "a\nb",
        "a\x1b[2Jb",
        "\x7f",
        "a<b",
        "a>b",
        'a"b',
        "a|b",
        "a?b",
        "a*b",
        "x" * 201,
        "x" * 300,
        "x" * 100_000,
        "\u00e9" * 101,
        "\ud800",
        "a\u202eb",
        "\u2028",
        "a/" * 100,
        "%date:yyyy%",
    ],
)
def test_a_prefix_that_is_no_file_name_everywhere_is_refused(count, name):
    refused(lambda: check_portable(name))
    count("bad inputs")


@pytest.mark.parametrize(
    "name",
    [
        "unlearned",
        "checkpoints/unlearned",
        "a\\b",
        "conan",
        "com",
        "COM10",
        "a.b",
        ".hidden",
        "%year%-%month%",
        "\u00e9" * 100,
        "\u5317\u658e/x",
        "a b",
        "(1)",
        "x" * 200,
        "auxiliary",
        "nulls",
    ],
)
def test_a_prefix_that_is_a_file_name_everywhere_is_not(name):
    check_portable(name)


# --- numbers and other settings


def numeric_fields():
    for name, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            if type(field.default) in (int, float):
                yield pytest.param(config, field, id=f"{name}.{field.name}")


@pytest.mark.parametrize(("config", "field"), [*numeric_fields()])
def test_no_number_of_any_setting_is_beyond_sense(count, config, field):
    low, high = limits(field)
    assert math.isfinite(low) and math.isfinite(high) and low <= field.default <= high
    out = (
        [math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]
        if type(field.default) is float
        else [low - 1, high + 1]
    )
    for value in (*NUMBERS, *out):
        if type(value) in (int, float) and low <= value <= high:
            assert (
                getattr(config(**{field.name: value}), field.name) == value
                if type(field.default) is type(value) or type(value) is int
                else True
            )
            continue
        for make in (
            lambda value=value: config(**{field.name: value}),
            lambda value=value: config.from_json({field.name: value}),
            lambda value=value: replace(config(), **{field.name: value}),
        ):
            assert field.name in str(refused(make))
        count("bad inputs")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_texts_choices_and_switches_take_nothing_else(count, config):
    for field in dataclasses.fields(config):
        if type(field.default) in (str, bool):
            for value in (None, 1, 0.5, [], {}, b"", "x" * 200_000, [["x"]], {"a": {}}, float("nan")):
                refused(lambda value=value, field=field: config.from_json({field.name: value}))
                count("bad inputs")
    for values in (
        None,
        1,
        "x",
        [],
        [1],
        True,
        {"no such setting": 1},
        {"": 1},
        {"x" * 100_000: 1},
        {"REFERENCE": 1},
        {"__class__": 1},
    ):
        if values != []:
            refused(lambda values=values: config.from_json(values))
            count("bad inputs")


@pytest.mark.parametrize(
    "weights",
    [[float("nan")], [float("inf")], ["1"], [None], [True], [[1]], "12", 1, [10**400], [1e300], [1.0] * 2000],
)
def test_weights_of_a_merge_are_few_and_finite(count, weights):
    for entry in MERGERS:
        if "weights" in {field.name for field in dataclasses.fields(entry.config)}:
            refused(lambda entry=entry: entry.config.from_json({"weights": weights}))
            count("bad inputs")


@pytest.mark.parametrize("registry", [METHODS, REGULARIZERS, MERGERS], ids=lambda registry: registry.kind)
def test_a_registry_knows_only_its_own_names(count, registry: Registry):
    for name in (
        None,
        1,
        [],
        {},
        "",
        "no such",
        "../x",
        "x" * 100_000,
        b"conabl",
        ("conabl",),
        "\x1b[2J",
        "__init__",
    ):
        refused(lambda name=name: registry.get(name))
        refused(lambda name=name: registry.from_json({"name": name}))
        count("bad inputs", 2)
    for config in (None, 1, "conabl", {}, Config(), TrainingConfig(), Concept("x")):
        refused(lambda config=config: registry.of(config))
        count("bad inputs")


def test_training_settings_of_a_preset_are_checked(count):
    for values in (
        {"no such": 1},
        {"iterations": "x"},
        {"anchor_steps": 0},
        {"anchor_steps": None},
        {"learning_rate": float("nan")},
        {"group": []},
    ):
        refused(lambda values=values: preset("trained").with_settings(values))
        count("bad inputs")
    for name in (None, [], {}, "", "x" * 100_000):
        refused(lambda name=name: preset(name))
        count("bad inputs")


def test_presets_are_within_all_limits():
    for name in PRESETS:
        for family in ("sd1", "sd2", "sdxl", "mini"):
            chosen = preset(name)
            assert Request.from_json(
                json.loads(
                    canonical_json(
                        chosen.request(
                            [Concept("x")], retain=[], anchor_prompts=["a"], seed=2**53 - 1
                        ).to_json()
                    )
                )
            ), (name, family)


# --- requests


@pytest.mark.parametrize(
    "value", [None, 1, "x", [], [1], True, {}, {"concepts": []}, request_json(more=1) | {"concepts": None}]
)
def test_a_request_that_is_no_request_is_refused(count, value):
    refused(lambda: Request.from_json(value))
    count("bad inputs")


@pytest.mark.parametrize("key", request_json())
def test_a_request_with_a_part_of_another_kind_is_refused(count, key):
    values = request_json()
    del values[key]
    assert f"lacks {key!r}" in str(refused(lambda: Request.from_json(values)))
    for value in (
        None,
        1.5,
        "x",
        True,
        -1,
        2**70,
        float("nan"),
        [None],
        [1],
        [[]],
        [{}],
        {"name": None},
        {"name": []},
        {"name": "no such"},
        [["x"]],
        {"target": "x"},
        [{"target": 1}],
        [{"target": "x", "more": 1}],
        {"a": {}},
        10**5000,
    ):
        refused(lambda value=value: Request.from_json(values | {key: value}))
        count("bad inputs")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("concepts", [{"target": f"name {i}"} for i in range(1001)]),
        ("retain", [{"target": f"name {i}"} for i in range(1001)]),
        ("anchor_prompts", ["a"] * 100_001),
        ("anchor_count", 0),
        ("anchor_count", 10_001),
        ("concepts", []),
        ("anchor_prompts", []),
    ],
)
def test_a_request_without_bounds_is_refused(count, key, value):
    refused(lambda: Request.from_json(request_json(**{key: value})))
    count("bad inputs")


def test_a_request_built_of_wrong_parts_is_refused(count):
    good = Request.from_json(request_json())
    for changes in (
        {"concepts": ["x"]},
        {"concepts": (1,)},
        {"method": None},
        {"method": TrainingConfig()},
        {"method": "conabl"},
        {"regularizers": (None,)},
        {"regularizers": (TrainingConfig(),)},
        {"training": None},
        {"training": {}},
        {"retain": ("x",)},
        {"anchor_sampler": None},
        {"anchor_prompts": "abc"},
        {"anchor_count": 1.0},
        {"anchor_seed": "0"},
    ):
        refused(lambda changes=changes: replace(good, **changes))
        count("bad inputs")


def test_a_request_comes_back_from_its_json():
    good = Request.from_json(request_json())
    assert (
        Request.from_json(good.to_json()) == good
        and good.hash == Request.from_json(json.loads(canonical_json(good.to_json()))).hash
    )


# --- the command line


FILE = str(CHECKPOINT_PATH)
COMMANDS = {
    "no file": ["inspect", "no such.safetensors"],
    "folder": ["inspect", "."],
    "NUL": ["inspect", "a\0b"],
    "long": ["inspect", "x" * 5000],
    "empty name": ["inspect", ""],
    "pickle": ["inspect", "a.ckpt"],
    "surrogate": ["inspect", "\udcff.safetensors"],
    "json NUL": ["merge", FILE, FILE, "--json", "a\0b"],
    "json to nowhere": ["inspect", FILE, "--json", "a" * 300],
    "out NUL": ["unlearn", "x", "--out", "a\0b"],
    "out too long": ["unlearn", "x", "--out", "x" * 300],
    "out empty": ["unlearn", "x", "--out", ""],
    "out in a file": ["unlearn", "x", "--out", f"{FILE}/x"],
    "target empty": ["unlearn", ""],
    "target blank": ["unlearn", "  "],
    "target long": ["unlearn", "x" * 100_000],
    "target acts": ["unlearn", "\x1b[2J"],
    "targets": ["unlearn", *["x"] * 10_000],
    "kept": ["unlearn", "x", "--keep", *(f"name {i}" for i in range(10_000))],
    "kept acts": ["unlearn", "x", "--keep", "a\u202eb"],
    "kind": ["unlearn", "x", "--kind", "styles"],
    "anchor": ["unlearn", "x", "--anchor", "x"],
    "preset": ["unlearn", "x", "--preset", "../x"],
    "model": ["unlearn", "x", "--model", "../../etc/passwd"],
    "tokenizer": ["unlearn", "x", "--tokenizer", "a\0b", "--model", "x.safetensors"],
    "device": ["unlearn", "x", "--device", "x" * 1000],
    "device acts": ["unlearn", "x", "--device", "\x1b[2J"],
    "auxiliary": ["unlearn", "x", "--auxiliary", "../x"],
    "pretrained": ["unlearn", "x", "--pretrained", "no such.safetensors"],
    **{
        f"--{name} {value}": ["unlearn", "x", f"--{name}={value}"]
        for name, values in {
            "iterations": (-1, 10**9, "9" * 400),
            "learning-rate": ("nan", "inf", "-inf", 2, -1, "1e400"),
            "evaluate-every": (-1, 10**12),
            "seed": (-1, 10**30),
        }.items()
        for value in values
    },
    "no such way": ["merge", FILE, "--how", "magic"],
    "not ours": ["merge", FILE],
    "merge nowhere": ["merge", "no such.safetensors"],
    **{
        f"merge --{name} {value}": ["merge", FILE, f"--{name}={value}"]
        for name, values in {
            "strength": ("nan", "inf", -1, 1e9),
            "keep-fraction": ("nan", 2, -1),
            "weights": ("nan", "inf", "1e400"),
            "trim": ("x",),
            "function": ("",),
        }.items()
        for value in values
    },
    **{f"pictures {value}": ["evaluate", FILE, "--pictures", str(value)] for value in (0, -1, 10**9)},
    "no such style": ["evaluate", FILE, "--target", "\x1b[2J"],
    "requests": ["demo", "--requests", "99"],
    "workers": ["demo", "--workers", "-1"],
    "demo out": ["demo", "--out", "a\0b"],
    "benchmark requests": ["benchmark", "--requests", "-5"],
    "picture": ["unlearn", "x", "--picture", "no.png", "--paraphrases", "no.txt"],
    "picture alone": ["unlearn", "x", "--picture", "no.png"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_line_ends_with_one_line(tmp_path, monkeypatch, capsys, count, name):
    monkeypatch.chdir(tmp_path)
    assert main(COMMANDS[name]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and is_one_sentence(lines[0]), lines
    assert list(tmp_path.iterdir()) == []
    count("bad inputs")


def test_default_names_of_files_have_room_on_any_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        "cul_core.cli.unlearn.check_can_write", lambda *files: seen.extend(files) or sys.exit(0)
    )
    for target in ("\u5317" * 500, "../../x", "a/b\\c:d", "CON", "...", "\u00e9" * 300):
        with pytest.raises(SystemExit):
            main(["unlearn", target])
        name = seen[0].name
        assert (
            seen[0].parent.name == ""
            and len(name.encode()) <= 220
            and name.startswith("minicanvas-without-")
            and check_portable(name) is None
        )
        seen.clear()


# --- pictures and paraphrases of memorized pictures


def bomb():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff\xe0",
        b"BM" + bytes(60),
        b"II*\0" + bytes(20),
        bomb(),
        b"P6 1000000 1000000 255\n",
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0dIHDR" + bytes(40),
        b"RIFF\0\0\0\0WEBPVP8 ",
    ],
    ids=lambda data: repr(data[:8]),
)
def test_a_broken_picture_is_refused(tmp_path, count, data):
    (tmp_path / "picture.png").write_bytes(data)
    assert isinstance(refused(lambda: read_image(tmp_path / "picture.png")), ConceptError)
    count("bad inputs")


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"\x80", b"a\0b", b"\x1b[2J", b"x" * 5000, b"x\n" * 2000, "\u202e".encode()]
)
def test_paraphrases_that_are_no_captions_are_refused(tmp_path, count, data):
    (tmp_path / "lines.txt").write_bytes(data)
    assert isinstance(refused(lambda: read_paraphrases(tmp_path / "lines.txt")), ConceptError)
    count("bad inputs")


# --- how values are shown


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        "x" * 10**6,
        "\x1b[2J\u202e\n",
        [[[[[[[[[[]]]]]]]]]],
        {"a" * 1000: "b" * 1000},
        list(range(10**5)),
        b"\x00" * 10**6,
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_in_a_line(value):
    assert len(brief_repr(value)) < 500 and brief_repr(value).isprintable()


def test_text_is_shown_in_a_line():
    assert printable("a\x1b[2J\u202eb\n\ud800") == "a\\x1b[2J\\u202eb\\n\\ud800"
    assert len(printable("x" * 10**6)) < 11_000


def test_checks_say_what_is_wrong():
    for call, said in (
        (lambda: check_text("target", "x" * 2000), "has 2000 characters; give at most 1000"),
        (lambda: check_text("target", "a\u202eb"), r"holds the control character '\\u202e'"),
        (lambda: check_number("rank", float("nan"), 1, 4), "rank is nan; give a number between 1 and 4"),
        (lambda: check_number("rank", 1.5, 1, 4, int), "rank is 1.5; give a value of type int"),
        (lambda: check_portable("aux/x"), "Windows reserves aux"),
        (lambda: check_portable("../x"), "give a file name, with folders"),
    ):
        with pytest.raises(Exception, match=said) as caught:
            call()
        assert isinstance(caught.value, ConceptError | ConfigError) or "file name" in str(caught.value)
