"""Concept Ablation's loss, and the gradient block on the start token."""

import pytest
import torch
from torch import nn

from cul_core.concepts import Concept
from cul_core.errors import ConceptError
from cul_core.methods.base import StepContext
from cul_core.methods.conabl import ConAbl, ConAblConfig
from cul_core.training import _first_token_blocked, run_step


def context_for(bundle, concept, anchor_prompts, latents, previous=()):
    from cul_core.config import TrainingConfig

    return StepContext(bundle, (concept,), (), previous, anchor_prompts, latents, {}, {}, TrainingConfig(batch_size=2), lambda p: None)


def test_loss_is_zero_when_student_equals_teacher_on_equal_prompts_and_four_times_the_element_mean_else(random_bundle):
    method = ConAbl(ConAblConfig())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    method.prepare(context_for(random_bundle, Concept("Lava"), ("a star",), latents))

    def student(noisy, timesteps, embeddings):
        return 3 * noisy

    def teacher(noisy, timesteps, embeddings):
        return noisy

    generator = torch.Generator().manual_seed(1)
    assert method.loss(student, student, generator).total == 0
    state = generator.get_state()
    seen = []
    loss = method.loss(lambda z, t, e: seen.append(z) or 3 * z, teacher, generator).total
    assert torch.allclose(loss, 4 * (2 * seen[0]).square().mean())
    generator.set_state(state)
    assert method.loss(student, teacher, generator).total == loss


def test_anchor_prompts_that_mention_the_target_or_an_earlier_one_are_dropped(random_bundle):
    method = ConAbl(ConAblConfig())
    prompts = ("a star", "a Lava star", "a denim house")
    method.prepare(context_for(random_bundle, Concept("Lava"), prompts, torch.zeros(3, 4, 8, 8), (Concept("Denim"),)))
    assert {index for index, _ in method._pairs} == {0}


def test_blocked_start_token_takes_no_part_in_the_weights_gradient():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False)
    tokens, seen = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    with _first_token_blocked([layer]):
        (layer(tokens) * seen).sum().backward()
    # dL/dW = sum over tokens i >= 1 of delta_i c_i^T, delta_i = seen_i
    assert torch.allclose(layer.weight.grad, torch.einsum("bio,bid->od", seen[:, 1:], tokens[:, 1:]), atol=1e-6)
    layer.weight.grad = None
    with _first_token_blocked([layer]):
        (layer(tokens[:, :1]) * seen[:, :1]).sum().backward()
    assert layer.weight.grad.abs().max() == 0
    assert not layer._forward_hooks


def test_training_brings_the_target_prompt_to_the_teachers_anchor_prediction(random_model, random_bundle, bundles, anchors, make_request):
    _, report = run_step(
        random_model, make_request(iterations=30, learning_rate=1e-2, batch_size=4), store=anchors, bundles=bundles["random"]
    )
    losses = torch.tensor(report.losses)
    assert losses[-8:].mean() < 0.5 * losses[:8].mean()


def test_teacher_options_differ_only_after_the_first_update(random_model, bundles, anchors, make_request):
    losses = {}
    for teacher in ("start", "pretrained", "student"):
        request = make_request(method=ConAblConfig(teacher=teacher), iterations=3, learning_rate=3e-2)
        losses[teacher] = run_step(random_model, request, store=anchors, bundles=bundles["random"])[1].losses
    assert losses["start"] == losses["pretrained"]
    assert losses["start"][0] == losses["student"][0] and losses["start"][2] != losses["student"][2]


def test_anchor_prompts_that_do_not_say_the_anchor_are_refused(random_bundle):
    method = ConAbl(ConAblConfig())
    concept = Concept("dragonfly", "object", "zebra")
    with pytest.raises(ConceptError, match="No anchor prompt can be turned into one for 'dragonfly'; add prompts that name its anchor"):
        method.prepare(context_for(random_bundle, concept, ("a house", "a cat"), torch.zeros(2, 4, 8, 8)))
