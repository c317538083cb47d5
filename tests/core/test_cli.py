"""The command line, in process: what it writes and prints, and that every mistake is one line and leaves
nothing behind."""

import errno
import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from cul_core import __version__
from cul_core.audits import AUDITS
from cul_core.audits.classifier_scores import Shot, Verdict, score
from cul_core.cli import main
from cul_core.history.step_record import read_history
from cul_core.methods.exact import ExactConfig
from cul_core.requests.presets import PRESETS, Preset
from cul_core.store.anchors import AnchorStore


@pytest.fixture(autouse=True)
def few_anchors(monkeypatch, anchors):
    """Eight anchor images, sampled once for all tests."""
    full = Preset.request
    monkeypatch.setattr(
        Preset, "request", lambda self, *args, **kwargs: replace(full(self, *args, **kwargs), anchor_count=8)
    )
    monkeypatch.setattr(
        "cul_core.store.anchors.AnchorStore", lambda *where: AnchorStore(*where) if where else anchors
    )


@pytest.fixture
def unlearn(random_checkpoint, tmp_path):
    """Runs `unlearn` with two iterations on the random model; later arguments win over these."""

    def run(target, *arguments):
        given = [
            "--model",
            random_checkpoint,
            "--iterations",
            "2",
            "--preset",
            "plain",
            "--out",
            tmp_path / "out.safetensors",
        ]
        return main(list(map(str, ["unlearn", target, *given, *arguments])))

    return run


def refused(capsys, code):
    """The error line of a command that failed; it must be the only output."""
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_unlearn_writes_a_checkpoint_that_inspect_explains(unlearn, random_model, tmp_path, capsys):
    assert unlearn("Candy Stripes", "--seed", "4", "--json", tmp_path / "figures.json") == 0
    out = capsys.readouterr().out
    path = tmp_path / "out.safetensors"
    assert f"checkpoint: {path}" in out.splitlines() and "forgot Candy Stripes in " in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["checkpoint"] == str(path) and len(figures["losses"]) == 2 and figures["seconds"] > 0

    assert main(["inspect", str(path), "--json", str(tmp_path / "history.json")]) == 0
    out = capsys.readouterr().out
    ((record,), _) = read_history(path)
    assert record.parent == random_model.content_hash
    for said in (
        "Candy Stripes",
        "conabl",
        "2 iterations",
        "seed 4",
        record.finished,
        record.parent[:12],
        record.result[:12],
        random_model.source.path.name,
    ):
        assert said in out
    values = json.loads((tmp_path / "history.json").read_text())
    assert (
        values["source"]["sha256"] == random_model.source.sha256
        and values["history"][0]["result"] == record.result
    )


def test_a_step_in_a_store_is_found_again_shown_and_cleared(unlearn, tmp_path, capsys):
    store = tmp_path / "kept"
    assert unlearn("Lava", "--store", store) == unlearn("Lava", "--store", store) == 0
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forgot")]
    assert "kept from an earlier run" in second and "kept" not in first
    assert main(["store", "--folder", str(store), "--json", str(tmp_path / "store.json")]) == 0
    out = capsys.readouterr().out
    assert (
        "1 finished steps" in out
        and "  Lava (" in out
        and "2 iterations" in out
        and "1 sets of anchor images" in out
    )
    assert {
        part: len(files) for part, files in json.loads((tmp_path / "store.json").read_text()).items()
    } == {"steps": 1, "anchors": 1, "states": 0, "texts": 0}
    assert main(["store", "--folder", str(store), "--clear", "steps"]) == 0
    assert "removed 1 files" in capsys.readouterr().out
    assert main(["store", "--folder", str(store), "--clear"]) == 0
    out = capsys.readouterr().out
    assert "removed 1 files" in out and "0 finished steps" in out and not list(store.rglob("*.safetensors"))


def test_a_store_that_is_not_there_is_refused(tmp_path, capsys):
    assert "give the one that unlearn --store" in refused(
        capsys, main(["store", "--folder", str(tmp_path / "none")])
    )


