"""Early stopping: when it stops, which weights it keeps, and that nothing changes where it is off."""

import json
from dataclasses import replace

import pytest
import torch

from cul_core.audits.classifier_scores import Verdict
from cul_core.base.config import stable_hash
from cul_core.base.errors import Cancelled, ConceptError, ConfigError, TrainingError
from cul_core.concepts.concept import Concept
from cul_core.minicanvas.judge import measure_for
from cul_core.minicanvas.world import OBJECTS, styles_in
from cul_core.parts.training_config import TrainingConfig
from cul_core.requests.presets import preset
from cul_core.requests.request import Request
from cul_core.training.callbacks import Callbacks
from cul_core.training.early_stopping import EarlyStopping
from cul_core.training.step import run_step


@pytest.fixture
def step(random_model, networks, anchors):
    def run(request, **options):
        return run_step(random_model, request, store=anchors, networks=networks["random"], **options)

    return run


def scripted(*measured):
    """A measurement that gives these one after the other."""
    values = iter(measured)
    return lambda network, check: next(values)


def stopped(measured, iterations=4000, **settings):
    """Figures after training that is measured so; the only weight is the iteration's number."""
    settings = {"evaluate_every": 100, "patience": 1000} | settings
    stopping = EarlyStopping(TrainingConfig(iterations=iterations, **settings), scripted(*measured))
    for iteration in range(1, iterations + 1):
        if stopping.is_time(iteration, None, {"w": torch.tensor([float(iteration)])}, lambda: None):
            break
    assert stopping.weights["w"].item() == stopping.figures["best_iteration"]
    return stopping.figures


# --- when to stop, and what is best


def test_training_stops_when_the_target_is_gone():
    assert stopped([(50.0, 90.0), (80.0, 80.0), (80.0, 80.0), (99.0, 70.0)]) == {
        "best_iteration": 400,
        "best_ua": 99.0,
        "best_ra": 70.0,
        "last_iteration": 400,
    }


def test_training_stops_when_nothing_more_was_forgotten_for_so_many_iterations():
    figures = stopped([(50.0, 90.0)] + 30 * [(49.0, 95.0)])
    assert (figures["best_iteration"], figures["last_iteration"]) == (100, 100 + 1000)
    # the count begins anew with each new best: 200 + 300
    figures = stopped([(50.0, 90.0), (60.0, 90.0)] + 9 * [(60.0, 90.0)], patience=300)
    assert (figures["best_iteration"], figures["last_iteration"]) == (200, 500)


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        # below the threshold the highest UA, whatever is left
        ([(40.0, 99.0), (60.0, 10.0), (50.0, 99.0)], 200),
        # of equal ones the highest RA, of these the first
        ([(60.0, 50.0), (60.0, 70.0), (60.0, 70.0)], 200),
        ([(60.0, 50.0), (20.0, 70.0), (99.5, 0.0)], 300),
    ],
)
def test_the_best_has_forgotten_most_and_then_kept_most(measured, best):
    assert stopped(measured, iterations=300)["best_iteration"] == best


def test_the_last_update_is_measured_though_it_is_not_due():
    figures = stopped([(10.0, 90.0), (20.0, 90.0), (30.0, 90.0)], iterations=250)
    assert figures["best_iteration"] == figures["last_iteration"] == 250


@pytest.mark.parametrize("measured", [None, (float("nan"), 50.0)])
def test_what_was_not_measured_is_an_error(measured):
    with pytest.raises(
        TrainingError, match=r"after iteration 100 of 4000 gave .*(None|nan).* set evaluate_every to 0"
    ):
        stopped([measured])


# --- in a step


def test_the_best_weights_are_the_result_bit_for_bit(step, random_network, make_request):
    seen, values = [], iter([(10.0, 90.0), (60.0, 90.0), (30.0, 90.0)])

    def measure(network, check):
        check()
        seen.append({name: weight.data.clone() for name, weight in network.weights("all").items()})
        return next(values)

    edited, report = step(make_request(evaluate_every=1), measure=measure)
    pretrained = random_network.weights("all")
    for name, delta in edited.edits.items():
        assert torch.equal(delta, seen[1][name] - pretrained[name])
        assert not torch.equal(seen[1][name], seen[2][name])
    assert (
        report.figures == {"best_iteration": 2, "best_ua": 60.0, "best_ra": 90.0, "last_iteration": 3}
        and len(report.losses) == 3
    )


def test_a_step_ends_where_it_stops_and_a_last_preview_is_shown(step, make_request):
    shown = []
    watch = Callbacks(
        on_preview=lambda iteration, latents: shown.append(iteration),
        preview_prompts=("a cat",),
        preview_every=5,
    )
    _, report = step(
        make_request(iterations=9, evaluate_every=2),
        measure=scripted((0.0, 1.0), (99.0, 1.0)),
        callbacks=watch,
    )
    assert len(report.losses) == report.figures["last_iteration"] == 4 and shown == [0, 4]


def test_measuring_changes_no_bit_of_the_training(step, make_request):
    better = ((float(ua), 50.0) for ua in range(9))
    plain, _ = step(make_request())
    assert (
        step(make_request(evaluate_every=1), measure=scripted(*better))[0].content_hash == plain.content_hash
    )
    assert step(make_request(), measure=None)[1].figures == {}


def test_a_request_that_asks_for_it_without_a_measurement_is_refused_before_anything_is_loaded(
    random_model, make_request
):
    with pytest.raises(
        ConfigError,
        match=r"measured every 5 updates \(evaluate_every\), but there is nothing .* set it to "
        r"0",
    ):
        run_step(random_model, make_request(evaluate_every=5), networks="not asked")


