"""The contract between the core and a model: on a network of another kind, and where diffusers' networks
promise it."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from toy_network import TOY, Toy

from cul_core.base.errors import ConfigError, ModelError
from cul_core.base.last_result import LastResult
from cul_core.concepts.concept import Concept
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods.conabl import ConAbl, ConAblConfig
from cul_core.methods.esd import ESD, ESDConfig
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.family import FAMILIES
from cul_core.models.flow_process import FlowProcess
from cul_core.models.recognize import family_of
from cul_core.models.sampling import SamplerConfig, generator_for, predict_guided, run_solver, sample_latents
from cul_core.models.text_conditioning import Conditioning
from cul_core.models.trajectory_buffer import TrajectoryBuffer
from cul_core.parts.part import Teachers
from cul_core.parts.step_context import StepContext
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.projection import GradientProjection, ProjectionConfig
from cul_core.regularizers.selft import SelFT, SelFTConfig
from cul_core.requests.request import Request
from cul_core.training.callbacks import Callbacks
from cul_core.training.compute import Compute
from cul_core.training.constraints import Constraints
from cul_core.training.memory_plan import planned
from cul_core.training.step import run_step

PROMPTS = ("a cat image", "a house image")


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def toy(monkeypatch):
    """A network of a family that is registered for the test alone."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    return Toy()


@pytest.fixture
def context(toy):
    weights = toy.exact(list(toy.weights("text_readers")))
    return StepContext(
        toy,
        (Concept("lava"),),
        (Concept("denim"),),
        (),
        PROMPTS,
        noise(0, 2, *TOY.latent_shape),
        weights,
        dict(weights),
        TrainingConfig(batch_size=2),
        partial(generator_for, 5),
    )


# --- noise processes

PROCESSES = [
    FlowProcess(),
    FlowProcess(shift=3.0),
    DiscreteProcess(),
    DiscreteProcess("v_prediction"),
    DiscreteProcess("v_prediction", ends_in_noise=True),
]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_what_a_perfect_network_predicts_stands_for_the_latents(process):
    latents, eps = noise(1, 2, 6, 2, 3, 3)
    times = process.draw_times(6, torch.Generator().manual_seed(2))
    noised = process.noised(latents, eps, times)
    # fp32, where about 1/15 of the latents is left at most in these times
    torch.testing.assert_close(
        process.clean(process.target(latents, eps, times), noised, times), latents, atol=1e-4, rtol=0
    )


