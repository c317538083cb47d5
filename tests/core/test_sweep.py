"""A sweep runs the commands of a plan in processes of their own, loses none that is killed, and resumes."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest

from cul_core.cli import main, parser
from cul_core.cli.engines import Command, LocalEngine
from cul_core.cli.sweep import _read_plan

ROOT = Path(__file__).parents[2]

STAND_IN = """
import json, os, signal, sys
words = sys.argv[1:]
print("ran", *words[:3], flush=True)
figures = words[words.index("--json") + 1]
marks = os.path.join(os.path.dirname(figures), "kills")
done = len(open(marks).read()) if os.path.exists(marks) else 0
if done < int(os.environ["KILLS"]):
    open(marks, "a").write("x")
    os.kill(os.getpid(), signal.SIGKILL)
if "bad" in words:
    sys.exit(2)
with open(figures, "w") as file:
    json.dump({"seconds": 1.0, "lines": [{"cell": words[4]}]}, file)
"""
"""Stands for `python -m cul_core`: it is killed KILLS times, then writes figures."""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(kills)`: from now on the local engine runs the stand-in."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def install(kills=0):
        monkeypatch.setenv("KILLS", str(kills))
        monkeypatch.setattr(
            "cul_core.cli.sweep.engine_called",
            lambda name, workers, address: LocalEngine(workers or 2, (sys.executable, str(script))),
        )

    return install


def plan(tmp_path, *lines):
    path = tmp_path / "plan.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def swept(tmp_path, *lines):
    status = main(["sweep", str(plan(tmp_path, *lines)), "--out", str(tmp_path / "out")])
    file = tmp_path / "out/results.jsonl"
    return status, [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


LINES = (
    "unlearn Lava --seed 1",
    "unlearn 'Candy Stripes' --seed 2",
    "benchmark --cells plain 'plain ties' --seeds 1",
)


def test_every_command_of_a_plan_has_a_line_of_results_in_its_order(stand_in, tmp_path, capsys):
    stand_in()
    status, lines = swept(tmp_path, "# a comment", *LINES, "")
    assert status == 0 and [line["command"] for line in lines][:2] == list(LINES[:2])
    assert [line["command"].split()[3:5] for line in lines[2:]] == [
        ["--cells", "plain"],
        ["--cells", "'plain"],
    ]
    cells = [json.loads(line)["cell"] for line in (tmp_path / "out/benchmark.jsonl").read_text().splitlines()]
    assert cells == ["plain", "plain ties"]


@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signal")
def test_a_command_whose_process_is_killed_is_started_again(stand_in, tmp_path):
    stand_in(kills=3)
    status, lines = swept(tmp_path, *LINES)
    assert status == 0 and len(lines) == 4
    logs = [path.read_text() for path in (tmp_path / "out/jobs").glob("*/log.txt")]
    assert [log.count("ran ") for log in logs] == [4] * 4


def test_a_sweep_runs_only_what_has_not_ended_yet(stand_in, tmp_path, capsys):
    stand_in()
    status, lines = swept(tmp_path, LINES[0], "unlearn bad")
    assert status == 2 and len(lines) == 1
    assert "1 of 2 commands failed, the first is 'unlearn bad'" in capsys.readouterr().err
    status, lines = swept(tmp_path, *LINES[:2])
    assert status == 0 and [line["command"] for line in lines] == list(LINES[:2])
    logs = [path.read_text() for path in (tmp_path / "out/jobs").glob("*/log.txt")]
    assert sorted(log.count("ran ") for log in logs) == [1, 1, 1]


@pytest.mark.skipif(os.name == "nt", reason="kills by POSIX signal")
def test_a_command_that_is_always_killed_is_given_up(stand_in, tmp_path, monkeypatch):
    stand_in(kills=100)
    monkeypatch.setattr("cul_core.cli.engines._TRIES", 2)
    assert swept(tmp_path, LINES[0]) == (2, [])


def test_an_engine_gives_the_status_of_every_command(tmp_path):
    engine = LocalEngine(2, (sys.executable, "-c", "import sys; print('x'); sys.exit(int(sys.argv[1]))"))
    commands = [Command((str(status),), tmp_path / f"{status}.txt") for status in (0, 2, 3)]
    assert dict(engine.run(commands)) == {0: 0, 1: 2, 2: 3}
    assert (tmp_path / "0.txt").read_text().strip() == "x"


def test_a_benchmark_is_one_command_for_each_run(tmp_path):
    path = plan(tmp_path, "benchmark --cells plain esd --seeds 1 2 3 --orders a b --requests 2")
    found = _read_plan(path, parser().parse_args(["sweep", str(path)]).parsers)
    pairs = [(words[4], words[6], words[8]) for words in found]
    assert pairs == [
        (cell, seed, order)
        for seed, order in (("1", "a"), ("2", "b"), ("3", "a"))
        for cell in ("plain", "esd")
    ]
    assert all(words[-2:] == ("--requests", "2") for words in found)


def test_a_benchmark_of_a_plan_has_the_runs_and_the_blindness_of_the_command(tmp_path):
    lines = "--seeds 7 8", "--seeds 9 --orders c d --blind descriptions"
    path = plan(tmp_path, *(f"benchmark --cells plain {line}" for line in lines))
    runs = _read_plan(path, parser().parse_args(["sweep", str(path)]).parsers)
    options = [dict(zip(words[1::2], words[2::2], strict=True)) for words in runs]
    found = [(o["--seeds"], o["--orders"], o["--blind"]) for o in options]
    assert found == [("7", "a", "names"), ("8", "b", "names")] + [("9", x, "descriptions") for x in "cd"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("demo", "begins with 'demo'; a sweep runs unlearn, audit, benchmark"),
        ("unlearn", "is no valid command .*target"),
        ("unlearn Lava --iterations many", "is no valid command .*iterations"),
        ("unlearn 'Lava", "No closing quotation"),
        ("# nothing", "has no command"),
    ],
)
def test_a_plan_that_cannot_work_is_one_line(line, said, tmp_path, capsys):
    assert main(["sweep", str(plan(tmp_path, line)), "--out", str(tmp_path / "out")]) == 2

    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_a_missing_plan_and_a_missing_ray_are_one_line(tmp_path, monkeypatch, capsys):
    assert main(["sweep", str(tmp_path / "none.txt")]) == 2
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["sweep", str(plan(tmp_path, LINES[0])), "--engine", "ray", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "needs the package ray" in capsys.readouterr().err


def test_ray_and_accelerate_are_imported_by_the_engine_alone():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("cul_core", "nodes")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and {name.name for name in node.names} & {"ray", "accelerate"}
    }
    assert found == {"cul_core/cli/engines.py"}
