"""SculpMem: its mask by hand and in real steps, alone and under a projection, and what its losses are made
of."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from cul_core.base.errors import ConfigError
from cul_core.concepts.concept import Concept
from cul_core.methods.conabl import ConAblConfig
from cul_core.methods.sculpmem import SculpMem, SculpMemConfig, exchanged, largest, turnover_at
from cul_core.minicanvas.family import MINI
from cul_core.models.families.sd1 import SD1
from cul_core.models.sampling import SamplerConfig, generator_for
from cul_core.parts.part import Teachers
from cul_core.parts.prompt_vectors import target_vector
from cul_core.parts.step_context import StepContext
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.projection import GradientProjection, ProjectionConfig
from cul_core.requests.presets import preset
from cul_core.training.callbacks import Callbacks
from cul_core.training.constraints import Constraints
from cul_core.training.step import run_step

AUTHORS = {
    "loss": "sm",
    "teacher": "student",
    "block_first_token": False,
    "form": "reference",
    "preservation": 1.0,
    "distillation": 1.0,
}
"""The authors' own method, with the term that their code overwrites."""


@pytest.fixture
def step(random_model, networks, anchors):
    def run(request, model=random_model, **options):
        return run_step(model, request, store=anchors, networks=networks["random"], **options)

    return run


@pytest.fixture
def watched(step, monkeypatch):
    """Runs a step and returns, for every update, (weights before it, masks it acts under, the optimizer's
    memory then)."""

    def run(request, **options):
        seen, original = [], SculpMem.after_backward

        def after_backward(self, iteration, weights, optimizer):
            goes_on = original(self, iteration, weights, optimizer)
            moments = {
                name: {key: value.clone() for key, value in optimizer.state[weight].items()}
                for name, weight in weights.items()
            }
            seen.append(
                (
                    {name: weight.detach().clone() for name, weight in weights.items()},
                    dict(self._masks),
                    moments,
                )
            )
            return goes_on

        with monkeypatch.context() as patch:
            patch.setattr(SculpMem, "after_backward", after_backward)
            edited, report = step(request, **options)
        return seen, edited, report

    return run


@pytest.fixture
def prepared(random_network):
    """A method that is ready for `loss`, and the weights that it starts from; arguments are its settings."""

    def prepare(
        concepts=("Lava",), previous=(), prompts=("a star", "a house"), iterations=100, start=None, **settings
    ):
        if start is None:
            readers = random_network.weights("text_readers")
            start = {name: weight.data for name, weight in readers.items()}
        latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
        method = SculpMem(SculpMemConfig(**settings))
        context = StepContext(
            random_network,
            tuple(map(Concept, concepts)),
            (),
            tuple(map(Concept, previous)),
            prompts,
            latents,
            {},
            start,
            TrainingConfig(batch_size=2, iterations=iterations),
            partial(generator_for, 5),
            anchor_sampler=SamplerConfig(steps=2),
        )
        method.prepare(context)
        method.prepare_mask(context, lambda name: None)
        return method, start

    return prepare


# --- the mask by hand


def test_turnover_falls_along_a_cosine():
    assert turnover_at(0.2, 0, 20) == 0.2
    assert turnover_at(0.2, 10, 20) == pytest.approx(0.1, rel=1e-12)
    assert turnover_at(0.2, 20, 20) == pytest.approx(0.0, abs=1e-12)


def test_an_exchange_drops_the_least_of_the_active_and_takes_the_most_of_the_others():
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).bool()
    scores = torch.tensor([9.0, -1.0, 5.0, 2.0, -7.0, 0.5, -8.0, 3.0, 0.0, 4.0])
    # floor(0.4 x 5) = 2: of the active 1 and 2 go, of the others 8 and 4 come
    assert exchanged(mask, scores, 0.4).int().tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 0, 1]
    assert exchanged(mask, scores, 0.0).int().tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 0, 0]  # at least one
    # of equal ones the first win
    assert exchanged(~mask, torch.zeros(10), 0.4).int().tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 0, 0]
    full = torch.ones(10).bool()
    assert torch.equal(exchanged(full, scores, 0.4), full)


