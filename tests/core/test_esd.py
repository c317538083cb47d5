"""Erased Stable Diffusion's goal, the states it is trained on, and what training does."""

from functools import partial

import pytest
import torch

from cul_core.base.errors import Cancelled, ConfigError
from cul_core.concepts.concept import Concept
from cul_core.methods.esd import ESD, ESDConfig, erasing_goal
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.flow_process import FlowProcess
from cul_core.models.sampling import generator_for
from cul_core.models.text_conditioning import Conditioning
from cul_core.models.trajectory_buffer import TrajectoryBuffer, run_trajectory
from cul_core.models.weight_roles import role_of
from cul_core.parts.part import Teachers
from cul_core.parts.step_context import StepContext
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.projection import GradientProjection, ProjectionConfig
from cul_core.training.callbacks import Callbacks
from cul_core.training.step import run_step

SHORT = {"trajectories": 2, "trajectory_steps": 4}


class NoAnchors:
    """A store that must not be asked."""

    def anchor_latents(self, *arguments, **settings):
        raise AssertionError("anchor images were asked for")


@pytest.fixture
def predict(random_network):
    def predict(latents, timesteps, embeddings):
        with torch.no_grad():
            return random_network.predict(latents, timesteps, embeddings)

    return predict


@pytest.fixture
def prepared(random_network):
    """A method that is ready for `loss`; arguments are its settings."""

    def prepare(concepts=("Lava",), seed=5, **settings):
        concepts = tuple(map(Concept, concepts))
        method = ESD(ESDConfig(**(SHORT | settings)))
        training = TrainingConfig(batch_size=3)
        method.prepare(
            StepContext(
                random_network,
                concepts,
                (),
                (),
                (),
                torch.empty(0, 4, 8, 8),
                {},
                {},
                training,
                partial(generator_for, seed),
            )
        )
        return method

    return prepare


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def buffer_of(network, prompts=("a cat", "a house"), **settings):
    settings = {"size": 3, "refresh_every": 4} | settings
    return TrajectoryBuffer(
        network.encode(prompts),
        network.encode([""]),
        (4, 8, 8),
        partial(DiscreteProcess().trajectory, 5),
        partial(generator_for, 7, "trajectory"),
        **settings,
    )


# --- the goal


def test_no_negative_guidance_leaves_a_loss_of_zero(prepared, predict):
    for erase_from in ("", "a house"):
        method = prepared(negative_guidance=0.0, erase_from=erase_from)
        # the teacher sees more prompts in one call than the student, which may cost the last bits
        assert (
            method.loss(predict, Teachers(predict, predict), torch.Generator().manual_seed(0)).total < 1e-10
        )


def test_a_negative_guidance_of_one_makes_the_goal_the_unconditional_prediction(
    random_network, prepared, predict
):
    null, concept = noise(0, 2, 3, 4, 8, 8)
    torch.testing.assert_close(erasing_goal(null, concept, concept, 1.0), null, atol=1e-6, rtol=0)
    seen = []

    def student(latents, timesteps, embeddings):
        seen.append(predict(latents, timesteps, random_network.encode([""]).expand(len(embeddings))))
        return seen[-1]

    loss = (
        prepared(negative_guidance=1.0)
        .loss(student, Teachers(predict, predict), torch.Generator().manual_seed(0))
        .total
    )
    assert seen and loss < 1e-10


@pytest.mark.parametrize("papers", [0.0, 1.0, 2.0])
def test_strength_is_one_more_than_the_papers(papers):
    null, concept = noise(1, 2, 2, 4, 8, 8)
    # arXiv 2303.07345: what the concept adds, taken off the unconditional prediction
    expected = null - papers * (concept - null)
    torch.testing.assert_close(erasing_goal(null, concept, concept, 1 + papers), expected, atol=1e-5, rtol=0)


