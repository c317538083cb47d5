"""Memorized pictures: what counts as a copy, which captions are forgotten and which are anchors, and the
request they make."""

from dataclasses import replace

import pytest
import torch

from cul_core.audits.memorization import (
    MEMORIZATION,
    MemorizationConfig,
    captions_without_copies,
    copy_rates,
    embedding_cosine,
    memorization_request,
    pixel_correlation,
    read_image,
    read_paraphrases,
    sorted_captions,
)
from cul_core.base.errors import Cancelled, ConceptError
from cul_core.cli import main
from cul_core.concepts.concept import Concept
from cul_core.methods.conabl import ConAblConfig
from cul_core.models.sampling import SamplerConfig, generator_for, sample_latents
from cul_core.output.charts import to_image
from cul_core.store.anchors import AnchorStore

CAPTION = "A house image in Lava style."
QUICK = replace(
    MEMORIZATION,
    anchor_count=4,
    anchor_sampler=SamplerConfig(steps=4),
    training=replace(MEMORIZATION.training, batch_size=2),
)
TWO = MemorizationConfig(pictures=2, fewest_anchors=2)


@pytest.fixture(scope="module")
def original(shipped_network):
    return shipped_network.decode(
        sample_latents(shipped_network, [CAPTION], [generator_for(9)], SamplerConfig(steps=4))
    )[0]


def test_pixel_correlation_is_blind_to_size_brightness_and_contrast_and_not_to_place():
    original = torch.zeros(3, 64, 64)
    original[:, :, :32] = 1
    similarity = pixel_correlation(original)
    larger, dim, turned = torch.zeros(3, 128, 128), 0.2 + 0.3 * original, original.rot90(1, (1, 2))
    larger[:, :, :64] = 1
    assert similarity(larger[None]).item() == pytest.approx(1, abs=1e-4)
    # equal up to a x + b: 1; negative: -1; a quarter turn agrees on half of the pixels: 0
    found = similarity(torch.stack([original, dim, 1 - original, turned]))
    assert torch.allclose(found, torch.tensor([1.0, 1.0, -1.0, 0.0]), atol=1e-4)


def test_embedding_cosine_compares_what_a_network_sees():
    def embed(pictures):
        return torch.stack([pictures[:, 0].mean((1, 2)), pictures[:, 1].mean((1, 2))], 1)

    red, both = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    red[0], both[:2] = 1, 1
    # vectors (1, 0) and (1, 1): cosine 1 / sqrt(2)
    assert torch.allclose(
        embedding_cosine(red, embed)(torch.stack([red, both])), torch.tensor([1.0, 0.5**0.5])
    )


def test_captions_that_copy_are_targets_and_the_least_memorized_of_the_others_are_anchors():
    rates = {
        "Ann at sea": 1.0,
        "a": 0.3,
        "b": 0.6,
        "c": 0.0,
        "d": 0.31,
        "e": 0.59,
        "f": 0.1,
        "g": 0.1,
        "print of Ann at Sea": 0.2,
    }
    concepts, anchors = sorted_captions("Ann at sea", rates, MemorizationConfig(fewest_anchors=4))
    assert anchors == ("c", "f", "g", "a")
    assert concepts == (Concept("Ann at sea", "memorized", "c"), Concept("b", "memorized", "c"))
    assert sorted_captions("Ann at sea", rates, MemorizationConfig(fewest_anchors=1, most_anchors=2))[1] == (
        "c",
        "f",
    )


def test_too_few_anchors_and_a_caption_that_is_not_memorized_are_refused():
    with pytest.raises(
        ConceptError, match="Only 1 of 2 paraphrases of 'Ann' can be anchors, where 5 are needed.*at most 30%"
    ):
        sorted_captions("Ann", {"Ann": 0.9, "a": 0.1, "b": 0.5})
    with pytest.raises(
        ConceptError, match="'Ann' draws the memorized image in only 20% of its images.*check the caption"
    ):
        sorted_captions("Ann", {"Ann": 0.2, "a": 0.1})


def test_rate_of_a_caption_does_not_depend_on_the_others(random_network):
    def similarity(pictures):
        return (pictures[:, 0].mean((1, 2)) * 1e6) % 1

    def rates(*prompts):
        return copy_rates(
            random_network, prompts, similarity, MemorizationConfig(pictures=5), SamplerConfig(steps=1), 0
        )

    both = rates("a star", "a cat", "a star")
    assert [*both] == ["a star", "a cat"] and both["a cat"] == rates("a cat")["a cat"]
    assert set(both.values()) <= {0, 0.2, 0.4, 0.6, 0.8, 1}


