"""Concept Ablation's loss, and the gradient block on the start token."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from toy_network import WIDTH, Toy

from cul_core.base.errors import ConceptError, ModelError
from cul_core.concepts.concept import Concept
from cul_core.methods.conabl import ConAbl, ConAblConfig, masked_error
from cul_core.minicanvas.family import MINI
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.families.sd1 import SD1
from cul_core.models.sampling import generator_for
from cul_core.parts.part import Teachers
from cul_core.parts.step_context import StepContext
from cul_core.parts.training_config import TrainingConfig
from cul_core.training.step import run_step


def context_for(network, concepts, anchor_prompts, latents, previous=(), batch_size=2):
    concepts = concepts if isinstance(concepts, tuple) else (concepts,)
    return StepContext(
        network,
        concepts,
        (),
        previous,
        anchor_prompts,
        latents,
        {},
        {},
        TrainingConfig(batch_size=batch_size),
        partial(generator_for, 0),
    )


@pytest.fixture
def trainable_kv(random_network):
    """Keys and values of the random UNet, with gradients for the test."""
    weights = [weight.requires_grad_(True) for weight in random_network.weights("text_readers").values()]
    yield weights
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None


def test_loss_is_zero_when_student_equals_teacher_on_equal_prompts_and_four_times_the_element_mean_else(
    random_network,
):
    method = ConAbl(ConAblConfig())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    method.prepare(context_for(random_network, Concept("Lava"), ("a star",), latents))

    def student(noisy, timesteps, embeddings):
        return 3 * noisy

    def teacher(noisy, timesteps, embeddings):
        return noisy

    generator = torch.Generator().manual_seed(1)
    assert method.loss(student, Teachers(student, student), generator).total == 0
    state = generator.get_state()
    seen = []
    loss = method.loss(lambda z, t, e: seen.append(z) or 3 * z, Teachers(teacher, teacher), generator).total
    assert torch.allclose(loss, 4 * (2 * seen[0]).square().mean())
    generator.set_state(state)
    assert method.loss(student, Teachers(teacher, teacher), generator).total == loss


def test_anchor_prompts_that_mention_the_target_or_an_earlier_one_are_dropped(random_network):
    method = ConAbl(ConAblConfig())
    prompts = ("a star", "a Lava star", "a denim house")
    method.prepare(
        context_for(random_network, Concept("Lava"), prompts, torch.zeros(3, 4, 8, 8), (Concept("Denim"),))
    )
    assert [index for index, _ in method._pairs[0]] == [0]


def test_blocked_start_token_takes_no_part_in_the_weights_gradient():
    network = Toy()
    network.shared_rows = 1
    layer = network.text_readers()[0].requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    tokens, seen = torch.randn(2, 4, WIDTH, generator=generator), torch.randn(2, 4, 2, generator=generator)
    with network.shared_rows_detached():
        (layer(tokens) * seen).sum().backward()
    # dL/dW = sum over tokens i >= 1 of delta_i c_i^T, delta_i = seen_i
    assert torch.allclose(
        layer.weight.grad, torch.einsum("bio,bid->od", seen[:, 1:], tokens[:, 1:]), atol=1e-6
    )
    layer.weight.grad = None
    with network.shared_rows_detached():
        (layer(tokens[:, :1]) * seen[:, :1]).sum().backward()
    assert layer.weight.grad.abs().max() == 0
    assert not layer._forward_hooks


def test_training_brings_the_target_prompt_to_the_teachers_anchor_prediction(
    random_model, random_network, networks, anchors, make_request
):
    _, report = run_step(
        random_model,
        make_request(iterations=30, learning_rate=1e-2, batch_size=4),
        store=anchors,
        networks=networks["random"],
    )
    losses = torch.tensor(report.losses)
    assert losses[-8:].mean() < 0.5 * losses[:8].mean()


def test_teacher_options_differ_only_after_the_first_update(random_model, networks, anchors, make_request):
    losses = {}
    for teacher in ("start", "pretrained", "student"):
        request = make_request(method=ConAblConfig(teacher=teacher), iterations=3, learning_rate=3e-2)
        losses[teacher] = run_step(random_model, request, store=anchors, networks=networks["random"])[
            1
        ].losses
    assert losses["start"] == losses["pretrained"]
    assert losses["start"][0] == losses["student"][0] and losses["start"][2] != losses["student"][2]


def test_anchor_prompts_that_do_not_say_the_anchor_are_refused(random_network):
    method = ConAbl(ConAblConfig())
    concept = Concept("dragonfly", "object", "zebra")
    with pytest.raises(
        ConceptError,
        match="No anchor prompt can be turned into one for 'dragonfly'; add prompts that name its anchor",
    ):
        method.prepare(context_for(random_network, concept, ("a house", "a cat"), torch.zeros(2, 4, 8, 8)))


def test_equal_prompts_and_weights_give_no_loss_and_no_gradient(random_network, trainable_kv, monkeypatch):
    monkeypatch.setattr(Concept, "target_prompts", lambda self, caption: (caption,))
    method, predict = ConAbl(ConAblConfig()), random_network.predict
    method.prepare(context_for(random_network, Concept("Lava"), ("a star",), torch.randn(1, 4, 8, 8)))
    loss = method.loss(predict, Teachers(predict, predict), torch.Generator().manual_seed(1)).total
    loss.backward()
    assert loss == 0 and all(weight.grad.abs().max() == 0 for weight in trainable_kv)


def test_prompts_encoded_once_or_before_every_update_give_the_same_losses(random_network):
    latents, captions = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        ("a star", "a house", "a cat"),
    )
    context, predict = context_for(random_network, Concept("Lava"), captions, latents), random_network.predict

    def other(*inputs):
        return -predict(*inputs)

    def losses(encode_again):
        method, generator = ConAbl(ConAblConfig(preservation=0.5)), torch.Generator().manual_seed(1)
        for number in range(3):
            if number == 0 or encode_again:
                random_network._prompts.clear()
                method.prepare(context)
            with torch.no_grad():
                yield method.loss(predict, Teachers(other, other), generator).total.item()

    assert [*losses(encode_again=False)] == [*losses(encode_again=True)]


def test_errors_outside_the_mask_do_not_count_and_each_picture_is_averaged_over_its_own():
    error = torch.ones(2, 4, 3, 3)
    error[0, :, 0, 0], error[1, :, 2] = 2, 3
    mask = torch.zeros(2, 3, 3)
    mask[0, 0, :2], mask[1, 2] = 1, 1
    # picture 0: two cells of 4 channels, (4 * 2^2 + 4 * 1) / 2 = 10; picture 1: three cells, 4 * 3^2 = 36
    assert masked_error(error, mask) == (10 + 36) / 2
    elsewhere = error + 100 * (1 - mask)[:, None]
    assert masked_error(elsewhere, mask) == masked_error(error, mask)
    assert masked_error(error, torch.ones(2, 3, 3)) == masked_error(error) == 4 * error.square().mean()


@pytest.mark.parametrize(
    ("family", "margin"), [(SD1, 1), (MINI, 0)], ids=["64 latent pixels", "8 latent pixels"]
)
def test_the_rim_that_the_reference_leaves_out_is_one_latent_pixel_of_sixty_four(
    family, margin, random_network
):
    side = family.latent_shape[1]
    method = ConAbl(ConAblConfig(border_mask=True))
    method.prepare(
        context_for(
            replace(random_network, family=family),
            Concept("Lava"),
            ("a star",),
            torch.zeros(1, 4, side, side),
        )
    )
    inside = torch.zeros(2, 4, side, side)
    inside[:, :, margin : side - margin, margin : side - margin] = 1

    def loss_of(error):
        def teacher(*inputs):
            return 0 * error

        return method.loss(lambda *inputs: error, Teachers(teacher, teacher), torch.Generator()).total

    assert loss_of(1 - inside) == 0 and loss_of(inside) == 4


def preserving(network, prediction_type):
    """(what a student's preservation costs by its answer: total and terms of the loss, the answer that it
    should give)."""
    method = ConAbl(ConAblConfig(preservation=0.5))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    method.prepare(context_for(network, Concept("Lava"), ("a star",), latents, batch_size=1))
    method._process = DiscreteProcess(prediction_type)
    seen = []

    def teacher(noisy, timesteps, embeddings):
        return noisy

    teachers = Teachers(teacher, teacher)
    method.loss(
        lambda *inputs: seen.append(inputs) or inputs[0],
        teachers,
        torch.Generator().manual_seed(1),
    )
    (noisy, timestep, embeddings), abar = seen[-1], method._process.alphas_cumprod
    assert torch.equal(embeddings.text, network.encode(["a star"]).text)
    signal, sigma = abar[timestep].sqrt(), (1 - abar[timestep]).sqrt()
    noise = (noisy - signal * latents) / sigma
    truth = noise if prediction_type == "epsilon" else signal * noise - sigma * latents

    def part(answer):
        said = method.loss(
            lambda z, t, e: answer if torch.equal(z, noisy) else z,
            teachers,
            torch.Generator().manual_seed(1),
        )
        return said.total.item(), said.terms

    return part, truth


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_anchors_are_preserved_by_what_a_perfect_model_says_of_them(prediction_type, random_network):
    part, truth = preserving(random_network, prediction_type)
    total, parts = part(truth)
    assert parts["unlearn"] == 0 and total == pytest.approx(0, abs=1e-8)
    total, parts = part(truth + 2)  # every element is 2 off: 0.5 * mean of 2^2
    assert total == pytest.approx(2.0) and parts["preserve"] == pytest.approx(2.0)


def test_targets_of_a_request_are_drawn_equally_often_whatever_anchors_they_have(random_network):
    method, captions = ConAbl(ConAblConfig()), ("a star", "a house", "a cat", "a cup", "a boat")
    concepts = (Concept("Lava"), Concept("tulip", "object", "star"))
    method.prepare(context_for(random_network, concepts, captions, torch.zeros(5, 4, 8, 8), batch_size=4000))
    assert [len(pairs) for pairs in method._pairs] == [5, 1]
    _, targets = method._draw(torch.Generator().manual_seed(0))
    (tulip,) = method._pairs[1][0][1]
    # 2000 of 4000 expected, with a standard deviation of sqrt(4000 / 4) = 32
    assert abs(Counter(targets)[tulip] - 2000) < 160
    fewer = (Concept("tulip", "object", "a cat"), Concept("rose", "object", "a"))
    method.prepare(context_for(random_network, fewer, captions, torch.zeros(5, 4, 8, 8), batch_size=4000))
    pictures, _ = method._draw(torch.Generator().manual_seed(0))
    # rose: 400 of each picture; tulip: 2000 more of the cat, number 2
    assert all(abs(Counter(pictures)[i] - (2400 if i == 2 else 400)) < 160 for i in range(5))


def test_replay_gives_earlier_targets_their_share_of_every_batch_and_nothing_changes_without_any(
    random_network,
):
    captions, earlier = (
        ("a star", "a house"),
        (Concept("Denim"), Concept("tulip", "object", "star"), Concept("rose", "object", "cup")),
    )

    def drawn(replay, previous):
        method = ConAbl(ConAblConfig(replay=replay))
        method.prepare(
            context_for(
                random_network, Concept("Lava"), captions, torch.zeros(2, 4, 8, 8), previous, batch_size=8
            )
        )
        return method, method._draw(torch.Generator().manual_seed(0))

    method, (pictures, prompts) = drawn(0.25, earlier)
    # no caption shows a cup, so the rose is left out
    assert [len(pairs) for pairs in method._earlier] == [2, 1]
    known = [
        {row for _, rows in group for row in rows}
        for group in (method._pairs[0], method._earlier[0] + method._earlier[1])
    ]
    # 8 x 0.25 = 2 of 8
    assert all(row in known[0] for row in prompts[:6]) and all(row in known[1] for row in prompts[6:])
    assert drawn(0.25, ())[1] == drawn(0.0, ())[1] == drawn(0.0, earlier)[1]


def test_scaled_pictures_say_so_in_both_prompts_and_padding_does_not_count(random_network):
    method = ConAbl(ConAblConfig(augmentations=3, flip=True))
    captions = ("a star", "a house")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    method.prepare(context_for(random_network, Concept("Lava"), captions, latents, batch_size=16))
    prompts = {}
    for picture, versions in method._pairs[0]:
        caption = method._pool.prefixes[picture] + captions[method._pool.anchors[picture]]
        prompts[picture] = [
            caption,
            *(
                method._pool.prefixes[picture] + text
                for text in Concept("Lava").target_prompts(captions[method._pool.anchors[picture]])
            ),
        ]
        rows = [method._anchor_rows[picture], *versions]
        assert torch.equal(method._embeddings[rows].text, random_network.encode(prompts[picture]).text)
    assert len(prompts) == 2 * 3 * 2 and any(method._pool.prefixes)
    outside = []

    def student(noisy, timesteps, embeddings):
        pictures, _ = method._draw(torch.Generator().manual_seed(1))
        outside.append(100 * (1 - method._pool.masks[pictures])[:, None].expand_as(noisy))
        return outside[0]

    def teacher(noisy, timesteps, embeddings):
        return torch.zeros_like(noisy)

    loss = method.loss(student, Teachers(teacher, teacher), torch.Generator().manual_seed(1)).total
    assert outside[0].max() == 100 and loss == 0


def test_augmenting_a_family_without_an_autoencoder_is_refused(random_network):
    network = replace(random_network, family=SD1, autoencoder=None)
    with pytest.raises(
        ModelError,
        match="Stable Diffusion 1.x is loaded here without an autoencoder.*turn off.*augmentations and flip",
    ):
        ConAbl(ConAblConfig(flip=True)).prepare(
            context_for(network, Concept("Lava"), ("a star",), torch.zeros(1, 4, 64, 64))
        )


def test_all_options_together_train_and_repeat(random_model, networks, anchors, make_request):
    config = ConAblConfig(augmentations=1, flip=True, preservation=1.0)
    runs = [
        run_step(
            random_model,
            make_request(method=config, iterations=2),
            store=anchors,
            networks=networks["random"],
        )
        for _ in range(2)
    ]
    assert runs[0][0].content_hash == runs[1][0].content_hash
    assert runs[0][1].record.losses.keys() == {"unlearn", "preserve"}
