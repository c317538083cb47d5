"""SelFT: scores and masks by hand, then in real steps, alone and in the coordinates that a projection
leaves."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from cul_core.base.errors import Cancelled, ConfigError, TrainingError
from cul_core.concepts.concept import Concept
from cul_core.methods.conabl import ConAblConfig
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.families.sd1 import SD1
from cul_core.parts.part import Part
from cul_core.parts.prompt_vectors import prompt_rows, target_vector
from cul_core.regularizers.projection import GradientProjection, ProjectionConfig
from cul_core.regularizers.selft import SelFT, SelFTConfig, importance_scores, scoring_texts, top_masks
from cul_core.requests.presets import preset
from cul_core.training.callbacks import Callbacks
from cul_core.training.constraints import Constraints
from cul_core.training.step import run_step

QUICK = SelFTConfig(states=4)


@pytest.fixture
def step(random_model, random_network, networks, anchors, make_request):
    # makes the anchors
    run_step(random_model, make_request(iterations=0), store=anchors, networks=networks["random"])
    networks["random"].last_result.clear()

    def run(request, model=random_model, **options):
        return run_step(model, request, store=anchors, networks=networks["random"], **options)

    return run


@pytest.fixture
def prepared(step, monkeypatch):
    """Runs a step and returns its regularizers of one class, as they were used."""

    def run(request, cls=SelFT, **options):
        seen, original = [], cls.prepare

        def prepare(self, context):
            seen.append(self)
            return original(self, context)

        with monkeypatch.context() as patch:
            patch.setattr(cls, "prepare", prepare)
            edited, report = step(request, **options)
        return seen, edited, report

    return run


@contextmanager
def unet_calls(network):
    """(latents, timestep, text rows) of every call of the UNet."""
    seen = []

    def note(module, inputs, kwargs):
        seen.append(
            (
                inputs[0][:1].clone(),
                int(inputs[1].flatten()[0]),
                len(kwargs["encoder_hidden_states"]),
                torch.is_grad_enabled(),
            )
        )

    handle = network.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def changed(model, name, since=None):
    return model.edits[name] - (since.edits[name] if since else 0)


# --- scores and masks by hand


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        # w = 2, -1, 3 and g = (1, -1), (2, 2), (0, 1) at two states
        ("abs", [4.0, 4.0, 3.0]),  # 2 x (1 + 1), 1 x (2 + 2), 3 x (0 + 1)
        ("signed", [0.0, 4.0, 3.0]),  # the first one's gradients cancel
        ("fisher", [8.0, 8.0, 9.0]),  # 4 x (1 + 1), 1 x (4 + 4), 9 x (0 + 1)
    ],
)
def test_scores_by_hand(importance, expected):
    weights = {"w": torch.tensor([2.0, -1.0, 3.0])}
    gradients = [[torch.tensor([1.0, 2.0, 0.0])], [torch.tensor([-1.0, 2.0, 1.0])]]
    assert importance_scores(weights, gradients, importance)["w"].tolist() == expected


def test_of_equal_scores_the_first_are_kept_whatever_tensor_they_are_in():
    scores = {"a": torch.tensor([[1.0, 2.0], [2.0, 0.0]]), "b": torch.tensor([2.0, 3.0, 2.0])}
    masks = top_masks(scores, 3)  # the 3, and of four 2s the first two
    assert masks["a"].tolist() == [[False, True], [True, False]] and masks["b"].tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 500, 1999, 2000])
def test_histogram_selects_what_sorting_would(count):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator).exp() ** 6  # over many orders of magnitude
    values[::5] = values[3]  # many ties
    values[1::7] = 0
    masks = top_masks({"a": values[:700].reshape(7, 100), "b": values[700:]}, count)
    chosen = torch.cat([masks["a"].flatten(), masks["b"]])
    expected = torch.zeros(2000, dtype=torch.bool)
    expected[values.sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(chosen, expected)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(TrainingError, match="importance of 'w' for the target is not finite"):
        top_masks({"w": torch.tensor([1.0, float("nan")])}, 1)


def test_texts_are_the_papers():
    assert scoring_texts(Concept("Van_Gogh")) == ("Van Gogh Style", "")
    assert scoring_texts(Concept("dog", "object", "red_horse")) == ("dog", "red horse")
    assert scoring_texts(Concept("Betty_White", "celebrity", "woman")) == ("Betty White", "woman")


@pytest.mark.parametrize(("name", "fraction"), [("selft", 0.05), ("projection_selft", 0.3)])
def test_presets_are_the_papers(name, fraction):
    first, *others = preset(name).for_family(SD1).regularizers
    assert first == SelFTConfig(fraction, importance="signed", trajectories="per_state", form="reference")
    assert others == (
        [ProjectionConfig(**ProjectionConfig.REFERENCE)] if name.startswith("projection") else []
    )


# --- scoring on a model


def test_two_calls_of_the_unet_a_state_and_one_trajectory(step, random_network, make_request):
    with unet_calls(random_network) as calls:
        step(make_request(regularizers=[SelFTConfig(states=6, seeds=2)], iterations=0))
    assert len(calls) == 2 * 2 * 6
    # DDIM: six steps of 1000 // 6
    assert [t for _, t, _, _ in calls[: 2 * 6 : 2]] == [830, 664, 498, 332, 166, 0]


def test_an_object_needs_its_anchors_prediction_too(step, random_network, make_request):
    request = replace(
        make_request(regularizers=[QUICK], iterations=0), concepts=(Concept("cat", "object", "star"),)
    )
    with unet_calls(random_network) as calls:
        step(request)
    # nothing and the anchor in one call, then the target
    assert [rows for _, _, rows, _ in calls] == 4 * [2, 1]


def test_visited_states_are_those_of_runs_from_the_start_bit_for_bit(step, random_network, make_request):
    with unet_calls(random_network) as calls:
        step(make_request(regularizers=[QUICK], iterations=0))
    states = [(latents, t) for latents, t, _, with_gradient in calls if with_gradient]
    noise, context = states[0][0], random_network.encode(["Candy Stripes Style", ""])
    for k, (reached, _) in enumerate(states):
        latents, solver = noise, DiscreteProcess().trajectory(4, "leading")
        for t in solver.times[:k]:
            with torch.no_grad():
                full, empty = (random_network.predict(latents, t, context[i]) for i in (0, 1))
            latents = solver.step(empty + 3.0 * (full - empty), t, latents)
        assert torch.equal(latents, reached)


def test_the_references_trajectories_start_every_state_from_new_noise(step, random_network, make_request):
    with unet_calls(random_network) as calls:
        step(make_request(regularizers=[replace(QUICK, trajectories="per_state")], iterations=0))
    assert len(calls) == 2 * 4 + (1 + 2 + 3)  # guided steps to the second, third and fourth state
    starts = [latents for latents, t, _, with_gradient in calls if t == 750 and not with_gradient]
    assert len(starts) == 4 and not torch.equal(starts[0], starts[1])


def test_scores_are_kept_until_anything_they_depend_on_changes(
    step, random_model, random_network, make_request
):
    def calls(request, model=random_model):
        with unet_calls(random_network) as seen:
            edited, _ = step(request, model=model)
        return len(seen), edited

    base = make_request(regularizers=[SelFTConfig(states=3)], iterations=1)
    trained = calls(make_request(iterations=1))[0]
    assert calls(base)[0] == trained + 6
    count, edited = calls(replace(base, regularizers=(SelFTConfig(states=3, kept_fraction=0.5),)))
    assert count == trained  # another tau
    for other in (
        replace(base, regularizers=(SelFTConfig(states=3, importance="fisher"),)),
        replace(base, concepts=(Concept("Neon_Cyan"),)),
        replace(base, training=replace(base.training, seed=1)),
        replace(base, training=replace(base.training, group="attn2")),
        replace(base, method=ConAblConfig(block_first_token=False)),
        replace(base, regularizers=(SelFTConfig(states=3), ProjectionConfig())),
    ):
        assert calls(other)[0] == trained + 6
        assert calls(other)[0] == trained
    assert calls(base)[0] == trained + 6  # only the last are kept
    assert calls(base, edited)[0] == trained + 6  # other weights


def test_scoring_can_be_cancelled_and_repeats_without_kept_scores(step, networks, make_request):
    request, kept = make_request(regularizers=[QUICK]), networks["random"].last_result
    kept.clear()
    asked = []
    with pytest.raises(Cancelled, match="before the first update; the input model is unchanged"):
        step(request, callbacks=Callbacks(should_stop=lambda: asked.append(0) or len(asked) > 2))
    assert kept._key is None and kept._value is None
    first, _ = step(request)
    kept.clear()
    assert step(request)[0].content_hash == first.content_hash


# --- training under a mask


@pytest.mark.parametrize("importance", ["abs", "signed", "fisher"])
def test_exactly_the_chosen_share_changes_under_weight_decay_and_the_rest_not_by_a_bit(
    prepared, random_network, make_request, importance
):
    request = make_request(
        regularizers=[replace(QUICK, importance=importance)], iterations=4, weight_decay=0.01
    )
    (selft,), edited, report = prepared(request)
    total = sum(mask.numel() for mask in selft._masks.values())
    assert (
        sum(int(mask.sum()) for mask in selft._masks.values())
        == report.figures["changeable_weights"]
        == math.floor(0.05 * total)
    )
    assert all(not delta[~selft._masks[name]].any() for name, delta in edited.edits.items())
    moved = sum(int((delta != 0).sum()) for delta in edited.edits.values())
    assert 0.9 * report.figures["changeable_weights"] < moved <= report.figures["changeable_weights"]
    assert report.figures["changeable_importance"] > 0.05


def test_all_weights_kept_is_training_without_a_mask(step, make_request):
    plain, _ = step(make_request())
    for form in ("update", "reference"):
        assert (
            step(make_request(regularizers=[replace(QUICK, kept_fraction=1.0, form=form)]))[0].content_hash
            == plain.content_hash
        )


def test_a_share_of_no_weight_is_refused(step, make_request):
    with pytest.raises(
        ConfigError, match=r"fraction of 1e-06 lets none of 270336 weights change; raise it to 4e-06"
    ):
        step(make_request(regularizers=[replace(QUICK, kept_fraction=1e-6)]))


def test_larger_groups_share_one_threshold(prepared, make_request):
    (selft,), edited, report = prepared(make_request(regularizers=[QUICK], group="attn2", iterations=1))
    shares = [mask.float().mean().item() for mask in selft._masks.values()]
    assert len(shares) == 35 and max(shares) > 2 * min(shares)
    assert report.figures["changeable_weights"] == math.floor(
        0.05 * sum(mask.numel() for mask in selft._masks.values())
    )


# --- together with a projection


def protected(random_network):
    return torch.stack([target_vector(random_network, Concept(name)) for name in ("Navy_Stripes", "Lava")])


def response(edited, network, since=None):
    """Largest relative change of what a matrix makes of the protected text."""
    parameters, rows = network.weights("all"), protected(network)
    return max(
        (
            (changed(edited, name, since).double() @ rows.T).norm()
            / (parameters[name].double() @ rows.T).norm()
        ).item()
        for name in edited.edits
    )


@pytest.mark.parametrize("decoys", [0, 30], ids=["plain", "damped"])
@pytest.mark.parametrize("selft_first", [True, False])
def test_masked_projected_change_is_sparse_in_the_complement_and_spares_what_is_protected(
    prepared, random_network, make_request, decoys, selft_first
):
    regularizers = [QUICK, ProjectionConfig(decoys=decoys, damping=1e-3)]
    request = make_request(
        regularizers=regularizers if selft_first else regularizers[::-1],
        iterations=8,
        weight_decay=0.01,
        learning_rate=1e-3,
    )
    (selft,), edited, report = prepared(request)
    (projection,), again, _ = prepared(request, GradientProjection)
    assert edited.content_hash == again.content_hash
    basis = Constraints([projection], "cpu").allowed_subspace(min(selft._masks)).double()
    assert basis.shape == (192, 190)
    nonzeros, total = 0, sum(mask.numel() for mask in selft._masks.values())
    assert total == 1408 * 190
    for name, delta in edited.edits.items():
        coordinates = delta.double() @ basis
        rounding = (
            8 * 2**-24 * (random_network.weights("all")[name].double().norm(dim=1).max() + delta.norm())
        )
        assert coordinates[~selft._masks[name]].abs().max() < rounding
        assert (coordinates @ basis.T - delta.double()).abs().max() < rounding
        nonzeros += int((coordinates.abs() > rounding).sum())
    assert report.figures["changeable_weights"] == math.floor(0.05 * total)
    assert 0.8 * report.figures["changeable_weights"] < nonzeros <= report.figures["changeable_weights"]
    assert response(edited, random_network) < 1e-5


def test_one_large_update_has_exactly_the_chosen_number_of_coordinates(
    prepared, random_network, make_request
):
    request = make_request(
        regularizers=[QUICK, ProjectionConfig()], iterations=1, learning_rate=0.1, max_grad_norm=0.0
    )
    (selft,), edited, report = prepared(request)
    (projection,), _, _ = prepared(request, GradientProjection)
    basis = Constraints([projection], "cpu").allowed_subspace(min(selft._masks)).double()
    counts = [int(((delta.double() @ basis).abs() > 1e-6).sum()) for delta in edited.edits.values()]
    assert (
        sum(counts)
        == report.figures["changeable_weights"]
        == math.floor(0.05 * sum(m.numel() for m in selft._masks.values()))
    )


def test_updates_with_the_same_mask_stay_in_the_same_span(prepared, random_network, make_request):
    (short,), *_ = prepared(make_request(regularizers=[QUICK, ProjectionConfig()], iterations=1))
    (long,), *_ = prepared(make_request(regularizers=[QUICK, ProjectionConfig()], iterations=3))
    assert all(torch.equal(short._masks[name], long._masks[name]) for name in short._masks)


def test_a_mask_never_raises_the_response_of_a_damped_change_to_the_damped_text(
    prepared, random_network, make_request, monkeypatch
):
    moments, original = [], GradientProjection._damped

    def damped(self, *inputs):
        moments.append(original(self, *inputs))
        return moments[-1]

    monkeypatch.setattr(GradientProjection, "_damped", damped)
    (projection,), *_ = prepared(
        make_request(regularizers=[ProjectionConfig(decoys=30)], iterations=0), GradientProjection
    )
    moment, generator = moments[0][0].float(), torch.Generator().manual_seed(0)
    value = next(name for name in random_network.weights("text_readers") if name.endswith("to_v.weight"))
    change = torch.randn(64, 192, generator=generator)

    def responses(mask=None):
        masking = Part(None)
        masking.mask = lambda name, weight: mask
        allowed = Constraints([projection, masking], "cpu").allowed(value, change)
        return ((allowed @ moment) * allowed).sum(1)

    for share in (0.05, 0.3, 0.9):
        assert (responses(torch.rand(64, 190, generator=generator) < share) <= responses() * (1 + 1e-4)).all()


def test_reference_hybrid_masks_gradients_then_projects_them_and_ends_dense(
    prepared, random_network, make_request
):
    reference = tuple(
        replace(config, states=4) if isinstance(config, SelFTConfig) else config
        for config in preset("projection_selft").regularizers
    )
    assert [config.form for config in reference] == ["reference", "reference"] and reference[
        0
    ].kept_fraction == 0.3
    (selft,), edited, report = prepared(make_request(regularizers=reference))
    chosen = report.figures["changeable_weights"]
    assert chosen == math.floor(0.3 * sum(mask.numel() for mask in selft._masks.values()))
    assert sum(int((delta != 0).sum()) for delta in edited.edits.values()) > 2 * chosen


def test_a_mask_respects_what_two_projections_protect(prepared, step, random_network, make_request):
    """Coordinates are those that both projections leave, whatever their order, and the mask holds there."""
    projections = [ProjectionConfig(), ProjectionConfig(rows="last")]
    request = make_request(
        regularizers=[QUICK, *projections], iterations=4, weight_decay=0.01, learning_rate=1e-3
    )
    (selft,), edited, report = prepared(request)
    used, again, _ = prepared(request, GradientProjection)
    assert len(used) == 2 and edited.content_hash == again.content_hash
    name = min(selft._masks)
    basis = Constraints(used, "cpu").allowed_subspace(name).double()
    ranks = [projection.report()["protected_rank"] for projection in used]
    # each reports what all protect together; "Lava" is one token, whose mean is its last
    assert ranks == [3, 3] and basis.shape == (192, 192 - 3)
    prompts = [Concept(kept).prompt for kept in ("Navy_Stripes", "Lava")]
    rows = torch.cat([protected(random_network), prompt_rows(random_network, prompts, "last")])
    moved = 0
    for name, delta in edited.edits.items():
        weight = random_network.weights("all")[name].double()
        coordinates, rounding = delta.double() @ basis, 8 * 2**-24 * (weight.norm(dim=1).max() + delta.norm())
        assert coordinates[~selft._masks[name]].abs().max() < rounding
        assert (coordinates @ basis.T - delta.double()).abs().max() < rounding
        assert (delta.double() @ rows.T).norm() < 1e-6 * (weight @ rows.T).norm()
        moved += int((coordinates.abs() > rounding).sum())
    assert 0.8 * report.figures["changeable_weights"] < moved <= report.figures["changeable_weights"]