@pytest.mark.parametrize("share", [0.2, 0.1, 0.033])
def test_an_exchange_changes_exactly_two_bits_for_every_entry_it_replaces(share):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 30, 41, generator=generator)
    mask = largest(first, 600)
    after = exchanged(mask, second, share)
    assert mask.sum() == after.sum() == 600
    assert (mask != after).sum() == 2 * math.floor(round(share * 600, 6))


@pytest.mark.parametrize(("importance", "chosen"), [("signed", 1), ("abs", 0), ("fisher", 2)])
def test_importance_by_hand_and_anew_after_every_exchange(prepared, importance, chosen):
    # gradients (3, -3), (3, 2.6), (5, 0), (0, 0) at two iterations: signed 0, 5.6, 5, 0; abs 6, 5.6, 5, 0;
    # fisher 18, 15.8, 25, 0
    method, _ = prepared(
        start={"w": torch.zeros(2, 2)}, warm_up=2, interval=3, active_fraction=0.25, importance=importance
    )
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([weight])
    for iteration, gradient in enumerate(([[3.0, 3.0], [5.0, 0.0]], [[-3.0, 2.6], [0.0, 0.0]]), 1):
        weight.grad = torch.tensor(gradient)
        assert not method.after_backward(iteration, {"w": weight}, optimizer)  # frozen
    assert method.mask("w", weight).flatten().nonzero().tolist() == [[chosen]]
    weight.grad = torch.tensor([[0.0, 0.0], [0.0, 0.1]])
    assert method.after_backward(3, {"w": weight}, optimizer)
    # the exchange is by what came since, which is the third gradient alone
    method.after_backward(4, {"w": weight}, optimizer)
    assert method.mask("w", weight).flatten().nonzero().tolist() == [[3]]


# --- the mask in real steps


def test_what_is_not_active_keeps_its_bits_under_momentum_and_weight_decay(watched, make_request):
    method = SculpMemConfig(warm_up=2, interval=2)
    request = make_request(method=method, iterations=10, batch_size=4, weight_decay=0.01)
    seen, edited, _ = watched(request)
    for number, (before, masks, moments) in enumerate(seen[:-1], 1):
        after = seen[number][0]
        if number <= 2:
            assert all(torch.equal(after[name], before[name]) for name in before)
            continue
        for name, mask in masks.items():
            assert mask.sum() == mask.numel() // 2
            moved = after[name] != before[name]
            assert not moved[~mask].any() and moved[mask].float().mean() > 0.9
            if number > 3:
                assert (
                    not moments[name]["exp_avg"][~mask].any() and not moments[name]["exp_avg_sq"][~mask].any()
                )
    assert len(edited.edits) == 14


