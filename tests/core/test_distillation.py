"""Distillation: its prompts, its loss against both teachers, and what it does in real steps, alone and with
all the others."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from cul_core.base.errors import Cancelled
from cul_core.concepts.concept import Concept
from cul_core.history.unlearn_model import weights_of
from cul_core.methods.conabl import ConAblConfig
from cul_core.models.sampling import generator_for
from cul_core.parts.part import Teachers
from cul_core.parts.prompt_vectors import target_vector
from cul_core.parts.step_context import StepContext
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.distillation import Distillation, DistillationConfig, held_prompts
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.regularizers.weight_anchor import L1SPConfig, L2SPConfig
from cul_core.training.callbacks import Callbacks
from cul_core.training.step import run_step

QUICK = DistillationConfig(trajectories=2, trajectory_steps=3)


@pytest.fixture
def context_for(random_network):
    def make(
        target="Lava",
        kind="style",
        anchor="",
        *,
        retain=(),
        previous=(),
        captions=("a star", "a house"),
        iterations=0,
    ):
        return StepContext(
            random_network,
            (Concept(target, kind, anchor),),
            retain,
            previous,
            captions,
            torch.empty(0, 4, 8, 8),
            {},
            {},
            TrainingConfig(iterations=iterations),
            partial(generator_for, 5),
        )

    return make


@pytest.fixture
def step(random_model, networks, anchors, make_request):
    def run(request, model=random_model, **options):
        return run_step(model, request, store=anchors, networks=networks["random"], **options)

    return run


def predict_with(network, weights=None):
    """The UNet's prediction, under other weights if they are given."""

    def predict(latents, timesteps, embeddings):
        with network.with_weights(weights or {}):
            return network.predict(latents, timesteps, embeddings)

    return torch.no_grad()(predict)


@contextmanager
def trainable(network, names):
    everything = network.weights("all")
    parameters = [everything[name].requires_grad_() for name in names]
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


# --- prompts


def prompts_of(context, config=QUICK):
    return held_prompts(context, config, torch.Generator().manual_seed(0))


def test_prompts_take_turns_between_kept_concepts_anchor_prompts_and_the_users(context_for):
    retain = (Concept("Navy_Stripes"), Concept("Denim"))
    config = replace(QUICK, trajectories=9, prompts="a red barn; a cat in Lava style;\n two boats ")
    found = prompts_of(context_for(retain=retain), config)
    assert found["previous"] == [] and len(found["keep"]) == 9
    kept, neutral, own = (found["keep"][i::3] for i in range(3))
    assert all(("Navy Stripes" in prompt) != ("Denim" in prompt) for prompt in kept)
    assert len({"Denim" in prompt for prompt in kept[:2]}) == 2 and all(
        "star" in prompt or "house" in prompt for prompt in kept
    )
    assert neutral[0] == "" and set(neutral[1:]) == {"a star", "a house"}
    assert set(own) == {"a red barn", "two boats"}  # the one that names the target is left out


def test_as_many_prompts_as_pictures_are_ever_drawn(context_for):
    # two at the start, one more after each 25 updates
    assert len(prompts_of(context_for(iterations=60))["keep"]) == 2 + 2


def test_what_is_forgotten_is_never_kept_and_what_was_forgotten_is_held_apart(context_for):
    known = (Concept("Denim"), Concept("Lava"), Concept("Denim"))  # Lava is forgotten once more
    context = context_for(
        retain=(Concept("denim"), Concept("LAVA")),
        previous=known,
        captions=("a star", "a Denim star", "a lava house"),
    )
    found = prompts_of(context, replace(QUICK, trajectories=6))
    assert found["keep"] == ["", "a star"] * 3
    assert len(found["previous"]) == 6 and all(
        "Denim" in prompt and "star" in prompt for prompt in found["previous"]
    )


def test_an_object_takes_the_place_of_the_targets_anchor_and_the_anchor_itself_its_own_prompt(context_for):
    retain = (Concept("fish", "object"), Concept("star", "object"))
    found = prompts_of(context_for("cat", "object", "star", retain=retain), replace(QUICK, trajectories=24))[
        "keep"
    ][::2]
    # "a house" has no place for the fish
    assert set(found) == {"a fish", "An image of a fish", "An image of a star"}


# --- loss


@pytest.fixture
def prepared(context_for):
    def make(config=QUICK, **settings):
        distillation = Distillation(config)
        distillation.prepare(context_for(**settings))
        return distillation

    return make


def test_both_terms_are_zero_for_a_student_that_is_both_teachers(prepared, random_network):
    predict = predict_with(random_network)
    terms = prepared(previous=(Concept("Denim"),)).loss_terms(predict, Teachers(predict, predict))
    # the student sees both terms' states in one call, which may cost the last bits
    assert terms.keys() == {"keep", "previous"} and all(term < 1e-10 for term in terms.values())


def test_terms_by_hand(prepared):
    def constant(value):
        return lambda latents, timesteps, embeddings: torch.full_like(latents, value)

    config = replace(QUICK, keep_weight=2.0, previous_weight=3.0, batch_size=4)
    student, pretrained, start = constant(5.0), constant(4.0), constant(3.0)
    terms = prepared(config, previous=(Concept("Denim"),)).loss_terms(student, Teachers(pretrained, start))
    # 4 channels: 2 x 4 x (5 - 4)^2 and 3 x 4 x (5 - 3)^2
    assert {name: term.item() for name, term in terms.items()} == {"keep": 8.0, "previous": 48.0}


