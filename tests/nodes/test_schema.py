"""What users see of every node before anything runs: names, tooltips, help pages, and the order of saved
widget values."""

import json

import pytest
from help_pages import DOCS, WIDGETS, inputs_of, notes_of, page_of, places_of, schemas_of

from cul_core.methods import METHODS
from cul_core.regularizers import REGULARIZERS


@pytest.fixture(scope="module")
def ours(host):
    return schemas_of(host)


def test_every_node_of_the_pack_is_there_and_only_once(ours):
    plain = {
        "Forget",
        "LoadModel",
        "FromModel",
        "Concept",
        "TrainingSettings",
        "UnlearnStep",
        "UnlearnSequence",
        "TakeBack",
        "Merge",
        "Compare",
        "Evaluate",
        "DoesItHold",
        "DriftMap",
        "SaveCheckpoint",
        "SaveLora",
        "History",
        "Store",
    }
    registries = {"Method": METHODS, "Regularizer": REGULARIZERS}
    registered = {f"{kind}_{entry.name}" for kind, registry in registries.items() for entry in registry}
    assert {name.removeprefix("CUL_") for name in ours} == plain | registered
    assert len({node["display_name"] for node in ours.values()}) == len(ours)


def test_every_node_says_what_it_is_and_lies_in_one_menu(ours):
    for name, node in ours.items():
        assert len(node["description"]) > 40 and node["category"].split("/")[0] == "unlearning", name


def test_every_input_and_output_has_a_tooltip(ours):
    for name, node in ours.items():
        for key, details in inputs_of(node).items():
            assert len(details.get("tooltip", "")) > 10, f"{name}.{key}"
        assert len(node["output_tooltips"]) == len(node["output"])
        assert all(tip and len(tip) > 10 for tip in node["output_tooltips"]), name


def test_saved_graphs_stay_valid_widgets_and_outputs_keep_their_places(ours):
    """Saved values are found by position: new entries go to the end of a list, nothing else may change (then
    run help_pages.py)."""
    found = places_of(ours)
    known = json.loads(WIDGETS.read_text())
    for name, places in known.items():
        for part, entries in places.items():
            assert found[name][part][: len(entries)] == entries, f"{name}: {part} moved"
    assert found == known


def test_no_input_has_a_name_that_makes_the_page_randomize_it(ours):
    assert not [name for name, node in ours.items() if {"seed", "noise_seed"} & inputs_of(node).keys()]


def test_every_node_has_a_help_page_with_a_picture_and_no_other_page_is_there(ours, host):
    assert {path.stem for path in DOCS.glob("*.md")} == ours.keys()
    for name in ours:
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        pictures = [part.split(")")[0] for part in page.split("![")[1:] for part in [part.split("](")[1]]]
        assert pictures and all((DOCS / picture).is_file() for picture in pictures), name
        assert host.get(f"/extensions/continual-unlearning/docs/{name}.md", raw=True).decode() == page


def test_the_help_pages_say_what_the_schemas_say(ours):
    for name, node in ours.items():
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert page == page_of(name, node, notes_of(page)), f"run python tests/nodes/help_pages.py for {name}"