def test_masks_move_at_every_interval_until_four_fifths_by_exactly_the_share_of_their_epoch(
    watched, make_request
):
    seen, _, _ = watched(
        make_request(method=SculpMemConfig(warm_up=1, interval=1), iterations=12, batch_size=4)
    )
    # 8 anchors by 4 make an epoch of 2 iterations; E = 6, and epoch < 4.8 holds up to iteration 10
    for done in range(2, 12):
        share = 0.1 * (1 + math.cos(math.pi * ((done - 1) // 2) / 6)) if done <= 10 else 0.0
        for name, mask in seen[done][1].items():
            assert (mask != seen[done - 1][1][name]).sum() == 2 * math.floor(share * (mask.numel() // 2))


def test_in_the_form_of_the_reference_momentum_moves_what_has_left_the_mask(watched, make_request):
    method = SculpMemConfig(warm_up=1, interval=1, form="reference")
    seen, _, _ = watched(make_request(method=method, iterations=4))
    (before, masks, _), (after, _, _) = seen[2:]  # of the third iteration, and what is left of it
    assert any((after[name] != before[name])[~mask].any() for name, mask in masks.items())


def test_biases_are_not_masked_and_every_matrix_has_its_own_share(watched, random_network, make_request):
    method = SculpMemConfig(warm_up=1, active_fraction=0.3)
    seen, edited, _ = watched(make_request(method=method, group="attn2", iterations=2))
    parameters = random_network.weights("all")
    masks = seen[-1][1]
    assert set(masks) == {name for name in edited.edits if parameters[name].ndim > 1} and len(masks) == 7 * 4
    assert all(mask.sum() == math.floor(round(0.3 * mask.numel(), 6)) for mask in masks.values())
    assert all(
        (delta != 0).float().mean() > 0.9 for name, delta in edited.edits.items() if name.endswith("bias")
    )


def test_the_papers_warm_up_is_concept_ablation_but_for_its_last_iteration(step, watched, make_request):
    ablated = step(make_request(method=ConAblConfig(**ConAblConfig.REFERENCE), iterations=3))[1].losses
    method = SculpMemConfig(warm_up=3, interval=2, **SculpMemConfig.REFERENCE)
    seen, _, report = watched(make_request(method=method, iterations=5))
    assert report.losses[:3] == ablated
    weights = [before for before, _, _ in seen]
    assert all(
        torch.equal(weights[2][name], weights[3][name])
        and not torch.equal(weights[1][name], weights[2][name])
        for name in weights[0]
    )


def test_a_warm_up_that_leaves_nothing_to_train_is_refused(step, random_model, make_request):
    with pytest.raises(
        ConfigError,
        match="warm-up of 50 iterations leaves none of 40 to train with a mask; shorten it, to about 2",
    ):
        step(make_request(method=SculpMemConfig(), iterations=40))
    assert (
        step(make_request(method=SculpMemConfig(), iterations=0))[0].content_hash == random_model.content_hash
    )


# --- together with a projection


@pytest.mark.parametrize("decoys", [0, 30], ids=["plain", "damped"])
def test_mask_and_projection_hold_exactly_together(
    watched, random_network, make_request, monkeypatch, decoys
):
    projections, original = [], GradientProjection.prepare
    monkeypatch.setattr(
        GradientProjection,
        "prepare",
        lambda self, context: projections.append(self) or original(self, context),
    )
    request = make_request(
        method=SculpMemConfig(warm_up=1, interval=2),
        regularizers=[ProjectionConfig(decoys=decoys, damping=1e-3)],
        iterations=8,
        batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.01,
        max_grad_norm=0.0,
    )
    seen, edited, _ = watched(request)
    constraints = Constraints(projections[:1], "cpu")
    basis = constraints.allowed_subspace(min(seen[-1][1])).double()
    kept = torch.stack([target_vector(random_network, Concept(name)) for name in ("Navy_Stripes", "Lava")])
    moves = 0
    for number in range(1, 7):
        (before, masks, _), (after, later, _) = seen[number : number + 2]
        for name, mask in masks.items():
            assert mask.shape[1] == 190 and mask.sum() == mask.numel() // 2
            moves += not torch.equal(mask, later[name])
            change = after[name].double() - before[name].double()
            coordinates = change @ basis
            rounding = 4 * 2**-24 * (before[name].double().norm(dim=1).max() + change.norm())
            assert coordinates[~mask].abs().max() < rounding < coordinates[mask].abs().mean()
            assert (coordinates @ basis.T - change).abs().max() < rounding
    assert moves == 3 * 14  # after 2, 4 and 6 iterations
    parameters = random_network.weights("all")
    for name, delta in edited.edits.items():
        assert (delta.double() @ kept.T).norm() < 1e-5 * (parameters[name].double() @ kept.T).norm()


def test_under_a_projection_momentum_forgets_the_directions_that_leave_the_mask(
    watched, monkeypatch, make_request
):
    projections, original = [], GradientProjection.prepare
    monkeypatch.setattr(
        GradientProjection,
        "prepare",
        lambda self, context: projections.append(self) or original(self, context),
    )
    request = make_request(
        method=SculpMemConfig(warm_up=1, interval=3),
        regularizers=[ProjectionConfig()],
        iterations=4,
        batch_size=4,
    )
    seen, _, _ = watched(request)
    basis = Constraints(projections[:1], "cpu").allowed_subspace(min(seen[-1][1]))
    for name, mask in seen[3][1].items():
        left = seen[2][1][name] & ~mask
        stays, memory = seen[2][1][name] & mask, seen[3][2][name]["exp_avg"] @ basis
        assert left.any() and memory[left].abs().max() < 1e-4 * memory[stays].abs().max()


# --- the losses


def same(noisy, timesteps, embeddings):
    """A teacher that says what it is given."""
    return noisy


def gradients_and_terms(network, method, weights, start):
    """Gradients of the loss by the group's weights, and its terms, with the student at `weights` and the
    teacher at `start`."""
    parameters = [weight for name, weight in network.weights("all").items() if name in weights]
    predict = network.predict

    def teacher(*inputs):
        with torch.no_grad(), network.with_weights(start):
            return predict(*inputs)

    with network.with_weights(weights):
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            loss = method.loss(predict, Teachers(teacher, teacher), torch.Generator().manual_seed(3))
            return torch.autograd.grad(loss.total, parameters), loss.terms
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)


@pytest.mark.parametrize("previous", [(), ("Denim", "Frost")])
@pytest.mark.parametrize("loss", ["conabl", "sm"])
def test_distillation_is_nothing_at_the_start_and_pulls_back_from_anywhere_else(
    random_network, prepared, loss, previous
):
    settings = {"loss": loss, "previous": previous, "warm_up_form": "train"}
    once, start = prepared(distillation=1.0, **settings)
    twice, _ = prepared(distillation=2.0, **settings)
    away = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator_for(1, name))
        for name, weight in start.items()
    }
    for weights, at_start in ((start, True), (away, False)):
        (ones, parts), (twos, double) = (
            gradients_and_terms(random_network, method, weights, start) for method in (once, twice)
        )
        pull = [two - one for one, two in zip(ones, twos, strict=True)]  # the gradient of the term alone
        assert (parts["distill"] == 0) == at_start and double["distill"] == pytest.approx(
            2 * parts["distill"]
        )
        assert all(bool(part.any()) != at_start for part in pull)
        assert parts["unlearn"] == double["unlearn"] > 0


def test_distillation_by_hand_over_anchor_prompts_and_those_of_earlier_targets(random_network, prepared):
    seen, started = [], []

    def student(noisy, timesteps, embeddings):
        seen.append((noisy, embeddings))
        return 3 * noisy

    def start(noisy, timesteps, embeddings):
        started.append((noisy, embeddings))
        return noisy

    def pretrained(noisy, timesteps, embeddings):
        raise AssertionError("the pretrained model was asked")

    teachers = Teachers(pretrained, start)

    alone, _ = prepared(distillation=0.5)
    parts = alone.loss(student, teachers, torch.Generator().manual_seed(1)).terms
    (noisy, embeddings), (again, asked) = started[0], seen[-1]
    assert torch.equal(noisy, again) and torch.equal(embeddings.text, asked.text) and len(noisy) == 2
    assert parts["distill"] == pytest.approx(0.5 * (2 * noisy).square().mean().item())
    own = random_network.encode(["a star", "a house"]).text
    assert all(any(torch.equal(row, prompt) for prompt in own) for row in embeddings.text)
    started.clear()
    chained, _ = prepared(distillation=0.5, previous=["Red_Ink"])
    parts = chained.loss(student, teachers, torch.Generator().manual_seed(1)).terms
    noisy, embeddings = started[0]
    assert len(noisy) == 4 and torch.equal(noisy[:2], noisy[2:])
    assert torch.equal(
        embeddings.text[2:], random_network.encode(["An image in the style of Red Ink"] * 2).text
    )
    # the mean over the anchors' prompts plus the mean over the earlier targets'
    assert parts["distill"] == pytest.approx(2 * 0.5 * (2 * noisy).square().mean().item())


def test_the_authors_loss_is_taken_at_one_picture_of_the_target_for_every_anchor_prompt(prepared):
    method, _ = prepared(concepts=("Lava", "Frost"), loss="sm")
    assert [picture for pairs in method._pairs for picture, _ in pairs] == [0, 1, 2, 3] and len(
        method._pool.latents
    ) == 4
    said = [method._prompts[rows[0]] for pairs in method._pairs for _, rows in pairs]
    assert said == [
        "In Lava Style, a star",
        "a house, in Lava Style.",
        "In Frost Style, a star",
        "a house, in Frost Style.",
    ]
    assert [method._prompts[row] for row in method._anchor_rows] == ["a star", "a house", "a star", "a house"]
    again, _ = prepared(previous=["Denim"], loss="sm", replay=0.5)
    said = [again._prompts[rows[0]] for pairs in again._earlier for _, rows in pairs]
    assert said == ["In Denim Style, a star", "a house, in Denim Style."] and len(again._pool.latents) == 4
    pictures, _ = again._draw(torch.Generator().manual_seed(0))
    assert pictures[0] < 2 <= pictures[1]  # one of the target's own, one of the earlier target's


def test_the_authors_loss_learns_the_target_in_a_frozen_warm_up_and_forgets_it_afterwards(
    random_network, prepared
):
    method, _ = prepared(prompts=("a star",), warm_up=1, loss="sm")
    asked = []

    def student(noisy, timesteps, embeddings):
        asked.append((noisy, embeddings, timesteps))
        return 3 * noisy

    learning = method.loss(student, Teachers(student, student), torch.Generator().manual_seed(2))
    noisy, embeddings, timesteps = asked[0]
    assert torch.equal(embeddings.text, random_network.encode(["In Lava Style, a star"] * 2).text)
    # z_t = signal z_0 + sigma eps, of the only picture z_0; the student says 3 z_t, and eps would be right
    signal, sigma = method._process.coefficients(timesteps)
    noise = (noisy - signal * method._pool.latents) / sigma
    assert learning.terms == {"learn": pytest.approx((3 * noisy - noise).square().mean().item(), rel=1e-4)}
    method._seen = 1
    forgetting = method.loss(student, Teachers(same, same), torch.Generator().manual_seed(2))
    assert torch.equal(asked[1][0], noisy) and torch.equal(asked[1][1].text, embeddings.text)
    # summed over four channels
    assert forgetting.terms == {"unlearn": pytest.approx(4 * (2 * noisy).square().mean().item())}


def test_the_authors_own_settings_run_as_a_whole(watched, step, make_request):
    first, _ = step(make_request("Denim", iterations=1))
    seen, said = [], []
    request = replace(
        make_request(method=SculpMemConfig(**AUTHORS, warm_up=2, interval=2), group="attn2", iterations=5),
        anchor_sampler=SamplerConfig(steps=2),
    )
    callbacks = Callbacks(on_progress=lambda progress: said.append(set(progress.terms)))
    seen, edited, _ = watched(request, model=first, callbacks=callbacks)
    assert said == [{"learn"}] * 2 + [{"unlearn", "preserve", "distill"}] * 3
    weights = [before for before, _, _ in seen]
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert len(edited.edits) == 35


def test_pictures_of_the_target_are_taken_as_they_are():
    with pytest.raises(
        ConfigError,
        match="Loss 'sm' takes images of the target as they are; set augmentations to 0 and flip to False",
    ):
        SculpMemConfig(loss="sm", flip=True)


def test_presets_are_the_papers_and_keep_its_shares_on_minicanvas():
    method, ours = (preset(name).for_family(SD1).method for name in ("sculpmem", "sculpmem_ours"))
    assert (method.loss, method.teacher, method.warm_up_form, method.form) == (
        "conabl",
        "student",
        "train",
        "reference",
    )
    assert (method.warm_up, method.interval, method.active_fraction, method.turnover) == (50, 100, 0.5, 0.2)
    assert method.importance == "signed"
    assert (method.preservation, method.distillation, method.block_first_token) == (0.0, 0.0, True)
    for name in ("sculpmem", "sculpmem_ours"):
        small = preset(name).for_family(MINI)
        assert (small.training.iterations, small.method.warm_up, small.method.interval) == (
            60,
            60 // 20,
            60 // 10,
        )
    assert (ours.warm_up, ours.interval) == (50, 100) and ours.distillation == preset(
        "sculpmem_ours"
    ).method.distillation > 0
    assert (ours.warm_up_form, ours.teacher, ours.form) == ("freeze", "pretrained", "update")
