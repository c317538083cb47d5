"""Merging: the algorithms by hand on a few numbers, and merged models through files, history and the command
line."""

import json
import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from mini_checkpoint import write_random_checkpoint

from cul_core.base.errors import ConfigError, ModelError, TrainingError
from cul_core.base.topk import count_of_fraction, top_k
from cul_core.cli import main
from cul_core.history.step_record import StepRecord, read_history
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.mergers import MERGERS
from cul_core.mergers.merge import merge
from cul_core.mergers.task_arithmetic import TaskArithmeticConfig
from cul_core.mergers.ties import TiesConfig, elect_signs
from cul_core.mergers.uniform import UniformConfig
from cul_core.output.checkpoint import open_model, save_checkpoint
from cul_core.output.report import history_text, merge_text
from cul_core.parts.training_config import TrainingConfig
from cul_core.store.steps import StepStore
from cul_core.training.step import run_step

WHOLE = TiesConfig(strength=1.0, keep_fraction=1.0)
EXAMPLE = ([4, -1, 0.5, 2], [-3, 2, 0.1, 2.5], [1, -2, -0.2, -6])


def merged(deltas, config):
    return dict(MERGERS.of(config).cls(config).merge(deltas))


def merged_values(rows, config):
    return merged([{"w": torch.tensor(row, dtype=torch.float32)} for row in rows], config)["w"].tolist()


