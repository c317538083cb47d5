"""The scripts in `benchmarks/`: what they make of what was measured, and what they refuse. The reference
itself is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cul_core

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as if it were run: its own folder comes first."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "comparison"))
    return importlib.import_module


def refused(capsys, code):
    out, err = capsys.readouterr()
    assert code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# --- beside the reference


def span(begin, end, calls=0, pictures=0):
    return {"begin": begin, "end": end, "cpu": 2 * (end - begin), "calls": calls, "pictures": pictures}


def run_of(side, kind, *, begin, slow, selft=(0, 0)):
    """The record of a run in which everything takes `slow` times as long."""
    updates = [[begin + slow * at, slow * at * 2] for at in (20, 21, 24, 25)]
    spans = {
        "anchors": [span(begin + slow * 2, begin + slow * 12)],
        "run": [span(begin + slow, begin + slow * 30)],
        "selft": [span(begin, begin + slow * 7, *selft)],
        "project_prepare": [span(begin, begin + slow), span(begin, begin + slow)],
        "project_update": [span(begin, begin + slow * 0.5)] * 4,
    }
    return {
        "side": side,
        "kind": kind,
        "begin": begin,
        "end": begin + slow * 31,
        "cpu": slow * 40,
        "updates": updates,
        "spans": spans,
        "load": [1.5, 1, 1],
        "shims": [f"shim of {side}"],
        "torch": "2",
        "threads": 2,
        "peak_bytes": slow * 2**30,
        "peak_anonymous_bytes": slow * 2**29,
        "peak_training_bytes": None,
        "notes": {},
    }


@pytest.fixture
def measured(script):
    """(the script, a job, runs in which the reference takes 2, 3 and 4 times as long)."""
    job = {
        "anchors": 4,
        "anchor_steps": 3,
        "selft_steps": 4,
        "selft_resolution": 64,
        "keep": ["cat"],
        "resolution": 256,
        "batch_size": 1,
        "iterations": 4,
    }
    runs = [run_of("reference", "request", begin=100.0 * slow, slow=slow) for slow in (2, 3, 4)]
    runs += [run_of("ours", "request", begin=1000.0, slow=1)]
    for side, slow, selft in (("reference", 6, (18, 24)), ("ours", 1, (8, 12))):
        runs += [run_of(side, kind, begin=0.0, slow=slow, selft=selft) for kind in ("selft", "projection")]
    return script("vs_reference"), job, runs


def test_figures_are_medians_of_runs_and_ratios_say_how_many_times_as_much_the_reference_takes(measured):
    vs_reference, job, runs = measured
    rows = {row.name: row for row in vs_reference.rows_of(runs, job)}
    # updates end at 20, 21, 24 and 25: the median of 1, 3 and 1 is 1, and the reference's median run is 3
    # times as slow
    assert (rows["iteration, s"].reference, rows["iteration, s"].ours, rows["iteration, s"].ratio) == (
        3,
        1,
        3,
    )
    assert rows["iteration, cpu s"].reference == 6
    assert (
        rows["anchor images, s"].reference == 30 and rows["to the first update, s"].reference == 3 * 20 - 30
    )
    assert rows["whole request, s"].ours == 30 and rows["whole request, cpu s"].ratio == 3
    assert rows["peak memory, GiB"].reference == 3 and rows["of it anonymous, GiB"].ours == 0.5
    assert rows["training's peak, GiB"].ratio is None
    assert rows["SelFT at 4 states of 64 px, s"].ratio == 6
    assert (rows["  calls of the UNet"].reference, rows["  calls of the UNet"].ours) == (18, 8)
    assert (rows["  calls at 50 states"].reference, rows["  calls at 50 states"].ours) == (1375, 100)
    assert rows["projection: prepare, s"].ours == 2 and rows["projection: update, ms"].ours == 500


def test_calls_of_selft_by_formula_are_those_that_are_made(script):
    # states 0 to 3 are led to by 0 to 3 guided calls of two pictures; at each there are two calls without and
    # one with gradients
    assert script("vs_reference").selft_calls(4) == {
        "reference": (0 + 1 + 2 + 3 + 12, 2 * 6 + 12),
        "ours": (8, 12),
    }


def test_report_says_what_every_figure_means_and_what_was_replaced(measured):
    vs_reference, job, runs = measured
    for run in runs:
        if run["side"] == "ours" and run["kind"] != "selft":
            run["shims"] = []
    text, values = vs_reference.report(job, runs)
    lines = {
        line.rsplit(None, 3)[0]: line.rsplit(None, 3)[1:]
        for line in text.splitlines()
        if line.count("  ") > 3
    }
    assert lines["iteration, s"] == ["3", "1", "3.00x"] and lines["training's peak, GiB"] == ["-", "-", "-"]
    for line in (
        "- shim of reference\n",
        "- shim of ours (selft)",
        "weight decay 0.01",
        "load 1.5 to 1.5",
        "- peak memory, GiB: the most the process",
    ):
        assert line in text
    assert json.loads(json.dumps(values))["rows"][0]["ratio"] == 3 and len(values["runs"]) == len(runs)


def test_one_kind_alone_has_its_rows_alone(measured):
    vs_reference, job, runs = measured
    names = [
        row.name for row in vs_reference.rows_of([run for run in runs if run["kind"] == "projection"], job)
    ]
    assert names == [
        "projection: prepare, s",
        "projection: prepare, cpu s",
        "projection: update, ms",
        "projection: update, cpu ms",
    ]


@pytest.fixture
def reference(tmp_path):
    """A folder with the name of the published script in it."""
    script = tmp_path / "cuig" / "UnlearningMethods" / "ConAbl" / "train_conabl.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('a reference that fails')")
    return tmp_path / "cuig"


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).touch()
    return folder


def test_folder_without_the_reference_is_refused(script, words, tmp_path, capsys):
    code = script("vs_reference").main(["--reference", str(tmp_path), "--tokenizer", str(words)])
    assert "has no UnlearningMethods" in refused(capsys, code)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokenizer", "nowhere"], "'nowhere' has no vocab.json"),
        (["--resolution", "200"], "--resolution is 200; give a multiple of 64"),
        (["--iterations", "1"], "--iterations is 1; give at least 2"),
        (["--python", "no-such-python"], "no interpreter 'no-such-python'"),
    ],
)
def test_arguments_of_the_comparison_are_checked_before_anything_is_made(
    arguments, said, script, reference, words, tmp_path, capsys
):
    work = tmp_path / "work"
    code = script("vs_reference").main(
        ["--reference", str(reference), "--tokenizer", str(words), "--work", str(work), *arguments]
    )
    assert said in refused(capsys, code) and not work.exists()


def test_a_side_that_fails_ends_the_comparison_with_its_last_line(script, reference, words, tmp_path, capsys):
    (tmp_path / "work" / "random-sd15").mkdir(parents=True)
    (tmp_path / "work" / "random-sd15.safetensors").touch()
    given = [
        "--reference",
        str(reference),
        "--tokenizer",
        str(words),
        "--work",
        str(tmp_path / "work"),
        "--kinds",
        "projection",
    ]
    err = refused(capsys, script("vs_reference").main(given))
    assert "reference_side.py ended with 1 (" in err
    assert [path.suffix for path in (tmp_path / "work").glob("projection-*") if path.is_file()] == [".log"]


def test_marks_count_calls_pictures_and_updates_and_change_nothing(script, tmp_path):
    marks = script("marks").Marks()

    class Net(torch.nn.Module):
        def forward(self, sample, scale=1):
            return sample * scale

    marks.count_calls(Net)
    net = Net()

    def work():
        return net(torch.ones(2, 1)) + net(torch.ones(2, 1), scale=3)

    assert marks.timed("work", work)().tolist() == [[4], [4]]
    marks.updated()
    net(torch.ones(5, 1))
    marks.save(tmp_path / "marks.json", ["one"])
    noted = json.loads((tmp_path / "marks.json").read_text())
    (only,) = noted["spans"]["work"]
    assert (only["calls"], only["pictures"]) == (2, 4) and 0 <= only["end"] - only["begin"]
    assert len(noted["updates"]) == 1 and noted["shims"] == ["one"]


# --- the closed-form solve


UCE = """
from pathlib import Path