def test_goal_and_loss_by_hand(prepared, random_network):
    method = prepared(negative_guidance=3.0, erase_from="a house")
    values = {"": 1.0, Concept("Lava").prompt: 3.0, "a house": 10.0}

    def teacher(latents, timesteps, embeddings):
        """Each prompt its own constant."""
        known = random_network.encode(list(values)).text
        numbers = [
            list(values.values())[int((known - one).abs().sum((1, 2)).argmin())] for one in embeddings.text
        ]
        return torch.tensor(numbers).view(-1, 1, 1, 1).expand_as(latents)

    asked = []

    def student(latents, timesteps, embeddings):
        asked.append(embeddings)
        return torch.full_like(latents, 6.0)

    loss = method.loss(student, Teachers(teacher, teacher), torch.Generator().manual_seed(0))
    # goal 10 - 3 (3 - 1) = 4, loss (6 - 4)^2
    assert loss.total == 4 and loss.terms == {"unlearn": 4.0}
    assert torch.equal(asked[0].text, random_network.encode(["a house"] * 3).text)


def test_several_targets_take_turns(prepared, predict, random_network):
    method = prepared(("Lava", "Denim"), trajectories=4)
    generator = torch.Generator().manual_seed(0)
    method.loss(predict, Teachers(predict, predict), generator)
    assert [kept.prompt for kept in method._buffer.trajectories] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"negative_guidance": -1.0}, "negative_guidance is -1.0; give a number between 0.0 and"),
        ({"trajectories": 0}, "trajectories is 0"),
        ({"teacher": "student"}, "teacher is 'student'; choose one of start, pretrained"),
        ({"erase_from": 3}, "erase_from is 3; give a value of type str"),
    ],
)
def test_setting_that_cannot_work_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        ESDConfig(**values)


# --- the states


def test_kept_states_are_bit_for_bit_those_of_a_run_from_the_same_seed_up_to_them(random_network, predict):
    buffer = buffer_of(random_network)
    buffer.draw(predict, 1, torch.Generator().manual_seed(0))
    null, prompts = random_network.encode([""]), random_network.encode(["a cat", "a house"])
    assert [kept.prompt for kept in buffer.trajectories] == [0, 1, 0]
    for number, kept in enumerate(buffer.trajectories):
        assert kept.states.dtype == torch.float16 and kept.states.shape == (5, 4, 8, 8)
        for stop in range(5):
            solver = DiscreteProcess().trajectory(5)
            latents = torch.randn(1, 4, 8, 8, generator=generator_for(7, "trajectory", number))
            for time in solver.times[:stop]:
                empty, full = predict(
                    torch.cat([latents, latents]), time, Conditioning.cat([null, prompts[kept.prompt]])
                ).chunk(2)
                latents = solver.step(empty + 3.0 * (full - empty), time, latents)
            assert torch.equal(kept.states[stop], latents[0].half()), (number, stop)


@pytest.mark.parametrize(
    "fresh",
    [
        partial(DiscreteProcess().trajectory, 5),
        partial(DiscreteProcess("v_prediction").trajectory, 5),
        partial(FlowProcess(shift=3.0).trajectory, 5),
    ],
)
def test_a_solvers_step_leads_from_every_kept_state_to_the_next(fresh, random_network, predict):
    null, prompt = random_network.encode(["", "a cat"])
    kept = run_trajectory(predict, prompt, null, noise(2, 4, 8, 8), fresh(), 3.0)
    assert torch.equal(kept.times, fresh().times)
    for i in range(4):
        state, time = kept.states[i].float()[None], kept.times[i]
        empty, full = predict(state.expand(2, -1, -1, -1), time, Conditioning.cat([null, prompt])).chunk(2)
        following = fresh().step(empty + 3.0 * (full - empty), time, state)[0]
        expected = kept.states[i + 1].float()
        # fp16 of both, through the network
        assert (following - expected).abs().max() < 4e-3 * expected.abs().max()


def test_drawn_states_are_kept_ones_with_their_own_times(random_network, predict):
    buffer = buffer_of(random_network, size=1)
    drawn = buffer.draw(predict, 40, torch.Generator().manual_seed(0))
    (kept,) = buffer.trajectories
    for latents, time in zip(drawn.latents, drawn.times, strict=True):
        assert torch.equal(latents, kept.states[kept.times.tolist().index(time)].float())
    assert len(set(drawn.times.tolist())) == 5