def random_deltas(count, shapes=None, seed=0, scale=1e-3):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"b": (31, 7), "a": (64,), "c": (5, 4, 3, 3)}
    return [
        {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- the algorithms


@pytest.mark.parametrize("trim", ["tensor", "global"])
def test_ties_of_the_worked_example(trim):
    """Half of four kept: [4,.,.,2], [-3,.,.,2.5], [.,-2,.,-6]; sums 1, -2, 0, -1.5 elect +, -, -, - (the
    majority is -)."""
    config = TiesConfig(strength=1.25, keep_fraction=0.5, trim=trim)
    assert merged_values(EXAMPLE, config) == [5.0, -2.5, 0.0, -7.5]


def test_ties_as_the_reference_keeps_one_entry_more():
    """Three kept: [4,-1,.,2], [-3,2,.,2.5], [1,-2,.,-6]; sums 2, -1, 0, -1.5; means of 4 and 1, of -1 and -2,
    of -6."""
    config = TiesConfig(strength=1.0, keep_fraction=0.5, **TiesConfig.REFERENCE)
    assert merged_values(EXAMPLE, config) == [2.5, -1.5, 0.0, -6.0]


@pytest.mark.parametrize(
    ("function", "expected"), [("mean", [3.0, -2.0]), ("sum", [6.0, -2.0]), ("max", [5.0, -2.0])]
)
def test_what_agrees_in_sign_is_averaged_added_or_the_largest_taken(function, expected):
    """Sums are 5 and -1: elected + and -, with which 1 and 5, and -2, agree. Entries that are 0 do not
    count."""
    rows = ([1, -2], [5, 0], [-1, 1])
    assert merged_values(rows, replace(WHOLE, function=function)) == expected
    doubled = [2 * value for value in expected]
    # a strength does not force the mean
    assert merged_values(rows, replace(WHOLE, function=function, strength=2.0)) == doubled


def test_a_sign_that_cancels_is_the_majoritys_and_none_if_that_cancels_too():
    assert elect_signs(torch.tensor([3.0, 0.0, 2.0, -1.0])).tolist() == [1, 1, 1, -1]
    assert elect_signs(torch.tensor([-3.0, 0.0, 2.0, -1.0])).tolist() == [-1, -1, 1, -1]
    assert elect_signs(torch.tensor([-3.0, 0.0, 2.0])).tolist() == [-1, 0, 1]
    assert merged_values(([1, 5, 0], [-1, 0, -5]), WHOLE) == [0.0, 5.0, -5.0]
    assert merged_values(([1, 5, 0], [-1, 0, 5]), WHOLE) == [1.0, 5.0, 5.0]


def test_the_majority_is_of_one_tensor_or_of_all_as_trimming_is():
    """In "a" the first entry cancels and the other is -; over both tensors + prevails."""
    one = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    two = {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    assert merged([one, two], replace(WHOLE, trim="tensor"))["a"].tolist() == [-1.0, -2.0]
    assert merged([one, two], replace(WHOLE, trim="global"))["a"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "config", [WHOLE, replace(WHOLE, trim="global"), TaskArithmeticConfig(), UniformConfig()], ids=repr
)
def test_one_model_merged_is_itself(config):
    (delta,) = random_deltas(1)
    assert_same(merged([delta], config), dict(sorted(delta.items())))


@pytest.mark.parametrize("copies", [2, 3, 7])
@pytest.mark.parametrize(
    "config",
    [WHOLE, replace(WHOLE, trim="global", keep_fraction=0.3), TiesConfig(), UniformConfig()],
    ids=repr,
)
def test_copies_of_a_model_merge_to_what_one_of_them_does(config, copies):
    (delta,) = random_deltas(1)
    assert_same(merged([delta] * copies, config), merged([delta], config))


@pytest.mark.parametrize(
    "config",
    [WHOLE, replace(WHOLE, trim="global"), replace(WHOLE, function="sum"), TaskArithmeticConfig()],
    ids=repr,
)
def test_models_that_changed_different_weights_merge_to_all_of_their_changes(config):
    one, two = random_deltas(2)
    for name in one:
        even = torch.arange(one[name].numel()).view(one[name].shape) % 2 == 0
        one[name], two[name] = one[name] * even, two[name] * ~even
    two["d"] = torch.tensor([0.5, -0.25])
    assert_same(
        merged([one, two], config), {**{name: one[name] + two[name] for name in sorted(one)}, "d": two["d"]}
    )


@pytest.mark.parametrize(
    "config",
    [
        TiesConfig(),
        TiesConfig(trim="global", keep_fraction=0.37),
        TiesConfig(function="max"),
        TaskArithmeticConfig(),
        UniformConfig(),
    ],
    ids=repr,
)
def test_the_order_of_the_models_does_not_matter(config):
    deltas = random_deltas(3)
    del deltas[1]["a"]
    expected = merged(deltas, config)
    for order in permutations(deltas):
        assert_same(merged(order, config), expected)


def test_nothing_merged_is_a_plain_zero_whatever_sign_the_majority_has():
    (value,) = merged([{"w": torch.tensor([0.0, -1.0, -1.0])}], WHOLE).values()
    assert not value[0].signbit()


def test_negated_models_merge_to_the_negated_result():
    for trim in ("tensor", "global"):
        config, deltas = TiesConfig(trim=trim, keep_fraction=0.5), random_deltas(3)
        expected = {name: -value for name, value in merged(deltas, config).items()}
        assert_same(
            merged([{name: -value for name, value in delta.items()} for delta in deltas], config), expected
        )


def test_weights_scale_their_own_model_and_must_be_as_many():
    rows = ([1.0, 2.0], [3.0, -4.0])
    assert merged_values(rows, TaskArithmeticConfig(strength=2.0, weights=(0.5, 1.0))) == [7.0, -6.0]
    assert merged_values(rows, replace(WHOLE, weights=(3.0, 1.0))) == [3.0, 6.0]  # 3 and 3; 6 against -4
    with pytest.raises(ConfigError, match=r"3 weights for 2 model\(s\); give one per model"):
        merged_values(rows, TaskArithmeticConfig(weights=(1.0, 1.0, 1.0)))


def test_a_model_without_a_tensor_counts_as_unchanged_there():
    one, two = {"w": torch.tensor([2.0, 4.0])}, {}
    assert merged([one, two], UniformConfig())["w"].tolist() == [1.0, 2.0]
    assert merged([one, two], TaskArithmeticConfig())["w"].tolist() == [2.0, 4.0]
    assert merged([one, two], WHOLE)["w"].tolist() == [2.0, 4.0]
    for config in (UniformConfig(), TaskArithmeticConfig(), WHOLE, replace(WHOLE, trim="global")):
        assert merged([{}, {}], config) == {}


# --- trimming


def brute_force(tensors, count):
    """The kept entries by sorting everything at once, equal magnitudes by name, then in memory order."""
    names = sorted(tensors)
    flat = torch.cat([tensors[name].flatten().abs() for name in names])
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    parts = mask.split([tensors[name].numel() for name in names])
    return {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "same_bin", "zeros"])
def test_a_cut_keeps_what_sorting_everything_keeps(kind):
    (tensors,) = random_deltas(1, seed=3)
    change = {
        "normal": lambda x: x,
        "ties": lambda x: (2e3 * x).round(),
        "tiny": lambda x: x * 1e-38,  # with subnormal numbers
        "same_bin": lambda x: 1 + x * 1e-3,  # all in one bin of the first pass, but for the sign of x
        "zeros": lambda x: torch.where(x > 1e-3, x, 0),
    }[kind]
    tensors = {name: change(tensor) for name, tensor in tensors.items()}
    size = sum(tensor.numel() for tensor in tensors.values())
    for count in (0, 1, 2, 57, size // 2, size - 1, size, size + 5):
        cut, expected = top_k(tensors, count), brute_force(tensors, count)
        found = {name: cut.mask(name, tensor) for name, tensor in tensors.items()}
        assert all(torch.equal(found[name], expected[name]) for name in tensors), count
        assert sum(int(mask.sum()) for mask in found.values()) == min(count, size)


@pytest.mark.parametrize(
    ("fraction", "size", "kept"),
    [(0.5, 5, 2), (0.29, 100, 29), (0.1, 30, 3), (0.7, 10, 7), (1.0, 9, 9), (0.0, 9, 0)],
)
def test_the_kept_fraction_is_counted_exactly(fraction, size, kept):
    assert count_of_fraction(fraction, size) == kept
    (delta,) = random_deltas(1, {"w": (size,)})
    result = merged([delta], replace(WHOLE, keep_fraction=fraction))["w"]
    assert int((result != 0).sum()) == kept
    assert torch.equal(result[result != 0], delta["w"][result != 0])


def test_global_trimming_keeps_the_share_of_all_values_and_tensor_trimming_that_of_each():
    (delta,) = random_deltas(1)
    delta["a"] = delta["a"].sign()
    sizes = {name: tensor.numel() for name, tensor in delta.items()}
    kept = {
        trim: {
            name: int((value != 0).sum())
            for name, value in merged([delta], replace(WHOLE, keep_fraction=0.2, trim=trim)).items()
        }
        for trim in ("tensor", "global")
    }
    assert kept["tensor"] == {name: math.floor(size / 5) for name, size in sizes.items()}
    assert sum(kept["global"].values()) == math.floor(sum(sizes.values()) / 5)
    assert kept["global"]["a"] == 64  # the largest values are all there
    expected = brute_force(delta, math.floor(sum(sizes.values()) / 5))
    result = merged([delta], replace(WHOLE, keep_fraction=0.2, trim="global"))
    assert_same(result, {name: delta[name] * expected[name] for name in sorted(delta)})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"keep_fraction": 1.5}, "keep_fraction is 1.5; give a number between 0.0 and 1.0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": -1.0}, "strength is -1.0"),
        ({"trim": "layer"}, "trim is 'layer'; choose one of tensor, global"),
        ({"function": "median"}, "choose one of mean, sum, max"),
        ({"weights": (1.0, float("inf"))}, "weight is inf; give a number between"),
        ({"weights": ("a",)}, "weight is 'a'"),
    ],
)
def test_settings_that_cannot_work_are_refused_where_they_are_made(values, said):
    with pytest.raises(ConfigError, match=said):
        TiesConfig(**values)


def test_every_way_of_merging_says_what_it_is_and_travels_as_json():
    assert [entry.name for entry in MERGERS] == ["task_arithmetic", "ties", "uniform"]
    for entry in MERGERS:
        assert len(entry.description) > 30 and "arXiv" in entry.paper and entry.display_name
        config = entry.config() if entry.name == "uniform" else entry.config(weights=(1.0, 0.5))
        assert entry.config.from_json(json.loads(json.dumps(config.to_json()))) == config


# --- models


@pytest.fixture(scope="module")
def train(random_model, networks, anchors):
    """One step of two iterations from the random model, or from another one."""

    def run(target, model=random_model, **settings):
        from cul_core.concepts.concept import Concept
        from cul_core.methods.conabl import ConAblConfig
        from cul_core.requests.request import Request

        training = TrainingConfig(**({"iterations": 2, "batch_size": 2} | settings))
        request = Request(
            (Concept(target),),
            ConAblConfig(),
            training=training,
            anchor_count=8,
            anchor_prompts=("A star image.", "a house"),
        )
        return run_step(model, request, store=anchors, networks=networks["random"])[0]

    return run


@pytest.fixture(scope="module")
def two(train):
    return train("Lava"), train("Frost")


@pytest.mark.parametrize(
    "config", [UniformConfig(), TaskArithmeticConfig(), WHOLE, replace(WHOLE, trim="global")], ids=repr
)
def test_a_trained_model_merged_alone_or_with_itself_is_the_same_model(two, config):
    assert merge([two[0]], config).content_hash == two[0].content_hash
    if config != TaskArithmeticConfig():
        assert merge([two[0], two[0]], config).content_hash == two[0].content_hash


@pytest.mark.parametrize("entry", list(MERGERS), ids=lambda entry: entry.name)
def test_merging_leaves_its_inputs_as_they_were_and_forgets_what_each_has(two, random_model, entry):
    before = [model.content_hash for model in two]
    result = merge(two, entry.config())
    digest = UnlearnModel(result.source, result.family, result.edits).content_hash
    assert [UnlearnModel(model.source, model.family, model.edits).content_hash for model in two] == before
    assert [concept["target"] for concept in result.forgotten] == ["Lava", "Frost"] and result.requests == 2
    record = result.history[-1]
    assert (
        result.history[:-1] == (*two[0].history, *two[1].history) and record.is_merge and record.targets == ()
    )
    assert record.parent == random_model.content_hash and record.result == result.content_hash == digest
    assert (
        record.request["models"] == record.request["last_steps"] == before
        and record.request["merge"]["name"] == entry.name
    )
    assert record.drift.keys() == result.edits.keys() and result.edits.keys() == two[0].edits.keys()
    assert "forgotten: Lava, Frost" in merge_text(result) and entry.name in merge_text(result)


def test_steps_that_models_share_are_told_once(train, two, random_model):
    branches = [train("Dusk_Dots", two[0]), train("Neon_Cyan", two[0])]
    result = merge(branches, TiesConfig())
    assert [record.targets for record in result.history] == [("Lava",), ("Dusk_Dots",), ("Neon_Cyan",), ()]
    assert [record.parent for record in result.history][1:3] == [two[0].content_hash] * 2
    again = merge([result, two[1]], UniformConfig())
    assert [record.is_merge for record in again.history] == [False, False, False, True, False, True]
    assert len(merge([two[0], two[0]], UniformConfig()).history) == 2


def test_long_histories_are_joined_without_comparing_every_record_with_every_other(two, monkeypatch):
    compared = []

    def equal(one, other):
        compared.append(1)
        return vars(one) == vars(other)

    monkeypatch.setattr(StepRecord, "__eq__", equal)
    record = two[0].history[0]
    records = tuple(replace(record, seconds=float(number)) for number in range(1000))
    first = replace(two[0], history=records[:700])
    second = replace(two[0], history=records[500:])
    history = merge([first, second], UniformConfig()).history
    assert [record.seconds for record in history[:-1]] == list(range(1000))
    assert len(compared) <= 1000


def test_records_that_differ_in_anything_are_all_told(two):
    record = two[0].history[0]
    values = {"losses": {"x": 0.5}, "drift": {"w": [1.0, 2.0]}, "seconds": 9.0, "versions": {"torch": "9"}}
    records = (record, *(replace(record, **{name: value}) for name, value in values.items()))
    history = merge([replace(two[0], history=records + records)], UniformConfig()).history
    assert history[:-1] == records


def test_a_merged_model_is_forgotten_further_kept_and_found_again(
    two, train, make_request, networks, anchors, tmp_path
):
    result = merge(two, TiesConfig())
    request = make_request("Dusk_Dots", iterations=2)
    edited, report = run_step(result, request, store=anchors, networks=networks["random"])
    assert [concept["target"] for concept in edited.forgotten] == ["Lava", "Frost", "Dusk_Dots"]
    assert edited.history[-1].parent == result.content_hash
    StepStore(tmp_path).put(result, request, edited, report)
    # a merge made again has another time, and the same key
    found, _ = StepStore(tmp_path).get(merge(two, TiesConfig()), request)
    assert found.content_hash == edited.content_hash
    assert StepStore(tmp_path).get(merge(two, UniformConfig()), request) is None


def test_models_without_an_edit_merge_to_the_pretrained_one(random_model):
    for config in (UniformConfig(), TaskArithmeticConfig(), TiesConfig(), TiesConfig(trim="global")):
        result = merge([random_model, random_model], config)
        assert result.content_hash == random_model.content_hash and result.forgotten == ()


def test_what_cannot_be_merged_is_refused(two, random_model, shipped_model):
    with pytest.raises(ModelError, match=r"no model to merge; give at least one"):
        merge([], UniformConfig())
    with pytest.raises(
        ModelError,
        match=r"different files, 'random.safetensors' and 'minicanvas.safetensors'; make all of them from",
    ):
        merge([two[0], shipped_model], UniformConfig())
    with pytest.raises(ConfigError, match="There is no way of merging"):
        merge(two, TrainingConfig())
    name = next(iter(two[0].edits))
    broken = UnlearnModel(
        random_model.source, random_model.family, {name: torch.full_like(two[0].edits[name], float("nan"))}
    )
    with pytest.raises(TrainingError, match="not finite; leave that model out"):
        merge([two[0], broken], TiesConfig())
    huge = UnlearnModel(
        random_model.source, random_model.family, {name: torch.full_like(two[0].edits[name], 3e38)}
    )
    with pytest.raises(TrainingError, match="not finite; lower the strength"):
        merge([huge, huge], TaskArithmeticConfig())


def test_merging_can_be_watched_and_cancelled(two):
    seen = []
    merge(two, UniformConfig(), on_tensor=lambda done, count: seen.append((done, count)))
    assert seen == [(number, len(two[0].edits)) for number in range(1, len(two[0].edits) + 1)]

    def stop(done, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(two, UniformConfig(), on_tensor=stop)


def test_a_saved_merge_opens_and_explains_itself(two, random_checkpoint, tmp_path):
    result = merge(two, TiesConfig(keep_fraction=0.5, weights=(1.0, 0.0)))
    path = save_checkpoint(result, tmp_path / "merged.safetensors")
    history, source = read_history(path)
    assert history == result.history
    text = history_text(path.name, history, source)
    for said in (
        "3 step(s)",
        "merge of ",
        "keep fraction 0.5",
        "weights [1.0, 0.0]",
        two[1].content_hash[:12],
    ):
        assert said in text
    back = open_model(path, random_checkpoint)
    assert back.history == history and back.edits.keys() <= result.edits.keys()
    rounding = max((back.edits[name] - result.edits[name]).abs().max().item() for name in back.edits)
    assert rounding < 1e-3  # the file holds fp16


# --- the command line


@pytest.fixture(scope="module")
def files(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    return [str(save_checkpoint(model, folder / f"{number}.safetensors")) for number, model in enumerate(two)]


def test_the_command_writes_a_checkpoint_that_inspect_explains(files, random_checkpoint, tmp_path, capsys):
    out, figures = tmp_path / "merged.safetensors", tmp_path / "figures.json"
    command = [
        "merge",
        *files,
        "--pretrained",
        str(random_checkpoint),
        "--out",
        str(out),
        "--json",
        str(figures),
    ]
    settings = [
        "--strength",
        "1.5",
        "--keep-fraction",
        "0.6",
        "--trim",
        "global",
        "--function",
        "sum",
        "--weights",
        "1",
        "2",
    ]
    assert main([*command, "--how", "ties", *settings]) == 0
    said = capsys.readouterr().out
    assert f"checkpoint: {out}" in said and "forgotten: Lava, Frost" in said
    values = json.loads(figures.read_text())
    expected = {
        "name": "ties",
        "strength": 1.5,
        "weights": [1.0, 2.0],
        "keep_fraction": 0.6,
        "trim": "global",
        "function": "sum",
        "keep_one_more": False,
    }
    assert values["checkpoint"] == str(out) and values["merge"] == expected and len(values["models"]) == 2
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    lava, frost, merge_record = read_history(out)[0]
    assert (
        f"merge of {lava.result[:12]}, {frost.result[:12]}" in said
        and "trim global" in said
        and "Frost" in said
    )
    # though the files are rounded:
    assert merge_record.request["last_steps"] == [lava.result, frost.result]
    assert not set(merge_record.request["models"]) & {lava.result, frost.result}
    assert main(command) == 0
    assert f"checkpoint: {tmp_path / 'merged_2.safetensors'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--how", "average"], "There is no way of merging 'average'; choose one of"),
        (
            ["--how", "uniform", "--strength", "2"],
            "--strength is 2.0, which uniform does not use; leave it out",
        ),
        (
            ["--how", "task_arithmetic", "--keep-fraction", "0.5"],
            "--keep-fraction is 0.5, which task_arithmetic does not use",
        ),
        (["--keep-fraction", "20"], "keep_fraction is 20.0; give a number between"),
        (["--trim", "layer"], "trim is 'layer'"),
        (["--weights", "1"], "1 weights for 2 model(s)"),
    ],
)
def test_a_merge_that_cannot_work_is_one_line_and_writes_nothing(
    files, random_checkpoint, tmp_path, capsys, arguments, said
):
    command = [
        "merge",
        *files,
        "--pretrained",
        str(random_checkpoint),
        "--out",
        str(tmp_path / "merged.safetensors"),
    ]
    assert main([*command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_model_are_refused_by_name(files, random_checkpoint, tmp_path, capsys):
    foreign = write_random_checkpoint(tmp_path / "foreign.safetensors", seed=5)
    for pretrained, other, said in (
        (
            foreign,
            files[1],
            "'0.safetensors' was made from 'random.safetensors' and not from 'foreign.safetensors'; give "
            "the file",
        ),
        (
            random_checkpoint,
            foreign,
            "'foreign.safetensors' is no checkpoint that continual-unlearning has edited",
        ),
        (random_checkpoint, tmp_path / "missing.safetensors", "'missing.safetensors'"),
        (tmp_path / "missing.safetensors", files[1], "'missing.safetensors'"),
    ):
        assert (
            main(
                [
                    "merge",
                    files[0],
                    str(other),
                    "--pretrained",
                    str(pretrained),
                    "--out",
                    str(tmp_path / "merged.safetensors"),
                ]
            )
            == 2
        )
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == [foreign]