def test_unlearn_keeps_a_shipped_list_of_names_and_says_how_many(unlearn, tmp_path, capsys):
    assert unlearn("Lava", "--preset", "projection", "--auxiliary", "objects") == 0
    assert "auxiliary protected: 5" in capsys.readouterr().out
    ((record,), _) = read_history(tmp_path / "out.safetensors")
    assert record.request["regularizers"][0]["auxiliary"] == "objects"


def test_unlearn_goes_on_from_an_edited_checkpoint(unlearn, random_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unlearn("Lava") == 0
    first = tmp_path / "out.safetensors"
    arguments = [
        "unlearn",
        "Frost",
        "--model",
        str(first),
        "--pretrained",
        str(random_checkpoint),
        "--iterations",
        "2",
    ]
    assert main([*arguments, "--keep", "Navy Stripes"]) == 0
    (second,) = set(tmp_path.iterdir()) - {first}
    assert (
        second.name == "out-without-Frost.safetensors" and f"checkpoint: {second}" in capsys.readouterr().out
    )
    assert [record.targets for record in read_history(second)[0]] == [("Lava",), ("Frost",)]


def test_unlearn_writes_a_lora_too_and_says_what_it_keeps(unlearn, tmp_path, capsys):
    lora, figures = tmp_path / "l.safetensors", tmp_path / "figures.json"
    assert unlearn("Lava", "--lora", lora, "--lora-rank", "2", "--json", figures) == 0
    values = json.loads(figures.read_text())["lora"]
    size = lora.stat().st_size
    assert values["path"] == str(lora) and values["size_bytes"] == size and not values["is_exact"]
    said = f"LoRA: {lora} ({100 * values['energy']:.2f} % of the edit, rank 2, {size / 1e6:.1f} MB)"
    assert said in capsys.readouterr().out.splitlines()


@pytest.fixture
def few_names(monkeypatch):
    """The preset exact with few made-up names."""
    few = replace(PRESETS["exact"], method=ExactConfig(made_up=40))
    monkeypatch.setitem(PRESETS, "exact", few)


def test_take_back_writes_the_checkpoint_without_a_request(
    unlearn, few_names, random_checkpoint, tmp_path, capsys
):
    def forget(name, start, out):
        arguments = ("--model", start, "--pretrained", random_checkpoint, "--preset", "exact", "--out", out)
        assert unlearn(name, *arguments) == 0
        return out

    one = forget("Lava", random_checkpoint, tmp_path / "1.safetensors")
    both = forget("Arcade", one, tmp_path / "2.safetensors")
    never = forget("Arcade", random_checkpoint, tmp_path / "3.safetensors")
    assert unlearn("Frost", "--model", both, "--pretrained", random_checkpoint) == 0
    capsys.readouterr()
    out, lora, figures = (tmp_path / f"left.{end}" for end in ("safetensors", "lora.safetensors", "json"))
    given = ["--pretrained", random_checkpoint, "--out", out, "--lora", lora, "--json", figures]
    assert main(list(map(str, ["take-back", "lava", "--model", both, *given]))) == 0
    said = capsys.readouterr().out
    for line in ("Taken back: Lava.", "Still forgotten: Arcade.", "Each of them can be taken back."):
        assert line in said.splitlines()
    assert f"LoRA: {lora} (exact, rank 3, " in said and f"checkpoint: {out}" in said
    values = json.loads(figures.read_text())
    assert values["taken_back"] == ["Lava"] and values["can_be_taken_back"] == ["Arcade"]
    left, expected = load_file(out), load_file(never)
    assert left.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in left.items())

    mixed = ["take-back", "arcade", "--model", tmp_path / "out.safetensors", "--out", out, *given[:2]]
    assert main(list(map(str, mixed))) == 0
    said = capsys.readouterr().out
    assert "Still forgotten: Lava, Frost." in said
    assert "Cannot be taken back exactly, because training made it: Frost." in said
    assert main(list(map(str, [*mixed[:1], "frost", *mixed[2:]]))) == 2
    assert "'frost' was forgotten by training" in capsys.readouterr().err