def test_the_oldest_trajectory_is_replaced_every_so_many_draws_and_the_rest_stays(random_network, predict):
    buffer, generator, seen = buffer_of(random_network), torch.Generator().manual_seed(0), []
    for _ in range(10):
        buffer.draw(predict, 1, generator)
        seen.append(buffer.trajectories)
    changed = [draw for draw in range(1, 10) if seen[draw] != seen[draw - 1]]
    assert changed == [4, 8]
    assert all(one is other for one, other in zip(seen[4][:2], seen[3][1:], strict=True))
    assert [kept.prompt for kept in seen[9]] == [0, 1, 0]  # numbers 2, 3, 4
    assert len({kept.states.sum().item() for kept in (*seen[0], *seen[9])}) == 5


def test_states_depend_on_the_seed_of_the_step_alone(prepared, predict):
    def kept(seed):
        method = prepared(seed=seed)
        method.loss(predict, Teachers(predict, predict), torch.Generator().manual_seed(seed))
        return method._buffer.trajectories

    one, again, other = kept(1), kept(1), kept(2)
    assert all(torch.equal(a.states, b.states) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0].states, other[0].states) and not torch.equal(
        one[0].states[0], one[1].states[0]
    )


# --- training


@pytest.mark.parametrize("group", ["kv", "attn2", "non-attn2"])
def test_training_lowers_the_loss_and_changes_only_its_group(
    group, random_model, random_network, networks, make_request
):
    method = ESDConfig(**SHORT, erase_from="a house")
    request = make_request(
        "Denim", method=method, iterations=40, batch_size=4, learning_rate=3e-3, group=group
    )
    edited, report = run_step(random_model, request, store=NoAnchors(), networks=networks["random"])
    losses = torch.tensor(report.losses)
    assert losses[-10:].mean() < 0.7 * losses[:10].mean()
    names = set(random_network.weights(role_of(group)))
    assert edited.edits and set(edited.edits) <= names


def test_no_anchor_pictures_are_sampled_also_with_projection(random_model, networks, make_request):
    told = []
    request = make_request(method=ESDConfig(**SHORT), regularizers=[ProjectionConfig()], iterations=1)
    callbacks = Callbacks(on_anchors=lambda done, count: told.append(done))
    run_step(random_model, request, store=NoAnchors(), networks=networks["random"], callbacks=callbacks)
    assert not told


def test_a_part_that_needs_anchor_pictures_gets_them(random_model, networks, make_request, monkeypatch):
    needs = (*GradientProjection.needs, "anchor_latents")
    monkeypatch.setattr(GradientProjection, "needs", needs)
    request = make_request(method=ESDConfig(**SHORT), regularizers=[ProjectionConfig()], iterations=1)
    with pytest.raises(AssertionError, match="anchor images were asked for"):
        run_step(random_model, request, store=NoAnchors(), networks=networks["random"])


def test_teachers_differ_from_the_second_request_on(random_model, networks, make_request):
    def losses(model, target, teacher):
        request = make_request(
            target, method=ESDConfig(teacher=teacher, **SHORT), iterations=2, learning_rate=3e-2
        )
        model, report = run_step(model, request, store=NoAnchors(), networks=networks["random"])
        return model, report.losses

    first, one = losses(random_model, "Lava", "start")
    assert losses(random_model, "Lava", "pretrained")[1] == one
    assert losses(first, "Denim", "start")[1][0] != losses(first, "Denim", "pretrained")[1][0]


def test_cancelling_does_not_wait_for_the_pictures_of_an_update(random_model, networks, make_request):
    asked = []
    callbacks = Callbacks(should_stop=lambda: asked.append(1) or len(asked) > 5)
    request = make_request(method=ESDConfig(trajectories=8, trajectory_steps=50))
    with pytest.raises(Cancelled, match="iteration 1 of 3; the input model is unchanged"):
        run_step(random_model, request, store=NoAnchors(), networks=networks["random"], callbacks=callbacks)
    assert len(asked) == 6


def test_reference_settings_sample_a_new_picture_for_every_update(prepared, predict):
    method = prepared(**ESDConfig.REFERENCE, trajectory_steps=2)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(3):
        method.loss(predict, Teachers(predict, predict), generator)
        seen.append(method._buffer.trajectories)
    assert all(len(kept) == 1 for kept in seen) and len({kept[0].states.sum().item() for kept in seen}) == 3
