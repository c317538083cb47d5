"""The benchmark: what a measurement is of, going on where an earlier run stopped, and the table."""

import json
from dataclasses import replace

import pytest

from cul_core.audits.classifier_scores import METRICS
from cul_core.base.errors import CheckpointError, ConfigError
from cul_core.cli import main
from cul_core.files.locks import try_locked
from cul_core.minicanvas import benchmark
from cul_core.minicanvas.benchmark import (
    GRID,
    PAPER,
    Cell,
    Run,
    averages,
    grid,
    order_report,
    read_results,
    result_table,
    run_benchmark,
    write_figure,
)
from cul_core.minicanvas.suites import OBJECT_SUITE, STYLE_SUITE, suite_of
from cul_core.minicanvas.world import OBJECTS, REQUEST_ORDERS


def run_of(name, order="a", suite=STYLE_SUITE):
    return Run(suite, Cell.parse(name), order, 1, 1, suite.marks)


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
    assert len(names) == len(set(names)) == 20
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
    assert set(OBJECT_SUITE.declared + OBJECT_SUITE.hidden + OBJECT_SUITE.orders["a"]) == set(OBJECTS)
    assert not any(name in prompt for prompt in request.anchor_prompts for name in OBJECT_SUITE.hidden)
    shots = OBJECT_SUITE.shots(["tree", "cat"])
    assert len(shots) == 6 * 24 and {shot.object for shot in shots if shot.role == "target"} == {
        "tree",
        "cat",
    }


def test_what_was_forgotten_says_which_suite_measures_it():
    assert suite_of(["Candy Stripes", "Lava"]) == (STYLE_SUITE, ["Candy_Stripes", "Lava"])
    assert suite_of(["Cat", "unheard of"]) == (OBJECT_SUITE, ["cat"])
    assert suite_of(["cat", "Lava"]) == (STYLE_SUITE, ["Lava"]) and suite_of([]) == (STYLE_SUITE, [])


def test_a_run_is_measured_once_and_an_unfinished_last_line_again(tmp_path, monkeypatch):
    cell, suite = Cell.parse("plain"), replace(STYLE_SUITE, across=STYLE_SUITE.across[:3])
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
        (["--requests", "13"], "--requests is 13"),
        (["--pictures", "0"], "--pictures"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []
