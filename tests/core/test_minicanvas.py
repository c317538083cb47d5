"""The world, its tokenizer, and the shipped weights: the bars they were trained to."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cul_core.minicanvas import models
from cul_core.minicanvas.family import MINI
from cul_core.minicanvas.judge import Judge, take
from cul_core.minicanvas.render import render, render_background
from cul_core.minicanvas.suites import STYLE_SUITE
from cul_core.minicanvas.training.figures import autoencoder_figures
from cul_core.minicanvas.training.tokenizer_build import learn_merges
from cul_core.minicanvas.training.train import worthless_pictures
from cul_core.minicanvas.world import (
    EVALUATION_TEMPLATE,
    OBJECTS,
    PLAIN,
    REQUEST_ORDERS,
    STYLE_LABELS,
    STYLES,
    all_texts,
    caption,
    styles_in,
)
from cul_core.models.sampling import SamplerConfig, generator_for, sample_latents


def test_the_world_has_ten_objects_and_three_groups_that_share_every_family():
    assert len(OBJECTS) == 10 and len(STYLES) == 36
    families = {style.family for style in STYLES}
    assert len(families) == 12
    for group in ("forget", "declared", "hidden"):
        assert {style.family for style in STYLES if style.group == group} == families
    for order in REQUEST_ORDERS.values():
        assert sorted(order) == sorted(styles_in("forget"))


def test_no_description_says_a_styles_name():
    for style in STYLES:
        assert not any(
            other.display_name.lower() in text for other in STYLES for text in style.descriptions
        ), style.name


def test_a_picture_repeats_with_its_random_state_and_differs_between_styles_objects_and_states():
    first = render("cat", "Lava", random.Random(3))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, render("cat", "Lava", random.Random(3)))
    for other in (
        render("cat", "Lava", random.Random(4)),
        render("cup", "Lava", random.Random(3)),
        render("cat", "Aurora", random.Random(3)),
    ):
        assert np.abs(first.astype(int) - other).mean() > 2
    assert all(render_background(style, random.Random(0)).std() >= 0 for style in STYLE_LABELS)


def test_captions_name_describe_or_stay_empty_in_the_intended_shares():
    rng = random.Random(0)
    texts = [caption("Neon_Cyan", "cat", rng) for _ in range(4000)]
    empty = sum(not text for text in texts) / 4000
    named = sum("neon" in text.lower() for text in texts) / 4000
    assert empty == pytest.approx(0.10, abs=0.02)
    assert 1 - empty - named == pytest.approx(0.27, abs=0.03)
    assert any("Neon_Cyan" in text for text in texts) and any("Neon Cyan" in text for text in texts)


def test_merges_make_every_word_one_token():
    merges = learn_merges(["lower", "low", "newest"])
    assert "".join(merges[-1]).endswith("</w>")
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(MINI.tokenizer_folder))
    words = {word.strip(".,").lower() for text in all_texts() for word in text.split()} - {""}
    assert [word for word in words if len(tokenizer(word).input_ids) != 3] == []
    assert tokenizer("").input_ids == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert len(tokenizer("naïve ☃ text").input_ids) > 5


def test_shipped_files_are_small_and_carry_the_figures_of_their_run_above_the_bars():
    assert models.CHECKPOINT_PATH.stat().st_size + models.CLASSIFIER_PATH.stat().st_size <= 20e6
    with safe_open(models.CHECKPOINT_PATH, "pt") as file:
        figures = json.loads(file.metadata()["minicanvas_figures"])
    assert figures["autoencoder"]["psnr"] >= 26 and figures["autoencoder"]["psnr_worst"] >= 20
    sampling = figures["sampling"]
    assert (
        sampling["style_by_name"] >= 97
        and sampling["object_by_name"] >= 96
        and sampling["style_by_description"] >= 90
    )


def test_the_shipped_autoencoder_holds_the_bars_on_fresh_renderings(shipped_network):
    class Shipped:
        def encode(self, images):
            return shipped_network.autoencoder.encode(images * 2 - 1).latents

        decode = shipped_network.decode

    figures = autoencoder_figures(Shipped(), seed=77, per_cell=1, every=3)
    assert figures["psnr"] >= 26 and figures["psnr_worst"] >= 20


def test_the_compact_decoder_computes_what_the_full_one_does(shipped_network):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = ((shipped_network.autoencoder.decode(latents).sample + 1) / 2).clamp(0, 1)
    assert torch.allclose(shipped_network.decode(latents), full, atol=1e-4)
    compact, wide = (
        sum(p.numel() for p in m.parameters())
        for m in (shipped_network._decoder, shipped_network.autoencoder.decoder)
    )
    assert compact < 0.8 * wide


def test_the_shipped_model_draws_what_it_is_asked(shipped_network, shipped_model):
    shots = [shot for shot in STYLE_SUITE.shots([]) if shot.object in ("cat", "boat", "flower")]
    verdicts = Judge()(take(shipped_network, shipped_model, shots, seed=123))
    assert np.mean([v.style == s.style for s, v in zip(shots, verdicts, strict=True)]) >= 0.93
    assert np.mean([v.object == s.object for s, v in zip(shots, verdicts, strict=True)]) >= 0.90


def test_a_picture_is_the_same_in_any_company(shipped_network, shipped_model):
    shots = STYLE_SUITE.shots(["Lava"])[::13]
    together = take(shipped_network, shipped_model, shots, seed=5)
    alone = take(shipped_network, shipped_model, [shots[7], shots[2]], seed=5)
    assert torch.equal(alone, together[[7, 2]])


def test_the_classifier_knows_fresh_renderings():
    rng = random.Random("fresh")
    cells = [(style, name) for style in STYLE_LABELS for name in OBJECTS]
    pictures = (
        torch.from_numpy(np.stack([render(name, style, rng) for style, name in cells]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )
    verdicts = Judge()(pictures)
    assert np.mean([(v.style, v.object) == cell for v, cell in zip(verdicts, cells, strict=True)]) >= 0.97


def test_the_classifier_rejects_noise_grey_and_bare_backgrounds():
    generator = torch.Generator().manual_seed(9)
    noise = torch.rand(20, 3, 64, 64, generator=generator)
    grey = torch.linspace(0.1, 0.9, 20)[:, None, None, None].expand(-1, 3, 64, 64)
    bare = np.stack([render_background(style, random.Random(1)) for style in STYLE_LABELS])
    backgrounds = torch.from_numpy(bare).permute(0, 3, 1, 2).float() / 255
    rejected = [
        np.mean([verdict.object == "" for verdict in Judge()(pictures)])
        for pictures in (noise, grey, backgrounds)
    ]
    assert rejected[0] == 1 and rejected[1] >= 0.95 and rejected[2] >= 0.9
    assert all(verdict.style == "" for verdict in Judge()(noise))


def test_the_classifier_rejects_most_pictures_of_a_deliberately_ruined_model(shipped_network):
    generator = torch.Generator().manual_seed(4)
    ruined = {
        name: p.data + 0.8 * p.data.std() * torch.randn(p.shape, generator=generator)
        for name, p in shipped_network.weights("all").items()
        if p.dim() > 1
    }
    prompts = [EVALUATION_TEMPLATE.format(object=name, style="Lava") for name in OBJECTS] * 2
    with shipped_network.with_weights(ruined):
        latents = sample_latents(
            shipped_network, prompts, [generator_for(0, "ruined", i) for i in range(20)], SamplerConfig()
        )
    verdicts = Judge()(shipped_network.decode(latents))
    assert np.mean([verdict.object == "" for verdict in verdicts]) >= 0.9
    assert np.mean([verdict.style == "Lava" and verdict.object in OBJECTS for verdict in verdicts]) <= 0.1


def test_worthless_pictures_are_of_five_kinds_and_in_range():
    pictures = torch.rand(10, 3, 64, 64)
    worthless = worthless_pictures(10, pictures, torch.Generator().manual_seed(0))
    assert worthless.shape == (10, 3, 64, 64) and 0 <= worthless.min() and worthless.max() <= 1
    # a puzzle keeps its pixels
    assert math.isclose(worthless[3].mean().item(), pictures[3].mean().item(), rel_tol=1e-4)


def test_plain_is_the_last_style_label():
    assert STYLE_LABELS[-1] == PLAIN and len(STYLE_LABELS) == 37
