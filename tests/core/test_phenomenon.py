"""The paper's phenomenon on the shipped model: plain sequential requests ruin it, the recommended preset does
not."""

import pytest

from cul_core.minicanvas import demo
from cul_core.minicanvas.family import MINI
from cul_core.minicanvas.judge import Judge, evaluate
from cul_core.minicanvas.suites import STYLE_SUITE
from cul_core.minicanvas.world import REQUEST_ORDERS
from cul_core.output.checkpoint import open_model
from cul_core.requests.resolve import Overrides, resolve
from cul_core.training.step import run_step

TARGETS = REQUEST_ORDERS["a"][:4]


def retention(model, shipped_network):
    scores = evaluate(shipped_network, model, Judge(), TARGETS, seed=4242, across=STYLE_SUITE.across[::5])
    return scores, (scores.ira_declared + scores.ira_hidden) / 2


@pytest.fixture(scope="module")
def after_four(shipped_model, networks, anchors):
    models = {}
    for name in ("plain", "recommended"):
        model = shipped_model
        for k, target in enumerate(TARGETS):
            request = resolve(
                name, MINI, STYLE_SUITE.concepts([target]), STYLE_SUITE.keep(), Overrides(seed=500 + k)
            )
            model, _ = run_step(model, request, store=anchors, networks=networks["shipped"])
        models[name] = model
    return models


def test_four_plain_requests_cost_over_twenty_points_of_retention_and_recommended_ones_less_than_half_of_that(
    after_four, shipped_model, shipped_network
):
    _, untouched = retention(shipped_model, shipped_network)
    plain_scores, plain = retention(after_four["plain"], shipped_network)
    scores, recommended = retention(after_four["recommended"], shipped_network)
    assert plain_scores.ua > 80 and scores.ua > 80
    assert untouched - plain > 20
    assert untouched - recommended < (untouched - plain) / 2


class SmallPlan(demo.Plan):
    """Measures with one object."""

    objects = ("cat",)


def test_the_demo_reports_every_request_and_leaves_pictures_and_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "Plan", SmallPlan)
    shares = []
    result = demo.run_demo(
        tmp_path, requests=1, seed=3, on_progress=lambda share, left: shares.append((share, left))
    )
    keys = {"ua", "clean", "leak", "ira_declared", "ira_hidden", "cra", "cra_clean", "h"}
    assert set(result["base"]) == keys
    for run in ("plain", "recommended"):
        assert set(result["runs"][run]["after"]) == {"1"} and set(result["runs"][run]["after"]["1"]) == keys
        assert result["runs"][run]["seconds_per_request"] > 0
    assert shares[-1] == (1.0, 0.0) and [share for share, _ in shares] == sorted(share for share, _ in shares)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "before-after.png",
        "chart.png",
        "minicanvas-forgot-1.safetensors",
    ]
    assert open_model(result["files"]["checkpoint"]).forgotten[0]["target"] == TARGETS[0]