def test_anchor_pictures_that_are_copies_are_drawn_by_another_caption(random_model, random_network):
    anchors, sampler, config = ("a star", "a cat", "a cup"), SamplerConfig(steps=1), MemorizationConfig()

    def pictures_of(prompts):
        latents = AnchorStore().anchor_latents(random_model.source, random_network, prompts, 6, sampler, 3)
        return random_network.decode(latents)

    in_turn = [anchors[i % 3] for i in range(6)]
    copies = pictures_of(in_turn)[:2]

    def similarity(pictures):
        return 1 - (pictures[:, None] - copies[None]).abs().amax((2, 3, 4)).amin(1) * 1e4

    prompts = captions_without_copies(random_network, anchors, similarity, config, sampler, 6, 3)
    assert list(prompts) == ["a cat", "a cup", *in_turn[2:]]
    assert (similarity(pictures_of(prompts)) <= 0.5).all() and (similarity(copies) > 0.5).all()
    with pytest.raises(
        ConceptError,
        match="6 of 6 anchor images are copies of the memorized one whichever of the 3 anchors",
    ):
        captions_without_copies(
            random_network, anchors, lambda pictures: torch.ones(len(pictures)), config, sampler, 6, 3
        )


def test_memorized_picture_is_forgotten_by_all_weights_with_the_paraphrases_that_draw_it(
    original, shipped_model, shipped_network, networks
):
    paraphrases = ("a house", "In Lava style, a picture of a house", "an image of a house")
    request, rates = memorization_request(
        shipped_network, CAPTION, paraphrases, pixel_correlation(original), seed=5, chosen=QUICK, config=TWO
    )
    assert rates == {
        CAPTION: 1.0,
        "a house": 0.0,
        "In Lava style, a picture of a house": 1.0,
        "an image of a house": 0.0,
    }
    assert [(concept.target, concept.kind) for concept in request.concepts] == [
        (CAPTION, "memorized"),
        (paraphrases[1], "memorized"),
    ]
    assert request.anchor_prompts == ("a house", "an image of a house") * 2 and request.anchor_count == 4
    assert request.method == ConAblConfig(teacher="pretrained", preservation=1.0)
    assert (request.training.group, request.training.seed) == ("full", 5)


def test_drawing_pictures_to_compare_can_be_stopped(original, shipped_network):
    def stop():
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        memorization_request(
            shipped_network,
            CAPTION,
            ("a house",),
            pixel_correlation(original),
            seed=0,
            chosen=QUICK,
            config=TWO,
            check=stop,
        )


def test_picture_and_paraphrases_are_read_from_files(tmp_path):
    picture = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0))
    to_image(picture).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") - picture).abs().max() <= 0.5 / 255 + 1e-6
    (tmp_path / "p.txt").write_text("a boat\n\n  ein Böötchen \n", encoding="utf-8")
    assert read_paraphrases(tmp_path / "p.txt") == ["a boat", "ein Böötchen"]
    for read, name in (
        (read_image, "p.txt"),
        (read_image, "none.png"),
        (read_paraphrases, "a.png"),
        (read_paraphrases, "none.txt"),
    ):
        with pytest.raises(ConceptError, match=f"'{name}' cannot be read"):
            read(tmp_path / name)


def test_command_forgets_a_memorized_picture(original, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cul_core.audits.memorization.MEMORIZATION", QUICK)
    monkeypatch.setattr("cul_core.audits.memorization.MemorizationConfig", lambda: TWO)
    to_image(original).save(tmp_path / "a.png")
    (tmp_path / "p.txt").write_text("a house\nan image of a house\n", encoding="utf-8")
    command = ["unlearn", CAPTION, "--picture", str(tmp_path / "a.png"), "--iterations", "1"]
    assert main(command) == 2
    assert "needs its caption as the only target, --picture and --paraphrases" in capsys.readouterr().err
    files = ["--paraphrases", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out.safetensors")]
    assert main([*command, *files]) == 0
    out = capsys.readouterr().out
    assert f"100% copies: {CAPTION}\n  0% copies: a house" in out and f"forgot {CAPTION} in" in out
    assert (tmp_path / "out.safetensors").is_file()