def test_unlearn_stops_early_where_minicanvas_is_measured(unlearn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "cul_core.minicanvas.judge.measure_for",
        lambda request, judge, world: lambda network, check: (99.0, 12.5),
    )
    assert unlearn("Lava", "--evaluate-every", "1", "--json", tmp_path / "figures.json") == 0
    assert "best ra: 12.5" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["last_iteration"] == len(figures["losses"]) == 1


def test_unlearn_does_not_overwrite(unlearn, tmp_path, capsys):
    (tmp_path / "out.safetensors").write_text("precious")
    assert unlearn("Lava") == 0
    assert f"checkpoint: {tmp_path / 'out_2.safetensors'}" in capsys.readouterr().out
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_target_that_is_no_file_name_still_makes_one(random_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model.safetensors"
    model.write_bytes(random_checkpoint.read_bytes())
    assert (
        main(["unlearn", "AC/DC: live?", "--model", str(model), "--iterations", "0", "--preset", "plain"])
        == 0
    )
    (written,) = set(tmp_path.iterdir()) - {model}
    assert not set('/\\:*?"<>| ') & set(written.name)


def test_inspect_of_a_file_without_history_says_so(random_checkpoint, capsys):
    assert main(["inspect", str(random_checkpoint)]) == 0
    assert "not written by continual-unlearning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dog", "--kind", "animal"], "'animal'"),
        ([""], "target is empty"),
        (["Lava", "--keep", ""], "target is empty"),
        (["dog", "--kind", "object", "--anchor", "Dog"], "both 'dog'"),
        (["dog", "--kind", "object"], "no anchor"),
        (["Lava", "--preset", "best"], "no preset 'best'"),
        (
            ["Lava", "--auxiliary", "auto"],
            "auxiliary is 'auto', which needs 'projection', and the preset has only conabl",
        ),
        (
            ["Lava", "--preset", "projection", "--auxiliary", "people"],
            "auxiliary is 'people'; choose one of none, auto, styles",
        ),
        (["Lava", "--iterations", "-1"], "iterations is -1"),
        (["Lava", "--learning-rate", "nan"], "learning_rate is nan"),
        (["Lava", "--seed", "-1"], "seed is -1"),
        (["Lava", "--lora", "l.safetensors", "--lora-rank", "0"], "--lora-rank is 0"),
        (["Lava", "--device", "gpu"], "--device is 'gpu', which PyTorch cannot use here"),
        (["Lava", "--device", "cuda:99"], "--device is 'cuda:99'"),
    ],
)
def test_request_that_cannot_work_is_one_line_and_writes_nothing(unlearn, capsys, tmp_path, arguments, said):
    assert said in refused(capsys, unlearn(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["evaluate"], ["audit", "classification"], ["unlearn", "Lava", "--model"]],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("name", ["cut_short.safetensors", "missing.safetensors", "pickle.ckpt"])
def test_unusable_file_is_one_line_that_names_it(random_checkpoint, tmp_path, capsys, command, name):
    if name != "missing.safetensors":
        (tmp_path / name).write_bytes(random_checkpoint.read_bytes()[:-1000])
    before = set(tmp_path.iterdir())
    assert name in refused(
        capsys, main([*command, str(tmp_path / name), "--json", str(tmp_path / "figures.json")])
    )
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("requests", ["0", "13", "-1"])
def test_demo_of_an_impossible_length_is_refused(tmp_path, capsys, requests):
    assert f"--requests is {requests}" in refused(
        capsys, main(["demo", "--requests", requests, "--out", str(tmp_path / "demo")])
    )
    assert list(tmp_path.iterdir()) == []


def test_evaluate_of_an_unknown_style_is_refused(random_checkpoint, capsys):
    assert "no style 'Rococo'" in refused(
        capsys, main(["evaluate", str(random_checkpoint), "--target", "Rococo"])
    )


def test_audit_of_an_unknown_style_is_refused(random_checkpoint, capsys):
    assert "no style 'Rococo'" in refused(
        capsys, main(["audit", "classification", str(random_checkpoint), "--target", "Rococo"])
    )


class Classifier:
    """Sees the target gone in three of four pictures, and keeps what it was asked."""

    asked: dict = {}

    def check(self, names):
        self.asked["checked"] = list(names)

    def count(self, names, per_cell):
        return 2 * per_cell

    def evaluate(self, network, model, names, *, seed, per_cell, on_batch):
        self.asked |= {"names": list(names), "seed": seed, "per_cell": per_cell, "model": model}
        on_batch(2 * per_cell)
        shots = [Shot("a cat", "Lava", "cat", "target", i) for i in range(4)]
        return score(shots, [Verdict("Lava" if i == 0 else "Frost", "cat") for i in range(4)])


def test_audit_asks_for_what_the_history_says_and_prints_verdict_figures_and_intervals(
    unlearn, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("cul_core.audits.classification.classifier_of", lambda family: Classifier())
    monkeypatch.setattr(Classifier, "asked", {})
    assert unlearn("Lava", "--iterations", "1") == 0
    capsys.readouterr()
    path, json_path = tmp_path / "out.safetensors", tmp_path / "figures.json"
    given = ["audit", "classification", str(path), "--pictures", "3", "--seed", "7", "--json", str(json_path)]
    assert main(given) == 0
    out, asked = capsys.readouterr().out, Classifier.asked
    assert out.splitlines()[0] == "Of Lava: 75 % of it is gone." and "UA" in out and "75.0" in out
    assert (asked["checked"], asked["names"], asked["seed"], asked["per_cell"]) == ([], ["Lava"], 7, 3)
    assert [record.targets for record in asked["model"].history] == [("Lava",)]
    values = json.loads(json_path.read_text())
    assert values["verdict"] == out.splitlines()[0]
    ua = values["figures"]["ua"]
    assert ua["value"] == 75.0 and 0 <= ua["low"] < 75 < ua["high"] <= 100
    assert main([*given, "--target", "Frost", "Denim"]) == 0
    assert Classifier.asked["checked"] == Classifier.asked["names"] == ["Frost", "Denim"]


def test_every_audit_has_a_command_with_its_settings(capsys):
    for entry in AUDITS:
        with pytest.raises(SystemExit):
            main(["audit", entry.name, "--help"])
        out = capsys.readouterr().out
        for field in fields(entry.config):
            assert f"--{field.name.replace('_', '-')}" in out


def test_output_folder_that_is_a_file_is_noticed_before_training(unlearn, tmp_path, capsys):
    (tmp_path / "taken").write_text("keep me")
    assert "taken" in refused(capsys, unlearn("Lava", "--out", tmp_path / "taken" / "a.safetensors"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep me"]


def test_demo_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("keep me")
    assert "taken" in refused(capsys, main(["demo", "--requests", "1", "--out", str(tmp_path / "taken")]))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep me"]


def test_full_disk_is_one_error_and_leaves_nothing_behind(unlearn, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert unlearn("Lava") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 1
    assert (
        err.splitlines()[-1].startswith("error: 'out.safetensors' could not be written")
        and "No space left" in err
    )
    assert list(tmp_path.iterdir()) == []


def test_interrupted_step_is_one_line_and_writes_nothing(unlearn, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("cul_core.training.step.run_step", interrupted)
    assert unlearn("Lava") == 130
    assert capsys.readouterr().err.startswith("error: Cancelled") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["unlearn"],
        ["take-back"],
        ["merge"],
        ["evaluate"],
        ["audit"],
        ["audit", "classification"],
        ["benchmark"],
        ["store"],
        ["inspect"],
    ],
    ids=str,
)
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    out, err = capsys.readouterr()
    assert (
        ended.value.code == 0 and err == "" and out.startswith(f"usage: {' '.join(['cul_core', *command])}")
    )


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"{__version__}\n"
