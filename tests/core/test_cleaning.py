"""Names as users type, paste and save them: prompt syntax, invisible characters, byte order marks."""

import codecs

import pytest

from cul_core.audits.memorization import read_paraphrases
from cul_core.base.errors import ConceptError
from cul_core.concepts.concept import Concept, display_name
from cul_core.concepts.parsing import parse_concept, parse_keep, parse_requests

STAYS = (
    "saber (fate)",
    "C++",
    "K/DA",
    "(G)I-dle",
    "(500) Days of Summer",
    "Deadpool (2016)",
    "Re:Zero",
    "NieR:Automata",
    "Fate/stay night: Unlimited Blade Works",
    "S.H.I.E.L.D.",
    "rock'n'roll",
    "(^_^)",
    ":3",
    "<3",
    "100% cotton",
    "[REC]",
    "C:\\temp",
    "\U0001f469\u200d\U0001f3a8",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\u2764\ufe0f",
    "1\ufe0f\u20e3",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\u0915\u094d\u200d\u0937",
    "Beyonc\u00e9",
    "\u5317\u4eac",
)


@pytest.mark.parametrize("name", STAYS)
def test_what_is_a_name_stays_one(name):
    concept = Concept(name, "character", "person")
    assert concept.target == name and Concept.from_json(concept.to_json()) == concept


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (r"saber \(fate\)", "saber (fate)"),
        (r"jack-o'-lantern \(alice\) \(wonderland\)", "jack-o'-lantern (alice) (wonderland)"),
        (r"\(K\)NoW_NAME", "(K)NoW_NAME"),
        ("Van Gogh\u200b", "Van Gogh"),
        ("\ufeffVan Gogh", "Van Gogh"),
        ("Van \u200bGogh", "Van Gogh"),
        ("\u200e\u2060Van Gogh\u200f", "Van Gogh"),
        ("Mon\u00adet", "Monet"),
        ("Mo\u200dnet", "Monet"),
        ("Van\u3164Gogh", "Van Gogh"),
        ("Van\u00a0Gogh", "Van Gogh"),
        ("Beyonce\u0301", "Beyonc\u00e9"),
        ("Monet\ufe0f", "Monet"),
        ("Monet\U000e0041\U000e0042", "Monet"),
    ],
)
def test_a_name_is_what_it_looks_like(typed, name):
    concept = parse_concept(typed, "celebrity")
    assert concept.name == Concept(name, "celebrity", "person").name
    assert concept.mentioned_in(f"a painting by {name}.")
    (kept,) = parse_keep(typed)
    assert kept.name == concept.name
    assert display_name(Concept("x", "object", typed).anchor) == display_name(name)


SYNTAX = (
    "(Van Gogh:1.3)",
    "(Van Gogh: .5)",
    "(Van Gogh:-1)",
    "a (cat:1.2) on a mat",
    r"(saber \(fate\):1.2)",
    "((masterpiece))",
    "(Van Gogh)",
    r"(saber \(fate\))",
    "embedding:easynegative",
    "Embedding:bad-hands.pt",
    "by embedding:x",
    "<lora:x:1>",
    "Van Gogh <lora:gogh_v2:0.8>",
    "<hypernet:x:1>",
    "{cat|dog}",
    "Van\u200bGogh",
    "Van\ufeffGogh",
    "Van\u2060Gogh",
)


@pytest.mark.parametrize("typed", SYNTAX)
@pytest.mark.parametrize(
    "read",
    [
        lambda text: parse_concept(text, "celebrity"),
        lambda text: parse_concept(f"object: {text} -> cat"),
        lambda text: parse_concept(f"object: cat -> {text}"),
        parse_keep,
        parse_requests,
        lambda text: Concept(text, "memorized", "another caption"),
    ],
    ids=["target", "target with a kind", "anchor", "keep", "requests", "caption"],
)
def test_the_syntax_of_prompts_is_refused_wherever_it_is_typed(typed, read):
    with pytest.raises(ConceptError, match="syntax of prompts|invisible character"):
        read(typed)


LINES = "a red house\r\nsaber \\(fate\\) at home\r\n"


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        codecs.BOM_UTF8 + LINES.encode(),
        codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    ],
)
def test_a_file_of_captions_is_read_as_notepad_saves_it(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_paraphrases(tmp_path / "a.txt") == ["a red house", "saber (fate) at home"]


@pytest.mark.parametrize("line", SYNTAX[:4])
def test_the_syntax_of_prompts_is_refused_in_captions(line, tmp_path):
    (tmp_path / "a.txt").write_text(f"a house\n{line}\n", encoding="utf-8")
    with pytest.raises(ConceptError, match="The paraphrase .*syntax of prompts"):
        read_paraphrases(tmp_path / "a.txt")


def test_a_pasted_list_begins_with_its_first_line():
    requests = parse_requests("\ufeffobject: cat -> tree\n\u200b# a comment\nLava\n\ufeff\n")
    assert requests == [(Concept("cat", "object", "tree"),), (Concept("Lava"),)]
    assert parse_keep("\ufeff# a comment\nobject: cat") == (Concept("cat", "object"),)
    assert parse_concept("\ufeffobject: cat -> tree") == Concept("cat", "object", "tree")


@pytest.mark.parametrize("text", ["\u200b", "\u00ad\u200e", "\u3164"])
def test_a_name_of_nothing_that_can_be_seen_is_empty(text):
    with pytest.raises(ConceptError, match="The target is empty"):
        Concept(text)


def test_a_target_and_an_anchor_that_look_the_same_are_the_same():
    with pytest.raises(ConceptError, match="Anchor and target are both"):
        Concept(r"saber \(fate\)", "character", "saber (fate)\u200b")