def test_a_flow_is_a_straight_line_along_which_the_target_is_its_slope():
    process, times = FlowProcess(), torch.tensor([0.0, 0.25, 1.0])
    latents, eps = noise(3, 2, 3, 2, 3, 3)
    noised = process.noised(latents, eps, times)
    assert torch.equal(noised[0], latents[0]) and torch.equal(noised[2], eps[2])
    torch.testing.assert_close(noised[1], 0.75 * latents[1] + 0.25 * eps[1])
    ahead = process.noised(latents, eps, times + 1)
    torch.testing.assert_close(ahead - noised, process.target(latents, eps, times), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_eulers_method_reaches_the_data_of_a_perfect_network(shift, spacing):
    process, data = FlowProcess(shift), noise(4, 2, 3, 3)

    def predict(latents, time, conditioning):
        return (latents - data) / time  # x_t = (1 - t) x_0 + t eps

    prompts = Conditioning(torch.zeros(1, 1, 1))
    for solver in (process.trajectory(4, spacing), process.sampler(4)):
        start = process.noised(data[None], noise(5, 1, 2, 3, 3), solver.times[:1])
        found = run_solver(predict, start, solver, prompts, prompts, 1.0)
        torch.testing.assert_close(found[0], data, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shift", "spacing", "times"),
    [
        (1.0, "trailing", [1, 3 / 4, 2 / 4, 1 / 4]),
        (1.0, "leading", [4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        # 3 u / (1 + 2 u) of these
        (3.0, "trailing", [1, 9 / 10, 3 / 4, 1 / 2]),
        (3.0, "leading", [12 / 13, 9 / 11, 2 / 3, 3 / 7]),
    ],
)
def test_times_of_a_trajectory_and_leading_ones_never_begin_at_pure_noise(shift, spacing, times):
    found = FlowProcess(shift).trajectory(4, spacing).times
    torch.testing.assert_close(found, torch.tensor(times, dtype=torch.float32))


def test_times_to_train_at_are_those_of_a_shifted_uniform_draw():
    plain, shifted = (
        FlowProcess(shift).draw_times(1000, torch.Generator().manual_seed(0)) for shift in (1.0, 3.0)
    )
    assert 0 <= plain.min() and plain.max() < 1
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


# --- guidance


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_guidance_of_one_asks_for_the_prompted_half_alone(toy, scale, rows):
    asked = []

    def predict(latents, times, conditioning):
        asked.append((len(latents), len(conditioning)))
        return toy.predict(latents, times, conditioning)

    latents, null = noise(6, 3, *TOY.latent_shape), toy.encode([""])
    conditioning, time = toy.encode(["a cat", "a cup", "lava"]), torch.tensor(0.5)
    found = predict_guided(predict, latents, time, conditioning, null, scale)
    empty, prompted = (toy.predict(latents, time, e) for e in (null.expand(3), conditioning))
    assert asked == [(rows, rows)]
    torch.testing.assert_close(found, empty + scale * (prompted - empty))


# --- a network of another kind


def test_a_registered_family_is_recognized_and_knows_its_roles(toy):
    assert family_of({"toy.mix.weight": (2, 2, 1, 1)}, "a") is TOY
    assert set(toy.weights("text_readers")) == {"toy.key.weight", "toy.value.weight"}
    assert set(toy.weights("all")) == {*toy.weights("text_readers"), "toy.mix.weight", "toy.mix.bias"}
    with pytest.raises(
        ConfigError, match="Toy has no weights called 'attention'; choose one of text_readers"
    ):
        toy.weights("attention")


def test_images_are_sampled_alike_in_any_company(toy):
    def sample(*prompts):
        generators = [generator_for(0, prompt) for prompt in prompts]
        return sample_latents(toy, prompts, generators, SamplerConfig(steps=4, guidance_scale=2.0))

    cat, lava, cup = sample("cat", "lava", "cup")
    assert cat.shape == TOY.latent_shape and not torch.equal(cat, lava)
    assert torch.equal(sample("lava")[0], lava) and torch.equal(sample("cup", "lava")[0], cup)


def test_states_of_trajectories_lie_between_noise_and_image(toy):
    solver, first = partial(toy.process.trajectory, 4), generator_for(7, 0)
    buffer = TrajectoryBuffer(
        toy.encode(PROMPTS),
        toy.encode([""]),
        TOY.latent_shape,
        solver,
        partial(generator_for, 7),
        guidance_scale=2.0,
        size=2,
    )
    states = buffer.draw(toy.predict, 50, torch.Generator().manual_seed(0))
    kept, _ = buffer.trajectories
    assert torch.equal(kept.states[0], torch.randn(TOY.latent_shape, generator=first).half())
    assert torch.equal(kept.times, solver().times) and states.latents.shape == (50, *TOY.latent_shape)
    assert set(states.times.tolist()) == set(solver().times.tolist()) and set(states.prompts) == {0, 1}
    # each step leads on by the guided prediction, within fp16
    null, prompt = toy.encode(["", PROMPTS[0]])
    for state, time, after in zip(kept.states, kept.times, kept.states[1:], strict=False):
        guided = predict_guided(toy.predict, state.float()[None], time, prompt, null, 2.0)
        following = solver().step(guided, time, state.float()[None])[0]
        torch.testing.assert_close(following, after.float(), atol=1e-2, rtol=1e-2)


@contextmanager
def trained(toy):
    """Within the block the text readers take gradients."""
    readers = list(toy.weights("text_readers").values())
    for weight in readers:
        weight.requires_grad_(True)
    try:
        yield readers
    finally:
        for weight in readers:
            weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("method", "nothing"),
    [
        (ESD(ESDConfig(trajectories=2, trajectory_steps=3)), ESD(ESDConfig(negative_guidance=0.0))),
        (ConAbl(ConAblConfig(preservation=1.0)), None),
    ],
    ids=["esd", "conabl"],
)
def test_methods_train_it(toy, context, method, nothing):
    def loss_of(method):
        method.prepare(context)
        teacher = torch.no_grad()(toy.predict)
        with trained(toy) as readers:
            teachers = Teachers(teacher, teacher)
            total = method.loss(toy.predict, teachers, torch.Generator().manual_seed(0)).total
            return total.item(), torch.autograd.grad(total, readers)

    total, found = loss_of(method)
    assert total > 0 and all(gradient.abs().max() > 0 for gradient in found)
    if nothing is not None:
        assert loss_of(nothing)[0] < 1e-10


def test_anchors_are_preserved_by_the_flow(toy, context):
    method = ConAbl(ConAblConfig(preservation=1.0))
    method.prepare(context)
    asked = []

    def student(latents, times, conditioning):
        asked.append((latents, times))
        return torch.zeros_like(latents)

    teachers = Teachers(student, student)
    terms = method.loss(student, teachers, torch.Generator().manual_seed(0)).terms
    (latents, times) = asked[-1]
    # the noised anchor tells which of the two it is, and the slope of its line
    slopes = [(latents - anchor) / times.view(-1, 1, 1, 1) for anchor in context.anchor_latents]
    answers = [torch.stack(choice).square().mean().item() for choice in _choices(slopes)]
    assert any(terms["preserve"] == pytest.approx(answer, rel=1e-3) for answer in answers)


def _choices(slopes):
    """Every way to take the first row from one list entry and the second row from one."""
    return [[one[0], other[1]] for one in slopes for other in slopes]


def test_projection_keeps_what_it_makes_of_protected_text(toy, context):
    projection = GradientProjection(ProjectionConfig())
    projection.prepare(context)
    kept = toy.encode([Concept("denim").prompt]).text[0, toy.content(Concept("denim").prompt)][-1]
    change = noise(8, 2, TOY.signature[1])
    constraints = Constraints([projection], "cpu")
    for name in toy.weights("text_readers"):
        allowed = constraints.allowed(name, change)
        assert (allowed @ kept).norm() < 1e-5 * (change @ kept).norm()
        assert allowed.norm() > 0.5 * change.norm()
    assert constraints.allowed("toy.mix.weight", change) is change
    assert projection.report()["protected_rank"] == 1


@pytest.mark.parametrize("trajectories", ["one", "per_state"])
def test_weights_are_scored_by_the_target(toy, context, trajectories):
    selft = SelFT(SelFTConfig(states=3, kept_fraction=0.25, trajectories=trajectories))
    selft.prepare(context)
    with trained(toy):
        selft.prepare_mask(context, lambda name: None)
    scores = context.last_result.of(selft._key(context), None)  # kept from before
    # the prediction is linear, so that latents play no part: for mean text rows e of the target and a of the
    # anchor, whose prediction is held fixed, row c of a reader has the gradient
    # 9 pixels x 2 (1 + t)^2 ((K + V) (e - a))_c e
    target, anchor = toy.encode(["lava Style", ""]).text.mean(1)
    difference = sum(context.start.values()) @ (target - anchor)
    times = toy.process.trajectory(3, "leading").times
    gradient = ((1 + times) ** 2).sum() * 18 * torch.outer(difference, target)
    for name, weight in context.start.items():
        torch.testing.assert_close(scores[name], (weight * gradient).abs(), atol=1e-5, rtol=1e-4)
    masks = [selft.mask(name, weight) for name, weight in context.start.items()]
    assert sum(int(mask.sum()) for mask in masks) == 2 * 2 * TOY.signature[1] // 4


def test_a_whole_step_trains_it(toy, monkeypatch):
    monkeypatch.setattr("cul_core.training.step._check_supported", lambda *_: None)
    model = UnlearnModel(
        SimpleNamespace(name="toy.safetensors", size=0, sha256="0" * 64, identity="0" * 64), TOY
    )
    networks = SimpleNamespace(get=lambda *_: toy, last_result=LastResult())
    before = {key: weight.clone() for key, weight in toy.weights("all").items()}
    request = Request(
        (Concept("lava"),),
        ESDConfig(trajectories=2, trajectory_steps=3),
        (SelFTConfig(states=3, kept_fraction=0.5), ProjectionConfig()),
        TrainingConfig(iterations=10, batch_size=4, learning_rate=1e-2),
        retain=(Concept("denim"),),
        anchor_prompts=PROMPTS,
    )
    told = []
    watch = Callbacks(
        on_preview=lambda iteration, latents: told.append(latents.shape),
        preview_prompts=("lava",),
        preview_every=5,
    )
    edited, report = run_step(model, request, networks=networks, callbacks=watch)
    assert set(edited.edits) == set(toy.weights("text_readers")) and len(report.losses) == 10
    assert report.losses[-1] < report.losses[0] and told == [(1, *TOY.latent_shape)] * 3
    assert all(torch.equal(weight, before[key]) for key, weight in toy.weights("all").items())
    again, _ = run_step(model, request, networks=networks)
    assert again.content_hash == edited.content_hash


def test_what_cannot_be_counted_is_computed_as_asked(toy, make_request):
    toy.family = replace(TOY, is_small=False)
    compute = Compute("bfloat16")
    assert planned(toy, make_request(), torch.device("cpu"), compute, 1) == (compute, False, None)


def test_without_an_autoencoder_images_are_refused(toy):
    for call in (toy.with_autoencoder, lambda: toy.decode(None), lambda: toy.encode_images(None, None)):
        with pytest.raises(ModelError, match="Toy"):
            call()


def test_no_shared_rows_means_that_no_gradient_is_stopped(toy):
    with toy.shared_rows_detached():
        assert not any(reader._forward_hooks for reader in toy.text_readers())
    toy.shared_rows = 1
    with toy.shared_rows_detached():
        assert all(reader._forward_hooks for reader in toy.text_readers())
    assert not any(reader._forward_hooks for reader in toy.text_readers())


# --- diffusers' networks

TEXTS = ["a cat", "", "An image in the style of Candy Stripes"]


@pytest.fixture(params=["mini", "sdxl"])
def network(request):
    """MiniCanvas, and small Stable Diffusion XL with its two text encoders."""
    if request.param == "mini":
        return request.getfixturevalue("random_network")
    request.getfixturevalue("known_tiny")
    from cul_core.output.checkpoint import open_model

    source = open_model(request.getfixturevalue("tiny_checkpoints")["sdxl"]).source
    return request.getfixturevalue("tiny_networks")["sdxl"].get(source)


def assert_same_text(found, wanted):
    torch.testing.assert_close(found.text, wanted.text)
    assert (found.pooled is None) == (wanted.pooled is None)
    if wanted.pooled is not None:
        torch.testing.assert_close(found.pooled, wanted.pooled)


def test_prompts_encoded_from_their_own_rows_are_the_same(network):
    rows = network.token_rows(TEXTS)
    assert [tuple(one.shape[:2]) for one in rows] == [(3, 77)] * len(network.family.text_encoders)
    assert_same_text(network.encode_rows(TEXTS, rows), network.encode(TEXTS))
    assert not any(encoder.get_input_embeddings()._forward_hooks for encoder in network.text_encoders)


def test_gradients_flow_to_rows_and_change_what_is_read_from_there_on(network):
    rows = tuple(one.clone().requires_grad_(True) for one in network.token_rows(TEXTS))
    encoded = network.encode_rows(TEXTS, rows)
    found = torch.autograd.grad(encoded.text[:, 2].square().sum(), rows)
    for gradient in found:
        # causal attention: the third row depends on the first three
        assert (gradient[:, :3].abs().amax((0, 2)) > 0).all() and not gradient[:, 3:].any()
    changed = [one.detach().clone() for one in rows]
    for one in changed:
        one[:, 2] = noise(9, one.shape[-1])
    moved = (network.encode_rows(TEXTS, changed).text - encoded.text).abs().amax((0, 2))
    assert not moved[:2].any() and (moved[2:] > 0).all()


def test_an_encoding_with_gradients_is_the_cached_one(network):
    parameters = [next(encoder.parameters()) for encoder in network.text_encoders]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        encoded = network.encode(TEXTS, grad=True)
        found = torch.autograd.grad(encoded.text.square().sum(), parameters)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    assert all(gradient.abs().max() > 0 for gradient in found)
    known = network.encode(TEXTS)
    assert_same_text(replace(encoded, text=encoded.text.detach()), known)
    assert not known.text.requires_grad


def test_other_weights_are_there_within_the_block_alone_whatever_happens(network):
    before = {key: weight.clone() for key, weight in network.weights("all").items()}
    readers = network.weights("text_readers")
    others = {key: torch.zeros_like(weight) for key, weight in readers.items()}
    with pytest.raises(ZeroDivisionError), network.with_weights(others):
        assert not any(weight.any() for weight in readers.values())
        raise ZeroDivisionError
    with pytest.raises(AttributeError), network.with_weights(others | {min(readers): None}):
        pass
    after = network.weights("all")
    assert all(torch.equal(weight, before[key]) for key, weight in after.items())


def test_weights_are_called_as_in_the_file(network):
    header = {key for key in network.weights("all")}
    assert all(key.startswith(network.family.prefix) for key in header)
    assert {id(reader.weight) for reader in network.text_readers()} == {
        id(weight) for weight in network.weights("text_readers").values()
    }
    exact = network.exact(list(network.weights("text_readers")))
    assert all(torch.equal(exact[key], weight) for key, weight in network.weights("text_readers").items())


def test_inputs_without_values_are_as_those_with_values(network):
    blank = network.blank(torch.bfloat16)
    assert blank.weights("all").keys() == network.weights("all").keys()
    assert all(weight.is_meta and weight.dtype == torch.bfloat16 for weight in blank.weights("all").values())
    latents, times, conditioning = blank.inputs(2)
    real = network.encode(["a cat", "a house"])
    assert latents.shape == (2, *network.family.latent_shape) and times.shape == (2,)
    assert conditioning.text.shape == real.text.shape
    assert (conditioning.pooled is None) == (real.pooled is None)
    assert real.pooled is None or conditioning.pooled.shape == real.pooled.shape
    assert blank.predict(latents, times, conditioning).shape == latents.shape


@pytest.mark.parametrize(
    ("prediction_type", "ends_in_noise"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_solvers_of_the_discrete_process_round_as_those_of_diffusers(steps, prediction_type, ends_in_noise):
    schedulers = pytest.importorskip("diffusers")
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": ends_in_noise,
    }
    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    process = DiscreteProcess(prediction_type, ends_in_noise)
    pairs = [
        (
            process.sampler(steps),
            schedulers.DPMSolverMultistepScheduler(**common, timestep_spacing="trailing"),
        ),
        *(
            (
                process.trajectory(steps, spacing),
                schedulers.DDIMScheduler(**common, **ddim, timestep_spacing=spacing),
            )
            for spacing in ("trailing", "leading")
        ),
    ]
    predictions = noise(7, 3, 1, 4, 3, 3)
    for solver, theirs in pairs:
        theirs.set_timesteps(steps)
        assert torch.equal(solver.times, theirs.timesteps)
        mine = other = noise(6, 1, 4, 3, 3)
        for number, time in enumerate(solver.times):
            predicted = predictions[number % 3]
            mine, other = solver.step(predicted, time, mine), theirs.step(predicted, time, other).prev_sample
            # noise that is divided by a signal of zero is not a number, on both sides
            torch.testing.assert_close(mine, other, atol=0, rtol=0, equal_nan=True)