@pytest.mark.parametrize(
    ("weights", "names"),
    [({}, {"keep"}), ({"keep_weight": 0.0}, set())],
    ids=["nothing forgotten before", "and nothing kept"],
)
def test_a_term_without_weight_or_prompts_asks_no_teacher(prepared, weights, names):
    def teacher(latents, timesteps, embeddings):
        return torch.zeros_like(latents)

    def unasked(*inputs):
        raise AssertionError("a teacher was asked")

    teachers = Teachers(teacher if names else unasked, unasked)
    terms = prepared(replace(QUICK, **weights)).loss_terms(teacher, teachers)
    assert terms.keys() == names


def test_no_gradient_where_keys_and_values_of_the_prompts_are_unchanged(prepared, random_network):
    pretrained = {name: weight.data for name, weight in random_network.weights("text_readers").items()}
    teacher, generator, sizes = predict_with(random_network, pretrained), torch.Generator().manual_seed(3), []
    # all there is to keep, of 154 of 192 directions at most
    rows = random_network.encode(["", "a star"]).text.flatten(0, 1)
    right = torch.linalg.svd(rows.double(), full_matrices=False)[2].float()
    for protected in (torch.zeros_like(right), right):
        changes = {
            name: 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
            for name, weight in pretrained.items()
        }
        student = {
            name: weight + changes[name] - changes[name] @ protected.T @ protected
            for name, weight in pretrained.items()
        }
        distillation = prepared(captions=("a star",))
        with random_network.with_weights(student), trainable(random_network, pretrained) as parameters:
            term = distillation.loss_terms(random_network.predict, Teachers(teacher, teacher))["keep"]
            sizes.append(sum(gradient.norm().item() for gradient in torch.autograd.grad(term, parameters)))
    assert sizes[1] < 1e-4 * sizes[0]


# --- steps


def test_teachers_are_w0_and_the_start_take_no_gradient_and_leave_the_students_weights_bit_for_bit(
    step, random_model, random_network, make_request, monkeypatch
):
    first, _ = step(make_request("Denim", learning_rate=1e-2, iterations=1))
    weights = random_network.weights("all")
    pretrained = {name: weights[name].data.clone() for name in first.edits}
    known = {"pretrained": pretrained, "start": weights_of(first, pretrained)}
    original, calls = Distillation.loss_terms, []

    def watched(self, student, teachers):
        def around(name, teacher):
            def call(*inputs):
                before = {name: weights[name].data.clone() for name in first.edits}
                predicted = teacher(*inputs)
                assert all(torch.equal(weights[name].data, weight) for name, weight in before.items())
                assert not predicted.requires_grad and torch.equal(
                    predicted, predict_with(random_network, known[name])(*inputs)
                )
                calls.append(name)
                return predicted

            return call

        known_as = [around(name, teachers.called(name)) for name in ("pretrained", "start")]
        return original(self, student, Teachers(*known_as))

    monkeypatch.setattr(Distillation, "loss_terms", watched)
    _, report = step(make_request(regularizers=[QUICK], learning_rate=1e-2, iterations=2), model=first)
    # two pictures of three states each at the first update, and one call for each of two updates
    assert calls.count("pretrained") == calls.count("start") == 2 * 3 + 2
    assert report.record.losses.keys() == {"unlearn", "keep", "previous"} and all(
        report.record.losses.values()
    )
    assert report.losses[-1] == pytest.approx(sum(report.record.losses.values()))


def test_without_weights_it_changes_no_bit(step, make_request):
    nothing = replace(QUICK, keep_weight=0.0, previous_weight=0.0)
    assert step(make_request(regularizers=[nothing]))[0].content_hash == step(make_request())[0].content_hash


def test_all_regularizers_together_keep_their_promises(step, random_network, make_request):
    others = [
        SelFTConfig(states=4),
        ProjectionConfig(),
        L1SPConfig(strength=5.0, form="penalty"),
        L2SPConfig(),
    ]
    alone, _ = step(make_request(regularizers=others))
    edited, report = step(make_request(regularizers=[*others, QUICK]))
    assert edited.content_hash != alone.content_hash and "keep" in report.record.losses
    kept = target_vector(random_network, Concept("Navy_Stripes")).float()
    basis = [delta for delta in edited.edits.values() if delta.any()]
    assert basis and all((delta @ kept).norm() < 1e-5 * delta.norm() * kept.norm() for delta in basis)
    # rows of all matrices x directions left by two kept concepts
    assert report.figures["changeable_weights"] == int(0.05 * 1408 * 190)


def test_cancelling_does_not_wait_for_the_pictures(step, random_network, make_request):
    before, asked = {name: weight.clone() for name, weight in random_network.unet.state_dict().items()}, []
    callbacks = Callbacks(should_stop=lambda: asked.append(1) or len(asked) > 10)
    request = make_request(method=ConAblConfig(teacher="student"), regularizers=[DistillationConfig()])
    with pytest.raises(Cancelled, match="iteration 1 of 3; the input model is unchanged"):
        step(request, callbacks=callbacks)
    assert len(asked) == 11  # before the update and each of ten sampling steps
    assert all(torch.equal(weight, before[name]) for name, weight in random_network.unet.state_dict().items())
