"""The benchmark: what a measurement is of, going on where an earlier run stopped, and the table."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short import SHORT

from cul_core.audits.classifier_scores import METRICS
from cul_core.base.errors import CheckpointError, ConfigError
from cul_core.cli import main
from cul_core.files.locks import try_locked
from cul_core.methods import METHODS
from cul_core.minicanvas import benchmark
from cul_core.minicanvas.benchmark import (
    BEYOND,
    GRID,
    PAPER,
    Cell,
    Run,
    averages,
    further_figures,
    grid,
    order_report,
    read_results,
    relapse,
    result_table,
    run_benchmark,
    write_figure,
)
from cul_core.minicanvas.judge import Judge, still_shown
from cul_core.minicanvas.suites import OBJECT_SUITE, STYLE_SUITE, SUITES, suite_of
from cul_core.minicanvas.world import OBJECTS, REQUEST_ORDERS, SMALL, STYLES
from cul_core.parts.prompt_vectors import decoy_concepts
from cul_core.parts.text_rows import TextRows
from cul_core.regularizers import REGULARIZERS
from cul_core.training.step import run_step

RESULTS = Path(__file__).parents[2] / "docs" / "benchmark" / "results.jsonl"


def run_of(name, order="a", suite=STYLE_SUITE, **more):
    return Run(suite, Cell.parse(name), order, 1, 1, suite.marks, **more)


def line(cell="plain", k=12, seed=1, order="a", **scores):
    values = dict.fromkeys(METRICS, 50.0) | scores
    return {
        "suite": "styles",
        "cell": cell,
        "order": order,
        "seed": seed,
        "k": k,
        "pictures": 1,
        "requests": "x",
        "scores": values,
    }


def test_the_grid_has_every_cell_of_the_paper_as_it_is_there_and_as_we_do_it():
    names = [cell.name for cell in grid()]
    assert len(names) == len(set(names)) == 2 * len(GRID) + len(BEYOND)
    assert "exact" in names
    for suite in PAPER:
        assert set(PAPER[suite]) <= set(GRID)
    assert [Cell.parse(name).setting for name in ("plain", "plain ties", "plain_ours simultaneous")] == [
        "sequential",
        "ties",
        "simultaneous",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [("best", "no preset 'best'"), ("plain together", "no setting 'together'; choose one of sequential")],
)
def test_a_cell_that_does_not_exist_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        Cell.parse(name)


def test_a_chain_forgets_one_target_a_request_and_simultaneous_all_so_far_with_the_iterations_of_the_chain():
    chain, together = run_of("plain", "b"), run_of("plain simultaneous", "b")
    assert [concept.target for concept in chain.request(4).concepts] == [REQUEST_ORDERS["b"][3]]
    assert [concept.target for concept in together.request(4).concepts] == list(REQUEST_ORDERS["b"][:4])
    assert together.request(4).training.iterations == 4 * chain.request(4).training.iterations == 240
    assert (together.request(4).training.evaluate_every, together.request(4).training.patience) == (25, 60)


def test_two_benchmarks_in_one_folder_do_not_overwrite_each_others_lines(tmp_path):
    with (
        try_locked(tmp_path / "results.lock"),
        pytest.raises(CheckpointError, match="Another benchmark is running in"),
    ):
        run_benchmark(tmp_path, cells=[Cell.parse("plain")], seeds=[1])
    assert [path.name for path in tmp_path.iterdir()] == ["results.lock"]


def test_a_measurement_on_the_way_asks_in_every_other_name_and_the_last_in_all():
    run = run_of("plain")
    assert run.across(4) == OBJECTS[::2] and run.across(12) == OBJECTS
    assert run.identity(4)["pictures"] == 5 and run.identity(12)["pictures"] == 10


def test_ties_trains_every_target_alone_and_merges_as_the_paper_does_unless_the_cell_says_how():
    run = run_of("plain ties")
    assert run.request(4) == run_of("plain").request(4)
    assert (run.merger(5).strength, run.merger(12).keep_fraction) == (1.75, 0.4)
    assert run.identity(4)["requests"] != run_of("plain").identity(4)["requests"]
    ours = run_of("plain_ours ties")
    assert ours.merger(1) == ours.merger(12) == ours.cell.merger


def test_a_measurement_of_other_settings_is_another_measurement():
    run = run_of("plain")
    first = run.identity(4)
    assert first == run_of("plain").identity(4) and first != run.identity(8)
    changed = replace(run, cell=replace(run.cell, preset=run.cell.preset.with_settings({"iterations": 7})))
    assert changed.identity(4) != first


def test_objects_are_asked_in_styles_and_kept_objects_that_are_no_anchor_are_told_to_nobody():
    run = run_of("plain", "b", OBJECT_SUITE)
    request = run.request(2)
    assert [(concept.target, concept.kind, concept.anchor) for concept in request.concepts] == [
        ("cat", "object", "flower")
    ]
    assert request.training.iterations == 2 * run_of("plain").request(2).training.iterations
    assert (
        {concept.target for concept in request.retain}
        == set(OBJECT_SUITE.anchors.values())
        == set(OBJECT_SUITE.declared)
    )
    assert set(OBJECT_SUITE.declared + OBJECT_SUITE.hidden + OBJECT_SUITE.order("a")) == set(OBJECTS)
    assert not any(name in prompt for prompt in request.anchor_prompts for name in OBJECT_SUITE.hidden)
    shots = OBJECT_SUITE.shots(["tree", "cat"])
    assert len(shots) == 6 * 24 and {shot.object for shot in shots if shot.role == "target"} == {
        "tree",
        "cat",
    }


# --- more requests and other orders


def test_a_longer_chain_forgets_one_more_style_of_each_family_and_keeps_the_others():
    suite = STYLE_SUITE.with_requests(24)
    forgotten = suite.order("a")
    assert forgotten[:12] == REQUEST_ORDERS["a"] and len(set(forgotten)) == 24
    kept = suite.declared + suite.hidden
    assert len(suite.declared) == len(suite.hidden) == 6 and not set(kept) & set(forgotten)
    assert {SMALL.style_by_name[name].family for name in kept} == {style.family for style in STYLES}
    assert STYLE_SUITE.with_requests(12) is STYLE_SUITE
    shorter = STYLE_SUITE.with_requests(14)
    assert shorter.order("a") == forgotten[:14] and len(shorter.declared + shorter.hidden) == 22
    for count in (0, 25):
        with pytest.raises(ConfigError, match=f"{count} requests are asked for, .* has 24 concepts"):
            STYLE_SUITE.with_requests(count)


def test_orders_beyond_b_are_random_and_each_letter_is_its_own():
    orders = {letter: STYLE_SUITE.order(letter) for letter in "abcdez"}
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == sorted(REQUEST_ORDERS["a"]) for order in orders.values())
    assert STYLE_SUITE.order("c") == orders["c"]
    longer = STYLE_SUITE.with_requests(24)
    assert sorted(longer.order("c")) == sorted(longer.order("b"))
    for name in ("", "ab", "A"):
        with pytest.raises(ConfigError, match="give a letter from a to z"):
            STYLE_SUITE.order(name)


def test_a_chain_is_measured_after_its_last_request_too(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(Run, "identity", lambda run, k: asked.append((run.marks, k)) or line(k=k))
    monkeypatch.setattr(benchmark, "read_results", lambda path: [line(k=k) for k in (1, 4, 6, 8, 12, 24)])
    for requests, marks in ((6, (1, 4, 6)), (12, (1, 4, 8, 12)), (24, (1, 4, 8, 12, 24))):
        asked.clear()
        run_benchmark(tmp_path, cells=[Cell.parse("plain")], seeds=[1], requests=requests)
        assert set(asked) == {(marks, k) for k in marks}


def test_the_same_request_in_a_longer_chain_is_another_measurement():
    cell = Cell.parse("exact undeclared")
    longer = Run(STYLE_SUITE.with_requests(24), cell, "a", 1, 1, STYLE_SUITE.marks)
    assert longer.request(1) == run_of(cell.name).request(1)
    assert longer.identity(1) != run_of(cell.name).identity(1)


def test_an_undeclared_cell_names_nothing_to_keep():
    assert run_of("exact undeclared").request(1).retain == ()
    ties = Cell.parse("plain_ours ties undeclared")
    assert (ties.setting, ties.is_undeclared, ties.merger) == (
        "ties",
        True,
        Cell.parse("plain_ours ties").merger,
    )
    assert run_of("plain").request(1).retain and not Cell.parse("plain").is_undeclared


# --- blindness


def words_of(*texts):
    return {word for text in texts for word in text.lower().replace("_", " ").split()}


@pytest.mark.parametrize(
    ("suite", "blind", "cell"),
    [
        (STYLE_SUITE, "names", "exact"),
        (STYLE_SUITE, "names", "exact undeclared"),
        (STYLE_SUITE, "descriptions", "exact"),
        (OBJECT_SUITE, "names", "exact"),
    ],
)
def test_made_up_names_hold_no_word_of_what_no_method_is_told(
    suite, blind, cell, shipped_network, monkeypatch
):
    run = run_of(cell, suite=suite, blind=blind)
    hidden = words_of(*suite.hidden, *(suite.declared if "undeclared" in cell else ()))
    if blind == "descriptions":
        hidden |= words_of(
            *(text for name in suite.hidden for text in SMALL.style_by_name[name].descriptions)
        )
    targets = run.request(1).concepts

    def made_up():
        rows, rng = TextRows(shipped_network), random.Random(0)
        decoys = decoy_concepts(shipped_network, targets, 500, torch.Generator().manual_seed(0))
        return words_of(*(rows._made_up_name(rng) for _ in range(500)), *(decoy.name for decoy in decoys))

    assert hidden & made_up()
    monkeypatch.setattr(shipped_network, "withheld_words", run.withheld_words)
    assert not hidden & made_up()


def test_plurals_of_a_withheld_word_are_withheld_and_nothing_is_where_nothing_is_blind():
    assert {"moon", "moons", "cup", "cups"} <= OBJECT_SUITE.withheld_words("names", OBJECT_SUITE.hidden)
    assert run_of("exact", blind="nothing").withheld_words == frozenset()


def test_a_run_trains_on_a_network_without_the_withheld_words(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def train(model, request, *, networks, **others):
        raise Seen(networks.get(model.source).words())

    monkeypatch.setattr(benchmark, "run_step", train)
    for blind, is_there in (("names", False), ("nothing", True)):
        with pytest.raises(Seen) as stopped:
            benchmark._measure(run_of("exact", blind=blind), [1], tmp_path)
        words = stopped.value.args[0]
        assert "denim" in words and ("wicker" in words) == is_there


def test_a_result_of_another_blindness_is_not_taken_where_names_are_made_up(tmp_path):
    runs = [run_of("exact", blind=blind) for blind in ("names", "descriptions", "nothing")]
    assert len({benchmark._key(run.identity(4)) for run in runs}) == 3
    assert len({run.store_folder(tmp_path) for run in runs}) == 3
    plain = run_of("plain", blind="descriptions")
    assert plain.identity(4) == run_of("plain").identity(4)
    assert plain.store_folder(tmp_path) == run_of("plain").store_folder(tmp_path)


@pytest.mark.parametrize("entry", [*METHODS, *REGULARIZERS], ids=lambda entry: entry.name)
def test_a_part_that_says_that_it_draws_no_made_up_names_draws_none(
    entry, random_model, random_network, networks, anchors, make_request, monkeypatch
):
    if entry.cls.draws_made_up_names:
        return
    called = []
    monkeypatch.setattr(type(random_network), "words", lambda *_: called.append(1) or ["word"])
    config = entry.config(**SHORT.get(entry.name, {}))
    chosen = {"method": config} if entry in METHODS else {"regularizers": (config,)}
    request = make_request(iterations=2, **chosen)
    run_step(random_model, request, store=anchors, networks=networks["random"])
    assert not called


def test_published_results_are_those_of_todays_settings():
    """The strength of proximal L2-SP counts twice since its row was measured."""
    for published in read_results(RESULTS):
        if published["cell"] != "l2sp_ours" and "blind" not in published:
            run = Run(
                SUITES[published["suite"]],
                Cell.parse(published["cell"]),
                published["order"],
                published["seed"],
                1,
                SUITES[published["suite"]].marks,
            )
            assert benchmark._key(run.identity(published["k"])) == benchmark._key(published)


# --- relapse and near neighbours


def test_relapse_compares_a_target_now_with_the_same_images_at_its_own_time():
    run = run_of("plain")
    then = {"Lava": dict.fromkeys(OBJECTS, [False]), "Arcade": dict.fromkeys(OBJECTS, [False])}
    then["Arcade"][OBJECTS[0]] = [True]
    now = {"Lava": {"style": 30.0}, "Arcade": {"style": 0.0}, "Tartan": {"style": 100.0}}
    assert relapse(run, 12, then, now) == {"mean": 10.0, "worst": 30.0}
    assert relapse(run, 4, then, now) == {"mean": 5.0, "worst": 30.0}  # five objects, the first among them
    assert relapse(run, 12, {}, now) is None


def test_a_style_is_still_shown_by_a_model_that_has_not_forgotten_it(shipped_model, shipped_network):
    shown = still_shown(shipped_network, shipped_model, Judge(), "Neon_Cyan", seed=1)
    assert shown == dict.fromkeys(OBJECTS, [True])


def test_hidden_concepts_of_a_targets_family_are_reported_apart():
    concepts = {
        "Candy_Stripes": {"role": "target", "style": 0.0},
        "Jade_Stripes": {"role": "hidden", "style": 40.0},
        "Lime_Dots": {"role": "hidden", "style": 100.0},
        "Ice_Mosaic": {"role": "hidden", "style": 90.0},
        "Navy_Stripes": {"role": "declared", "style": 10.0},
    }
    lost = {"mean": 2.5, "worst": 20.0}
    measured = line("exact", k=1) | {"per_concept": concepts, "relapse": lost}
    assert further_figures(measured) == {"near": 40.0, "other": 95.0, "relapse": 2.5, "worst_relapse": 20.0}
    head, row = result_table([measured]).splitlines()
    assert head.split()[-6:] == ["IRA", "near", "IRA", "other", "relapse", "worst"]
    assert row.split()[-4:] == ["40.0", "95.0", "2.5", "20.0"]
    other = measured | {"blind": "descriptions"}
    assert list(averages([measured, other])) == ["exact", "exact, blind to descriptions"]
    assert further_figures(line()) == dict.fromkeys(("near", "other", "relapse", "worst_relapse"))


def test_what_was_forgotten_says_which_suite_measures_it():
    assert suite_of(["Candy Stripes", "Lava"]) == (STYLE_SUITE, ["Candy_Stripes", "Lava"])
    assert suite_of(["Cat", "unheard of"]) == (OBJECT_SUITE, ["cat"])
    assert suite_of(["cat", "Lava"]) == (STYLE_SUITE, ["Lava"]) and suite_of([]) == (STYLE_SUITE, [])


def test_a_run_is_measured_once_and_an_unfinished_last_line_again(tmp_path, monkeypatch):
    cell, suite = Cell.parse("plain"), replace(STYLE_SUITE, across=STYLE_SUITE.across[:1])
    cell = replace(cell, preset=cell.preset.with_settings({"anchor_count": 16, "anchor_steps": 6}))
    asked = {"cells": [cell], "seeds": [7], "suite": suite, "orders": ["a"], "requests": 1, "workers": 1}
    seen = []
    lines = run_benchmark(tmp_path, **asked, on_progress=lambda done, total, name: seen.append((done, total)))
    assert seen == [(0, 1), (1, 1)] and len(lines) == 1
    assert lines[0]["scores"]["ua"] > 80 and lines[0]["drift"] > 0 and set(lines[0]["scores"]) == set(METRICS)

    def refuse(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", refuse)
    assert run_benchmark(tmp_path, **asked) == json.loads(json.dumps(lines))
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text()[:-20])
    with pytest.raises(AssertionError, match="measured again"):
        run_benchmark(tmp_path, **asked)


def test_seeds_take_the_orders_in_turn(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(
        Run,
        "identity",
        lambda run, k: runs.append((run.seed, run.order)) or line(k=k, seed=run.seed, order=run.order),
    )
    monkeypatch.setattr(
        benchmark,
        "read_results",
        lambda path: [line(k=1, seed=seed, order=order) for seed in (1, 2) for order in "ab"],
    )
    for seeds, pairs in (
        ([1, 2], [(1, "a"), (2, "b")]),
        ([1, 1, 2, 2], [(1, "a"), (1, "b"), (2, "a"), (2, "b")]),
    ):
        runs.clear()
        run_benchmark(tmp_path, cells=[Cell.parse("plain")], seeds=seeds, requests=1)
        assert list(dict.fromkeys(runs)) == pairs
    runs.clear()
    run_benchmark(tmp_path, cells=[Cell.parse("plain")], seeds=[1], orders=["a", "b"], requests=1)
    assert list(dict.fromkeys(runs)) == [(1, "a"), (1, "b")]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line()) + "\n{damaged\n" + json.dumps(line(k=8)) + "\n")
    with pytest.raises(CheckpointError, match="Line 2 of 'results.jsonl' is damaged; remove that line"):
        read_results(path)


def test_the_table_has_means_over_seeds_and_orders_and_the_papers_figures_where_they_exist(tmp_path):
    lines = [
        line(seed=1, ua=90.0),
        line(seed=2, ua=100.0),
        line(seed=1, k=4, ua=60.0),
        line("recommended", leak=None),
    ]
    assert averages(lines)["plain"] == {
        4: averages(lines)["plain"][4],
        12: dict.fromkeys(METRICS, 50.0) | {"ua": 95.0},
    }
    text = result_table(lines, compare_paper=True).splitlines()
    assert "95.0" in text[1] and "100/16/45" in text[1]
    assert text[2].startswith("recommended, after 12") and text[2].count(" -") == 2
    assert (
        write_figure(lines, tmp_path).name == "benchmark-styles.png"
        and write_figure(lines, tmp_path).name == "benchmark-styles_2.png"
    )


def test_the_papers_order_is_counted_over_pairs_that_it_tells_apart():
    # the paper's IRA: ties 39, plain 16, l1sp 13; all three pairs at least 3 apart; here l1sp stands above
    # plain
    lines = [
        line("plain", ira_hidden=10.0),
        line("l1sp", ira_hidden=20.0),
        line("plain ties", ira_hidden=60.0),
    ]
    said = order_report(lines)[1]
    assert (
        said == "IRA hidden: of 3 pairs at least 3 points apart in the paper, 2 stand in its order; not l1sp "
        "(20.0) above plain (10.0)."
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cells", "best"], "no preset 'best'"),
        (["--requests", "25"], "--requests is 25; give a number between 1 and 24"),
        (["--suite", "objects", "--requests", "7"], "--requests is 7; give a number between 1 and 6"),
        (["--orders", "a", "2"], "no order '2' of requests; give a letter from a to z"),
        (["--pictures", "0"], "--pictures"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []
