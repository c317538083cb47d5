"""L1-SP and L2-SP on numbers worked out by hand, and over a chain."""

from types import SimpleNamespace

import pytest
import torch

from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.weight_anchor import L1SP, L2SP, L1SPConfig, L2SPConfig
from cul_core.training.step import run_step

W0 = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.5, -1.0]])}  # N = 4
START = {"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([[0.5, -2.0]])}


def prepared(cls, config):
    regularizer = cls(config)
    regularizer.prepare(SimpleNamespace(start=START, pretrained=W0))
    return regularizer


@pytest.mark.parametrize(
    ("cls", "config", "expected"),
    # differences from W0: 0.5, 0, 0, -1 -> mean |d| = 1.5/4, mean d^2 = 1.25/4, each times the strength 8
    [
        (L1SP, L1SPConfig(8, "pretrained", "penalty"), 3.0),
        (L2SP, L2SPConfig(8, "pretrained", "penalty"), 2.5),
        (L1SP, L1SPConfig(8, "start", "penalty"), 0.0),
        (L2SP, L2SPConfig(8, "both", "penalty"), 2.5),
    ],
)
def test_penalty_is_the_mean_over_all_elements_from_the_chosen_anchor(cls, config, expected):
    assert prepared(cls, config).penalty(START).item() == pytest.approx(expected)


def test_l2_gradient_is_twice_the_difference_over_n_and_l1_is_flat_at_its_anchor():
    weights = {name: w.clone().requires_grad_() for name, w in START.items()}
    prepared(L2SP, L2SPConfig(1, "pretrained", "penalty")).penalty(weights).backward()
    assert weights["b"].grad.tolist() == [[0.0, 2 * -1.0 / 4]]
    weights = {name: w.clone().requires_grad_() for name, w in W0.items()}
    prepared(L1SP, L1SPConfig(1, "pretrained", "penalty")).penalty(weights).backward()
    assert weights["a"].grad.abs().max() == 0


def test_proximal_l1_sets_small_changes_exactly_to_the_anchor_and_shortens_the_others():
    # threshold = lr 0.5 x 0.8 / 4 = 0.1
    regularizer = prepared(L1SP, L1SPConfig(strength=0.8, anchor="pretrained"))
    moved = regularizer.proximal("a", torch.tensor([1.05, 2.5]), 0.5)
    assert moved[0] == W0["a"][0] and moved[1] == pytest.approx(2.4)


def test_proximal_l2_divides_the_change_by_one_plus_twice_the_threshold():
    # threshold = 0.5 x 4 / 4 = 1/2
    regularizer = prepared(L2SP, L2SPConfig(strength=4, anchor="pretrained"))
    assert regularizer.proximal("a", torch.tensor([3.0, 2.0]), 0.5).tolist() == [2.0, 2.0]


def lowest(objective, low, high):
    """Elementwise minimiser of a convex function of one value, by ternary search."""
    for _ in range(200):
        third = (high - low) / 3
        is_right = objective(low + third) > objective(high - third)
        low, high = torch.where(is_right, low + third, low), torch.where(is_right, high, high - third)
    return (low + high) / 2


@pytest.mark.parametrize("anchor", ["start", "pretrained", "both"])
@pytest.mark.parametrize(("cls", "kind"), [(L1SP, L1SPConfig), (L2SP, L2SPConfig)])
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_the_proximal_step_minimises_the_penalty_beside_half_the_squared_distance(
    cls, kind, anchor, strength
):
    """prox_{lr R}(v) = argmin_w lr R(w) + |w - v|^2 / 2, R the mean of |d| or d^2, summed over the
    anchors."""
    generator = torch.Generator().manual_seed(0)
    start, pretrained, moved = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    context = SimpleNamespace(start={"w": start}, pretrained={"w": pretrained})
    regularizer = cls(kind(200 * strength, anchor))
    regularizer.prepare(context)
    element = {L1SP: torch.abs, L2SP: torch.square}[cls]
    references = {"start": [start], "pretrained": [pretrained], "both": [start, pretrained]}[anchor]

    def objective(w):
        return (
            0.5 * strength * sum(element(w - reference) for reference in references)
            + (w - moved).square() / 2
        )

    expected = lowest(objective, torch.full_like(moved, -9.0), torch.full_like(moved, 9.0))
    torch.testing.assert_close(regularizer.proximal("w", moved, 0.5), expected, atol=1e-6, rtol=0)


def test_proximal_form_adds_no_penalty_and_penalty_form_moves_no_weight():
    assert prepared(L2SP, L2SPConfig(form="proximal")).penalty(START) is None
    assert prepared(L2SP, L2SPConfig(form="penalty")).proximal("a", START["a"], 1.0) is START["a"]


def drift_after(steps, anchor, model, networks, anchors, make_request):
    config = L2SPConfig(strength=3e8, anchor=anchor)
    for k, target in enumerate(("Lava", "Aurora", "Denim", "Arcade")[:steps]):
        request = make_request(target, regularizers=[config], iterations=4, learning_rate=1e-3, seed=k)
        model, _ = run_step(model, request, store=anchors, networks=networks)
    return sum(delta.square().sum() for delta in model.edits.values()).sqrt().item()


def test_the_pretrained_anchor_bounds_a_chains_drift_and_the_start_anchor_does_not(
    random_model, networks, anchors, make_request
):
    arguments = (random_model, networks["random"], anchors, make_request)
    growth = {
        anchor: drift_after(4, anchor, *arguments) / drift_after(1, anchor, *arguments)
        for anchor in ("pretrained", "start")
    }
    assert growth["start"] > 1.5 * growth["pretrained"]


def test_every_regularizer_is_registered_with_what_users_need():
    for entry in REGULARIZERS:
        assert entry.display_name and entry.description.endswith(".") and "arXiv" in entry.paper