def UCE(pipe, edit, guide, preserve, erase_scale, preserve_scale, lamb, save_dir, exp_name):
    ids = pipe.tokenizer("a", padding="max_length", max_length=pipe.tokenizer.model_max_length)
    at = ids["attention_mask"].sum() - 2
    rows = [pipe.encode_prompt(prompt=e, device=device)[0][:, at, :] for e in edit + guide]
    assert edit == ["style 0", "style 1"] and guide == ["art", "art"] and not preserve
    named = pipe.unet.named_modules()
    outs = [module(rows[0]).to(torch_dtype) for name, module in named if name.endswith("attn2.to_k")]
    assert [out.shape for out in outs] == [(1, 30)] and rows[0].shape == (1, 200)
    assert (rows[0] != rows[1]).all() and (rows[2] == rows[3]).all() and Path(save_dir).is_dir()
    print("edited")
"""


@pytest.fixture
def solves(script, monkeypatch, tmp_path):
    """(the script with two matrices of width 200, a checkout of code that is called as UCE's)."""
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_{}.weight"
    exact = script("exact")
    small = {name.format("k"): torch.ones(30, 200), name.format("v"): torch.randn(400, 200)}
    monkeypatch.setattr(exact, "weights_of", lambda family: small)
    path = tmp_path / exact.UCE_SCRIPT
    path.parent.mkdir(parents=True)
    path.write_text(UCE)
    return exact, tmp_path


def test_solve_is_measured_from_nothing_and_with_one_more(solves, capsys):
    exact, checkout = solves
    for found in (exact.measure_exact("sd1", 2), exact.measure_uce("sd1", 2, checkout)):
        assert all(value >= 0 for value in found["solve"]) and found["extra_bytes"] >= 0
    assert len(exact.measure_exact("sd1", 2)["next"]) == 2 and capsys.readouterr().out == ""
    assert "have 101 directions, and this model has room for 100" in exact.measure_exact("sd1", 101)["said"]


def test_rows_without_figures_say_why(script):
    exact = script("exact")
    rows = [
        {"family": "sd1", "concepts": 12, "side": "exact", "solve": [1.5, 2.25], "next": [0.5, 0.75]}
        | {"extra_bytes": 123e6},
        {"family": "sd1", "concepts": 12, "side": "uce", "said": "No checkout."},
    ]
    head, first, second, said = exact.table(rows).splitlines()
    assert head.split() == ["n", "solve,", "s", "CPU", "s", "next,", "s", "CPU", "s", "MB"]
    assert first.split() == ["sd1", "12", "exact", "1.50", "2.25", "0.50", "0.75", "123"]
    assert second.split()[-5:] == ["-"] * 5 and said == "- sd1, 12, UCE's public code: No checkout."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concepts", "0"], "--concepts is 0; give numbers from 1"),
        (["--uce", "nowhere"], "'nowhere' has no trainscripts"),
    ],
)
def test_arguments_of_the_solve_are_checked(arguments, said, script, capsys):
    assert said in refused(capsys, script("exact").main(arguments))


