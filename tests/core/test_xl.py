"""Stable Diffusion XL's architecture, small: every call of its UNet carries the pooled text and the picture's size."""

from contextlib import contextmanager

import pytest
import torch

from cul_core.anchors import AnchorStore
from cul_core.families import SDXL
from cul_core.methods import METHODS
from cul_core.methods.conabl import ConAblConfig
from cul_core.methods.esd import ESDConfig
from cul_core.params import group_names
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.training import Callbacks, run_step

SHORT = dict.fromkeys(("esd", "distillation"), {"trajectories": 2, "trajectory_steps": 4}) | {"selft": {"states": 3}}
ESD = ESDConfig(**SHORT["esd"])


@pytest.fixture(scope="session")
def xl_anchors():
    return AnchorStore()


@pytest.fixture
def step(xl_model, xl_bundles, xl_anchors):
    return lambda request, **options: run_step(xl_model, request, store=xl_anchors, bundles=xl_bundles, **options)


@contextmanager
def unet_calls(bundle):
    """(latents, keyword arguments) of every call."""
    seen = []
    handle = bundle.unet.register_forward_pre_hook(lambda module, inputs, named: seen.append((inputs[0], named)), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def configs(registry):
    return [entry.config(**SHORT.get(entry.name, {})) for entry in registry if "sdxl" in entry.families]


@pytest.mark.parametrize(
    ("method", "regularizers"),
    [*((method, []) for method in configs(METHODS)), *((ESD, [regularizer]) for regularizer in configs(REGULARIZERS))],
    ids=lambda value: value.registry_name if not isinstance(value, list) else value[0].registry_name if value else "alone",
)
def test_methods_and_regularizers_train_it_and_change_only_their_group(method, regularizers, step, xl_bundle, make_request):
    edited, report = step(make_request(method=method, regularizers=regularizers))
    assert edited.edits and set(edited.edits) <= set(group_names(xl_bundle.unet, "kv"))
    assert all(torch.isfinite(torch.tensor(report.losses))) and len(report.losses) == 3


def test_every_call_of_the_network_gets_each_prompts_own_pooled_vector_and_the_pictures_size(step, xl_bundle, make_request):
    callbacks = Callbacks(preview_prompts=("a cat",), preview_every=3)
    regularizers = [SelFTConfig(states=2), ProjectionConfig()]
    with unet_calls(xl_bundle) as seen:
        step(make_request("Lava", method=ConAblConfig(), regularizers=regularizers, seed=1), callbacks=callbacks)
        step(make_request("Lava", method=ESD), callbacks=callbacks)
    known = xl_bundle.encode(list(xl_bundle._prompts))
    assert len(known) > 5 and len(set(map(tuple, known.pooled.tolist()))) == len(known)
    used = set()
    for latents, named in seen:
        text, added = named["encoder_hidden_states"], named["added_cond_kwargs"]
        # height, width, top, left, target height, target width
        assert added["time_ids"].tolist() == len(latents) * [[1024, 1024, 0, 0, 1024, 1024]]
        assert added["text_embeds"].shape == (len(latents), 32) and len(text) == len(latents)
        for row, pooled in zip(text, added["text_embeds"], strict=True):
            (number,) = (known.text == row).all(-1).all(-1).nonzero().flatten().tolist()
            assert torch.equal(pooled, known.pooled[number])
            used.add(number)
    assert len(used) > 5 and list(xl_bundle._prompts).index("") in used


def test_pooled_text_and_size_are_as_wide_as_the_full_network_reads_them():
    assert SDXL.config("text_encoder_2")["projection_dim"] == 1280
    assert SDXL.config("unet")["projection_class_embeddings_input_dim"] == 1280 + 6 * SDXL.config("unet")["addition_time_embed_dim"]


def test_erasing_lowers_the_loss_and_changes_only_its_group(step, xl_bundle, make_request):
    method = ESDConfig(**SHORT["esd"], erase_from="a house")
    edited, report = step(make_request("Denim", method=method, iterations=20, batch_size=4, learning_rate=3e-3, group="attn2"))
    losses = torch.tensor(report.losses)
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()
    assert edited.edits and set(edited.edits) <= set(group_names(xl_bundle.unet, "attn2"))


def test_a_prompt_is_the_first_encoders_rows_beside_the_seconds(xl_bundle):
    ids = xl_bundle.token_ids(["a cat", ""])
    assert ids[1].tolist() == [966] + 76 * [967]
    first, second = xl_bundle.text_encoders
    padded = ids.clone()
    padded[0, 4:], padded[1, 2:] = 0, 0  # start, a, cat, end; start, end
    with torch.no_grad():
        one, other = first(ids, output_hidden_states=True), second(padded, output_hidden_states=True)
    encoded = xl_bundle.encode(["a cat", ""])
    rows = torch.cat([one.hidden_states[1], other.hidden_states[1]], -1)  # of two layers, after the first
    torch.testing.assert_close(encoded.text, rows)
    torch.testing.assert_close(encoded.pooled, other.text_embeds)
    assert encoded.text.shape == (2, 77, 48) and encoded[0].text.shape == (1, 77, 48)
