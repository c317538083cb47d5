"""Auxiliary names: the shipped lists, lists as users type them, and which lists suit what."""

import tomllib
from pathlib import Path

import pytest

import cul_core.concepts.name_lists
from cul_core.base.errors import ConceptError
from cul_core.concepts.concept import KINDS, Concept
from cul_core.concepts.name_lists import LISTS, SUITABLE, listed_names, parse_names

FOLDER = Path(cul_core.concepts.name_lists.__file__).parent / "lists"


@pytest.mark.parametrize("name", LISTS)
def test_every_list_names_a_hundred_different_things_a_line_each(name):
    lines = [
        line
        for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    concepts = listed_names(name, ())
    assert len(lines) == len({line.lower() for line in lines}) == 100
    assert [concept.target for concept in concepts] == lines and {concept.kind for concept in concepts} == {
        LISTS[name]
    }
    for concept in concepts:
        assert concept.name == concept.target and concept.name.isascii() and 2 < len(concept.name) < 30


def test_every_list_is_among_the_files_of_the_package():
    package = Path(cul_core.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in patterns["cul_core"] for path in package.glob(pattern)}
    assert {FOLDER / f"{name}.txt" for name in LISTS} == {*FOLDER.glob("*.txt")} and {
        *FOLDER.glob("*.txt")
    } <= packed


def test_names_are_read_as_on_a_keep_list():
    text = "# mine\nMonet, object: red_cup,Monet\n\ncelebrity: Jane Doe\n"
    assert parse_names(text) == (
        Concept("Monet"),
        Concept("red_cup", "object"),
        Concept("Jane Doe", "celebrity"),
    )
    assert parse_names("Jane Doe", "celebrity") == (Concept("Jane Doe", "celebrity"),)
    assert parse_names(" \n# nothing\n") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Monet\nKlimt, object:\n", r"Line 2 of the auxiliary names: The target is empty"),
        (
            "Monet, " + 81 * "x" + ", Klimt",
            r"Line 1 of the auxiliary names: 'xxx.* has 81 characters; give names of at most 80",
        ),
    ],
)
def test_a_line_without_a_usable_name_is_named(text, said):
    with pytest.raises(ConceptError, match=said):
        parse_names(text)


def test_auto_takes_one_name_of_each_suitable_list_in_turn_its_own_domain_first():
    people = listed_names("auto", ["celebrity"])
    assert [concept.target for concept in people[:4]] == [
        "Napoleon Bonaparte",
        "Impressionism",
        "dog",
        "Abraham Lincoln",
    ]
    assert len(people) == len(set(people)) == 300
    both = listed_names("auto", ["style", "object", "style"])  # styles, objects, scenes; each once
    assert len(both) == len(set(both)) == 300 and {concept.kind for concept in both} == {"style", "object"}
    assert listed_names("none", KINDS) == ()


def test_every_kind_of_target_has_lists():
    assert set(SUITABLE) == set(KINDS) and {name for names in SUITABLE.values() for name in names} == set(
        LISTS
    )