def test_cancelling_does_not_wait_for_a_measurement(step, make_request):
    asked = []

    def measure(network, check):
        for _ in range(100):
            check()
        return 50.0, 50.0

    callbacks = Callbacks(should_stop=lambda: asked.append(1) or len(asked) > 20)
    with pytest.raises(Cancelled, match="iteration 1 of 3; the input model is unchanged"):
        step(make_request(evaluate_every=1), measure=measure, callbacks=callbacks)
    assert len(asked) == 21


# --- requests of before


BEFORE = {
    "iterations": 60,
    "batch_size": 8,
    "learning_rate": 4e-4,
    "schedule": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "group": "kv",
    "seed": 0,
}
"""JSON of the default training settings as it was before early stopping was there."""


def test_requests_without_early_stopping_keep_their_json_and_hash(make_request):
    assert TrainingConfig().to_json() == BEFORE and TrainingConfig.from_json(BEFORE) == TrainingConfig()
    request = make_request()
    assert (
        stable_hash(request.to_json() | {"training": BEFORE | {"iterations": 3, "batch_size": 2}})
        == request.hash
    )


def test_requests_with_it_come_back_from_json(make_request):
    request = make_request(evaluate_every=5, patience=7, stop_at_ua=90.0)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    hashes = {
        replace(request, training=replace(request.training, **change)).hash
        for change in ({}, {"evaluate_every": 6}, {"patience": 8}, {"stop_at_ua": 91.0})
    }
    assert len(hashes) == 4


# --- on MiniCanvas


def asked_for(monkeypatch, request, gone):
    """(what is measured, the shots of each call) where every picture shows what it is asked for, except for
    targets that are gone."""
    calls = []
    monkeypatch.setattr(
        "cul_core.minicanvas.judge._draw", lambda network, shots, *rest: calls.append(shots) or shots
    )

    def judge(shots):
        return [Verdict("plain" if gone(shot) else shot.style, shot.object) for shot in shots]

    return measure_for(request, judge)(None, lambda: None), calls


def test_few_pictures_are_enough_while_the_target_shows(make_request, monkeypatch):
    request = make_request(retain=("Navy Stripes", "Candy_Stripes", "Van_Gogh", "Denim"))
    measured, (few,) = asked_for(
        monkeypatch, request, lambda shot: shot.style == "Candy_Stripes" and shot.object != "cat"
    )
    assert measured == (90.0, 100.0) and len(few) == 20
    targets, kept = few[:10], few[10:]
    assert {shot.object for shot in targets} == {shot.object for shot in kept} == set(OBJECTS)
    assert {shot.style for shot in targets} == {"Candy_Stripes"} and {shot.style for shot in kept} == {
        "Navy_Stripes",
        "Denim",
    }


def test_all_pictures_are_asked_for_once_when_few_say_that_it_is_gone(make_request, monkeypatch):
    def gone(shot):
        return shot.style == "Candy_Stripes" or (shot.style, shot.object) == ("Denim", "star")

    measured, calls = asked_for(monkeypatch, make_request(retain=("Navy_Stripes", "Denim")), gone)
    assert measured == (100.0, 95.0)  # one of twenty kept pictures lost its style
    assert [len(shots) for shots in calls] == [20, 10] and len({*calls[0], *calls[1]}) == 30


def test_without_a_keep_list_the_suites_own_is_measured(make_request, monkeypatch):
    _, (few,) = asked_for(monkeypatch, make_request(retain=()), lambda shot: False)
    assert len({shot.style for shot in few[10:]}) == 10 and {shot.style for shot in few[10:]} <= set(
        styles_in("declared")
    )


def test_objects_are_measured_as_objects(make_request, monkeypatch):
    request = replace(
        make_request(),
        concepts=(Concept("cat", "object", "flower"),),
        retain=(Concept("house", "object"), Concept("Denim")),
    )
    measured, (few,) = asked_for(monkeypatch, request, lambda shot: False)
    assert (
        measured == (0.0, 100.0)
        and {shot.object for shot in few[:10]} == {"cat"}
        and {shot.object for shot in few[10:]} == {"house"}
    )
    assert len({shot.style for shot in few[:10]}) == 10


def test_a_target_that_nobody_can_measure_is_refused(make_request):
    mixed = (Concept("Lava"), Concept("cat", "object", "star"))
    with pytest.raises(
        ConceptError, match=r"Of 'Lava', 'cat', only \['Lava'\] can be measured.*or set evaluate_every to 0"
    ):
        measure_for(replace(make_request(), concepts=mixed), judge=len)


def test_minicanvas_stops_early_with_the_style_gone(shipped_model, networks, anchors):
    settings = {
        "iterations": 200,
        "learning_rate": 6e-4,
        "evaluate_every": 20,
        "anchor_count": 16,
        "batch_size": 4,
    }
    chosen = preset("plain_ours").with_settings(settings)
    request = chosen.request(
        [Concept("Neon_Cyan")],
        retain=[Concept("Neon_Pink")],
        anchor_prompts=["A cat image.", "a boat"],
        seed=1,
    )
    _, report = run_step(
        shipped_model, request, store=anchors, networks=networks["shipped"], measure=measure_for(request)
    )
    figures = report.figures
    assert figures["best_iteration"] == figures["last_iteration"] == len(report.losses) < 200
    assert figures["best_ua"] >= 99 and figures["best_ra"] >= 50