# --- on a GPU


@pytest.fixture
def gpu(script):
    pytest.importorskip("cul_core.training.compute")
    return script("gpu")


def test_gpu_benchmark_runs_small_on_the_cpu(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    monkeypatch.setattr(gpu, "_MATRIX_SIDE", {"cpu": 64})
    path = tmp_path / "gpu.json"
    code = gpu.main(
        [
            "--device",
            "cpu",
            "--family",
            "mini",
            "--batch",
            "1",
            "2",
            "--dtype",
            "float32",
            "--checkpointing",
            "off",
            "--compile",
            "off",
            "--iterations",
            "1",
            "--json",
            str(path),
        ]
    )
    out = capsys.readouterr().out
    found = json.loads(path.read_text())
    one, two = found["rows"]
    assert code == 0 and (one["batch"], two["batch"]) == (1, 2)
    assert one["peak_gib"] is None and two["iterations_per_second"] > 0
    # three passes through the network, two of them for one picture with gradients; a multiplication and an
    # addition are two operations
    done = found["flops_per_picture"]["mini"] * two["batch"] * two["iterations_per_second"]
    assert two["share"] == pytest.approx(done / found["matrix_flops_per_second"]["float32"]) and two[
        "teraflops"
    ] == pytest.approx(done / 1e12)
    assert out.startswith("CPU: ") and "mini      2  float32" in out


def test_operations_of_an_iteration_are_those_of_the_network(gpu):
    from torch.utils.flop_counter import FlopCounterMode

    bench = gpu._Bench(gpu._open("mini", None, None), "cpu", None)
    network = bench._networks.get(bench._model.source)
    embeddings = network.encode(["an image of a cat"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.predict(torch.zeros(1, *network.family.latent_shape), torch.tensor([5]), embeddings)
    forward = counter.get_total_flops()
    # one forward for the anchor, one for the target, and a backward through most of the latter that takes no
    # gradient of most weights
    assert 2.5 * forward < bench.flops("float32") < 4 * forward


def test_a_row_whose_memory_was_too_short_has_no_figures(gpu):
    rows = [
        gpu.Row("sd1", 4, "bfloat16", "off", "on", 3.21987, 12.0, 0.4567, 10.125),
        gpu.Row("sdxl", 8, "bfloat16", "off", "off", said=("No.",)),
    ]
    text = gpu.table(rows)
    assert "3.22" in text and "45.7%" in text and "10.12" in text
    assert text.splitlines()[2].split()[-4:] == ["-"] * 4 and text.endswith("- No.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--batch", "0"], "must be 1 or more"), (["--model", "a.safetensors"], "is of one family")],
)
def test_arguments_of_the_gpu_benchmark_are_checked(arguments, said, gpu, capsys):
    assert said in refused(capsys, gpu.main(["--device", "cpu", *arguments]))


def test_machine_without_a_gpu_is_told_so(gpu):
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(cul_core.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: This needs a CUDA GPU") and done.stderr.count("\n") == 1
