"""The benchmark: what a measurement is of, going on where an earlier run stopped, and the table."""

import json
from dataclasses import replace

import pytest

from cul_core.cli import main
from cul_core.errors import CheckpointError, ConfigError
from cul_core.evaluation.scores import METRICS
from cul_core.minicanvas import benchmark
from cul_core.minicanvas.benchmark import Cell, Run, all_cells, averages, read_results, result_table, run_benchmark, write_figure
from cul_core.minicanvas.world import REQUEST_ORDERS
from cul_core.presets import PRESETS


def line(cell="plain", k=12, seed=1, order="a", **scores):
    values = dict.fromkeys(METRICS, 50.0) | scores
    return {"cell": cell, "order": order, "seed": seed, "k": k, "pictures": 1, "requests": "x", "scores": values}


def test_every_preset_is_a_cell_and_names_round_trip():
    cells = all_cells()
    assert {cell.preset for cell in cells} == set(PRESETS) and {Cell("plain", "simultaneous"), Cell("plain", "ties")} <= set(cells)
    assert [Cell.parse(cell.name) for cell in cells] == cells


@pytest.mark.parametrize(
    ("name", "said"), [("best", "no preset 'best'"), ("plain together", "no setting 'together'; choose one of sequential")]
)
def test_a_cell_that_does_not_exist_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        Cell.parse(name)


def test_a_chain_forgets_one_target_a_request_and_simultaneous_all_so_far_with_the_iterations_of_the_chain():
    chain, together = Run(Cell("plain"), "b", 1, 12, 1), Run(Cell("plain", "simultaneous"), "b", 1, 12, 1)
    assert [concept.target for concept in chain.request(4).concepts] == [REQUEST_ORDERS["b"][3]]
    assert [concept.target for concept in together.request(4).concepts] == list(REQUEST_ORDERS["b"][:4])
    assert together.request(4).training.iterations == 4 * chain.request(4).training.iterations
    assert chain.marks == [1, 4, 8, 12] and Run(Cell("plain"), "a", 1, 5, 1).marks == [1, 4]


def test_ties_trains_every_target_alone_and_merges_as_the_paper_does():
    run = Run(Cell("plain", "ties"), "a", 1, 12, 1)
    assert run.request(4) == Run(Cell("plain"), "a", 1, 12, 1).request(4)
    assert (run.merger(5).strength, run.merger(12).keep_fraction) == (1.75, 0.4)
    assert run.identity(4)["requests"] != Run(Cell("plain"), "a", 1, 12, 1).identity(4)["requests"]


def test_a_measurement_of_other_settings_is_another_measurement(monkeypatch):
    run = Run(Cell("plain"), "a", 1, 12, 1)
    first = run.identity(4)
    assert first == Run(Cell("plain"), "a", 1, 12, 1).identity(4) and first != run.identity(8)
    changed = replace(PRESETS["plain"], training=replace(PRESETS["plain"].training, iterations=7))
    monkeypatch.setitem(PRESETS, "plain", changed)
    assert run.identity(4) != first


def test_a_run_is_measured_once_and_an_unfinished_last_line_again(tmp_path, monkeypatch):
    asked = {"cells": [Cell("plain")], "seeds": [7], "orders": ["a"], "requests": 1, "workers": 1}
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


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line()) + "\n{damaged\n" + json.dumps(line(k=8)) + "\n")
    with pytest.raises(CheckpointError, match="Line 2 of 'results.jsonl' is damaged; remove that line"):
        read_results(path)


def test_the_table_has_means_over_seeds_and_orders_and_the_papers_figures_where_they_exist(tmp_path):
    lines = [line(seed=1, ua=90.0), line(seed=2, ua=100.0), line(seed=1, k=4, ua=60.0), line("recommended", leak=None)]
    assert averages(lines)["plain"] == {4: averages(lines)["plain"][4], 12: dict.fromkeys(METRICS, 50.0) | {"ua": 95.0}}
    text = result_table(lines, compare_paper=True).splitlines()
    assert "95.0" in text[1] and "100/16/45" in text[1]
    assert text[2].startswith("recommended, after 12") and text[2].count(" -") == 2
    assert write_figure(lines, tmp_path).name == "benchmark.png" and write_figure(lines, tmp_path).name == "benchmark_2.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--cells", "best"], "no preset 'best'"), (["--requests", "13"], "--requests is 13"), (["--pictures", "0"], "--pictures")],
)
def test_the_command_refuses_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []
