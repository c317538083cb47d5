"""Differences and LoRAs, applied as a host's LoRA loader does it, and the drift of layers."""

import pytest
import torch
from safetensors.torch import load_file

from cul_core.base.errors import ConfigError
from cul_core.concepts.concept import Concept
from cul_core.history.step_record import read_history
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods.exact import ExactConfig
from cul_core.output.drift import drift_map, drift_of, short_name, total_drift
from cul_core.output.lora import patch_names, row_space, save_difference, save_lora
from cul_core.requests.resolve import Overrides, resolve
from cul_core.training.step import run_step


@pytest.fixture(scope="module")
def edited(random_model, networks, anchors):
    from cul_core.methods.conabl import ConAblConfig
    from cul_core.parts.training_config import TrainingConfig
    from cul_core.requests.request import Request

    request = Request(
        (Concept("Lava"),),
        ConAblConfig(),
        training=TrainingConfig(iterations=3, batch_size=2),
        anchor_count=8,
        anchor_prompts=("A star image.", "a house"),
    )
    return run_step(random_model, request, store=anchors, networks=networks["random"])[0]


def applied(tensors, name):
    """What a host adds to its weight of that name at strength 1 (alpha / rank times up times down; or the
    difference)."""
    module = name.removesuffix(".weight")
    if f"{module}.diff" in tensors:
        return tensors[f"{module}.diff"]
    up, down = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"]
    return tensors[f"{module}.alpha"] / down.shape[0] * (up.flatten(1) @ down.flatten(1))


def test_a_difference_holds_every_edit_exactly_in_the_hosts_names(edited, tmp_path):
    path = save_difference(edited, tmp_path / "d.safetensors")
    tensors, names = load_file(path), patch_names(edited)
    assert len(tensors) == len(edited.edits) and all(
        name.startswith("diffusion_model.") for name in names.values()
    )
    assert all(torch.equal(applied(tensors, names[ours]), delta) for ours, delta in edited.edits.items())
    assert [record.targets for record in read_history(path)[0]] == [("Lava",)]
    assert save_difference(edited, tmp_path / "d.safetensors").name == "d_2.safetensors"


def test_a_lora_of_full_rank_is_the_edit_and_of_lower_rank_its_best_approximation(edited, tmp_path):
    whole, part = (save_lora(edited, tmp_path / "l.safetensors", rank) for rank in (1000, 4))
    assert whole.energy == pytest.approx(1, abs=1e-9) and whole.is_exact and not part.is_exact
    assert part.sentence == f"{100 * part.energy:.2f} % of the edit, rank 4, {part.size_bytes / 1e6:.1f} MB"
    full, low, share = whole.path, part.path, part.energy
    names, lost, total = patch_names(edited), 0.0, 0.0
    for ours, delta in edited.edits.items():
        assert torch.allclose(applied(load_file(full), names[ours]), delta, atol=1e-6)
        lost += (applied(load_file(low), names[ours]) - delta).square().sum().item()
        total += delta.square().sum().item()
    assert 0 < share < 1 and 1 - lost / total == pytest.approx(share, abs=1e-4)
    assert low.stat().st_size < 0.2 * full.stat().st_size


# --- edits of few directions


def exact_request(family, name):
    return resolve("exact", family, [Concept(name)], [Concept("Denim")], Overrides(ExactConfig(made_up=60)))


@pytest.fixture(scope="module")
def solved(shipped_model, networks):
    """Three requests of an exact chain."""
    model = shipped_model
    for name in ("Candy Stripes", "Lava", "Arcade"):
        model, _ = run_step(model, exact_request(model.family, name), networks=networks["shipped"])
    return model


def test_an_exact_edit_is_written_exactly_at_its_own_rank_whatever_rank_is_asked_for(
    solved, tmp_path, monkeypatch
):
    whole = count_decompositions(monkeypatch)
    saved = save_lora(solved, tmp_path / "l.safetensors", 1)
    tensors = load_file(saved.path)
    assert saved.is_exact and saved.sentence == f"exact, rank 9, {saved.size_bytes / 1e6:.1f} MB"
    assert saved.size_bytes == saved.path.stat().st_size
    for ours, name in patch_names(solved).items():
        delta = solved.edits[ours]
        assert (
            tensors[f"{name.removesuffix('.weight')}.lora_down.weight"].shape[0] == 9
        )  # three directions a style
        assert (applied(tensors, name) - delta).norm() <= 1e-6 * delta.norm()
    assert len(whole) == 1  # one matrix shows the directions of all


def test_an_edit_that_training_has_changed_afterwards_is_approximated(solved, networks, tmp_path, anchors):
    training = {"iterations": 1, "anchor_count": 8}
    request = resolve("plain", solved.family, [Concept("Frost")], [], Overrides(training=training))
    mixed, _ = run_step(solved, request, store=anchors, networks=networks["shipped"])
    saved = save_lora(mixed, tmp_path / "l.safetensors", 4)
    assert not saved.is_exact and saved.rank == 4


def few_directions(rank, outputs, width=64, seed=0):
    """Changes of matrices with these numbers of outputs, which share `rank` directions."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return [
        (torch.randn(out, rank, generator=generator, dtype=torch.float64) @ down).float() for out in outputs
    ]


def test_matrices_share_their_directions_and_one_with_fewer_outputs_is_written_whole(random_model, tmp_path):
    deltas = few_directions(7, (5, 90, 400))
    assert row_space(deltas, 256).shape == (64, 7)
    model = wide_model(random_model, {str(len(delta)): delta for delta in deltas})
    saved = save_lora(model, tmp_path / "l.safetensors", 2)
    assert saved.is_exact and saved.rank == 7
    tensors = load_file(saved.path)
    for delta in deltas:
        found = applied(tensors, f"diffusion_model.{len(delta)}.weight")
        assert (found - delta).norm() <= 1e-6 * delta.norm()


def test_directions_that_only_a_weak_change_has_are_kept_too(random_model):
    strong, weak = few_directions(3, (90,)), few_directions(2, (90,), seed=1)
    basis = row_space([*strong, *(1e-5 * delta for delta in weak)], 256)
    assert basis.shape == (64, 5)


@pytest.mark.parametrize(("rank", "is_small"), [(32, True), (33, False)])
def test_more_than_half_of_all_directions_are_not_few(rank, is_small):
    assert (row_space(few_directions(rank, (90, 90)), 256) is not None) == is_small


def test_more_directions_than_are_wanted_are_not_few():
    assert row_space(few_directions(9, (90, 90)), 8) is None
    assert row_space([*few_directions(5, (90,)), *few_directions(5, (90,), seed=1)], 8) is None


# --- approximations without a whole decomposition

ROWS, COLUMNS = 288, 640


def orthogonal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def spectra():
    """Name -> a large matrix with singular values that fall quickly, slowly, hardly or not at all."""
    generator = torch.Generator().manual_seed(0)
    left, right = orthogonal(ROWS, ROWS, generator), orthogonal(COLUMNS, ROWS, generator)
    number = torch.arange(1, ROWS + 1, dtype=torch.float64)
    values = {
        "exponential": torch.exp(-number / 20),
        "1/k": 1 / number,
        "1/sqrt(k)": number.rsqrt(),
        "flat": torch.ones_like(number),
        "rank 5": (number <= 5).double(),
    }
    matrices = {name: ((left * row) @ right.T).float() for name, row in values.items()}
    matrices["noise"] = torch.randn(ROWS, COLUMNS, generator=generator)
    return matrices


def wide_model(random_model, edits):
    """A model whose edits have any name and shape, as those of larger families have."""
    named = {f"model.diffusion_model.{name}.weight": delta for name, delta in edits.items()}
    return UnlearnModel(random_model.source, random_model.family, named)


def count_decompositions(monkeypatch):
    whole, decompose = [], torch.linalg.svd

    def svd(matrix, *arguments, **named):
        whole.append(tuple(matrix.shape))
        return decompose(matrix, *arguments, **named)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return whole


@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("spectrum", [name for name in spectra() if name != "rank 5"])
def test_a_large_matrix_keeps_as_much_energy_as_its_best_approximation(
    spectrum,
    rank,
    random_model,
    tmp_path,
    monkeypatch,
):
    delta = spectra()[spectrum]
    energies = torch.linalg.svdvals(delta.double()).square()
    best = (energies[:rank].sum() / energies.sum()).item()
    whole = count_decompositions(monkeypatch)
    model = wide_model(random_model, {"a": delta})
    saved = save_lora(model, tmp_path / "l.safetensors", rank)
    path, kept = saved.path, saved.energy
    assert best - 1e-3 < kept < best + 1e-9
    assert not any(shape == tuple(delta.shape) for shape in whole)
    residual = (applied(load_file(path), "diffusion_model.a.weight").double() - delta).square().sum()
    assert kept == pytest.approx(1 - (residual / delta.double().square().sum()).item(), abs=1e-6)


def test_a_rank_near_that_of_the_matrix_takes_the_whole_decomposition(random_model, tmp_path, monkeypatch):
    delta = spectra()["noise"]
    model = wide_model(random_model, {"a": delta})
    whole = count_decompositions(monkeypatch)
    assert save_lora(model, tmp_path / "l.safetensors", ROWS).energy == pytest.approx(1, abs=1e-9)
    kept = save_lora(model, tmp_path / "l.safetensors", ROWS - 1).energy
    energies = torch.linalg.svdvals(delta.double()).square()
    assert kept == pytest.approx((energies[:-1].sum() / energies.sum()).item(), abs=1e-6)
    assert whole.count((ROWS, COLUMNS)) == 2


def test_the_same_edit_makes_the_same_file_and_no_random_state_changes(random_model, tmp_path):
    edits = spectra()
    files = []
    for seed, order in ((1, edits), (2, dict(reversed(edits.items())))):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = wide_model(random_model, order)
        files.append(save_lora(model, tmp_path / "l.safetensors", 16).path.read_bytes())
        assert torch.equal(torch.get_rng_state(), before)
    assert files[0] == files[1]


def test_a_lora_can_be_watched_and_cancelled_and_leaves_nothing_behind(edited, tmp_path):
    seen = []
    count = len(edited.edits)
    path = tmp_path / "l.safetensors"
    save_lora(edited, path, 4, on_tensor=lambda *progress: seen.append(progress))
    assert seen == [(number, count) for number in range(1, count + 1)]
    path.unlink()

    def stop(done, count):
        if done == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_lora(edited, tmp_path / "l.safetensors", 4, on_tensor=stop)
    assert list(tmp_path.iterdir()) == []


def test_convolutions_and_biases_are_exported_too(random_model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    module = "diffusion_model.input_blocks.0.0"
    weight, bias = f"model.{module}.weight", f"model.{module}.bias"
    shapes = {weight: (64, 4, 3, 3), bias: (64,)}
    edits = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model = UnlearnModel(random_model.source, random_model.family, edits)
    lora = load_file(save_lora(model, tmp_path / "l.safetensors", 1000).path)
    exact = load_file(save_difference(model, tmp_path / "d.safetensors"))
    assert lora[f"{module}.lora_down.weight"].shape[1:] == (4, 3, 3) and lora[
        f"{module}.lora_up.weight"
    ].shape[2:] == (1, 1)
    assert torch.allclose(applied(lora, f"{module}.weight").reshape(64, 4, 3, 3), edits[weight], atol=1e-5)
    assert all(torch.equal(tensors[f"{module}.diff_b"], edits[bias]) for tensors in (lora, exact))


def test_nothing_to_write_and_an_impossible_rank_are_refused(random_model, edited, tmp_path):
    with pytest.raises(ConfigError, match="no edits to write; forget something"):
        save_difference(random_model, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match="rank is 0; give a number of at least 1"):
        save_lora(edited, tmp_path / "l.safetensors", 0)
    assert list(tmp_path.iterdir()) == []


def test_drift_is_measured_against_the_pretrained_tensor(random_model, random_network):
    parameters = random_network.weights("all")
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    model = UnlearnModel(random_model.source, random_model.family, {name: 0.25 * parameters[name].data})
    (drift,) = drift_of(model)
    assert drift.name == name and drift.percent == pytest.approx(25, rel=1e-4)
    assert total_drift([drift, drift]) == pytest.approx(2**0.5 * drift.distance)
    assert short_name(name) == "in 1.1.0 attn2.to_k"
    assert drift_map("Drift", [drift]).size[0] > 300 and drift_map("Drift of nothing", []).size[1] > 20
