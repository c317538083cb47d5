"""The large world of MiniCanvas: its vocabulary, pictures, suites, and a training that goes on."""

import json
import random
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from cul_core.minicanvas import models
from cul_core.minicanvas.benchmark import _hidden_apart
from cul_core.minicanvas.family import FAMILY_OF, MINI_LARGE
from cul_core.minicanvas.judge import Judge, take
from cul_core.minicanvas.large import GRID, LARGE, PATTERNS
from cul_core.minicanvas.large_render import render
from cul_core.minicanvas.suites import SUITES, suite_of
from cul_core.minicanvas.training.resumable import Trained, progress, train
from cul_core.minicanvas.training.train_large import (
    random_caption,
    random_cells,
    renderings,
    result_of,
    resume_from_shipped,
    trained_autoencoder,
    unet_rate,
)
from cul_core.minicanvas.world import PLAIN, SMALL
from cul_core.models.load_diffusers import load_network, load_tokenizer
from cul_core.output.checkpoint import open_model

LARGE_SUITES = [suite for suite in SUITES.values() if suite.world is LARGE]


def test_every_family_has_all_three_groups_and_four_styles():
    assert len(LARGE.styles) == 112 and len(LARGE.objects) == 16 and len(LARGE.people) == 8
    for family in PATTERNS:
        groups = [style.group for style in LARGE.styles if style.family == family]
        assert sorted(groups) == ["declared", "forget", "forget", "hidden"], family


def test_a_near_neighbour_differs_by_colour_alone_or_by_period_alone():
    place = {
        name: (family, *GRID[i])
        for family, pattern in PATTERNS.items()
        for i, name in enumerate(pattern.names)
    }
    for name, (by_colour, by_period) in LARGE.near.items():
        family, period, palette = place[name]
        assert place[by_colour] == (family, period, 1 - palette)
        assert place[by_period] == (family, 1 - period, palette)
        assert name in LARGE.near[by_colour] and name in LARGE.near[by_period]


def words_of(texts):
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def test_names_share_no_word_with_descriptions_and_no_two_styles_a_description():
    names = words_of([style.name for style in LARGE.styles] + [person.name for person in LARGE.people])
    described = [text for entry in (*LARGE.styles, *LARGE.people) for text in entry.descriptions]
    synonyms = [text for others in LARGE.synonyms.values() for text in others]
    assert names & words_of([*described, *synonyms, *LARGE.objects]) == set()
    assert len(set(described)) == len(described) == 4 * 112 + 2 * 8


def test_a_paraphrase_has_none_of_the_describing_words():
    glue = {
        "a",
        "of",
        "on",
        "in",
        "with",
        "the",
        "over",
        "and",
        "around",
        "as",
        "by",
        "from",
        "middle",
        "before",
    }
    for style in LARGE.styles:
        description, paraphrase = (words_of([text]) for text in style.descriptions[:2])
        assert description & paraphrase <= glue, style.name


@pytest.mark.parametrize("world", [SMALL, LARGE], ids=lambda world: world.name)
def test_every_word_of_a_world_is_one_token(world):
    tokenizer = load_tokenizer(FAMILY_OF[world.name])
    assert [word for word in words_of(world.texts()) if len(tokenizer(word).input_ids) != 3] == []
    assert len(tokenizer) == FAMILY_OF[world.name].config("text_encoder")["vocab_size"]


def test_no_caption_is_cut():
    rng, tokenizer = random.Random(0), load_tokenizer(MINI_LARGE)
    longest = max(
        len(tokenizer(LARGE.caption(style, LARGE.wording(subjects, rng), rng)).input_ids)
        for style in LARGE.style_labels
        for subjects in [*([name] for name in LARGE.subjects), ("umbrella", "crown")]
    )
    assert longest <= 28  # what the text encoder trains on


def test_a_picture_repeats_with_its_random_state():
    for subjects in (["cat"], ["Otto_Brask"], ["star", "cat"], []):
        first = render(subjects, "Awning", random.Random(3))
        assert first.shape == (64, 64, 3) and first.dtype == np.uint8
        assert np.array_equal(first, render(subjects, "Awning", random.Random(3)))
        if subjects:
            assert not np.array_equal(first, render(subjects, "Awning", random.Random(4)))


def difference(subjects, style, others, other_style):
    first, second = (
        render(names, name, random.Random(5)).astype(int)
        for names, name in ((subjects, style), (others, other_style))
    )
    return np.abs(first - second).mean()


def test_near_neighbours_look_different():
    assert [
        (name, near)
        for name, neighbours in LARGE.near.items()
        for near in neighbours
        if difference(["cat"], name, ["cat"], near) < 4
    ] == []


@pytest.mark.parametrize("style", ["Awning", "Etching", "Synthwave", PLAIN])
def test_people_and_objects_look_different(style):
    assert [
        (one, other)
        for i, one in enumerate(LARGE.subjects)
        for other in LARGE.subjects[:i]
        if difference([one], style, [other], style) < 1
    ] == []


def test_two_objects_stand_from_left_to_right():
    star_left = render(["star", "cat"], "Chess_Board", random.Random(1))
    bare = render([], "Chess_Board", random.Random(1))
    alone = np.abs(star_left.astype(int) - bare).mean((0, 2)) > 20
    assert alone[:28].any() and alone[36:].any()


def test_captions_name_describe_and_join():
    rng = random.Random(0)
    pairs = [LARGE.wording(("star", "umbrella"), rng) for _ in range(300)]
    people = [LARGE.wording(["Otto_Brask"], rng) for _ in range(300)]
    assert "a star and an umbrella" in pairs and "a star and a parasol" in pairs
    assert 60 < sum("beard" in text for text in people) < 140 and "Otto Brask" in people
    assert LARGE.phrase("umbrella") == "an umbrella" and LARGE.phrase("Otto_Brask") == "Otto Brask"
    captions = [random_caption(("cat",), "Awning", rng) for _ in range(1000)]
    assert all(label[0] == len(LARGE.style_labels) for text, label in captions if not text)
    cat = LARGE.subjects.index("cat")
    assert all((label[1] == cat) == ("cat" in text or "kitten" in text) for text, label in captions)


@pytest.mark.parametrize("suite", LARGE_SUITES, ids=lambda suite: suite.name)
def test_a_suite_forgets_and_keeps_different_concepts_in_orders_of_their_own(suite):
    targets = set(suite.orders["a"])
    assert not targets & {*suite.declared, *suite.hidden} and not set(suite.declared) & set(suite.hidden)
    assert all(set(order) == targets for order in suite.orders.values())
    assert len({suite.orders[name] for name in "abcde"}) == 5
    assert suite.marks[-1] == suite.longest
    for target in suite.concepts(suite.orders["a"]):
        target.check_forgettable()


def test_an_order_of_styles_alternates_families():
    (suite,) = (suite for suite in LARGE_SUITES if suite.domain == "style")
    for order in suite.orders.values():
        first = [LARGE.style_by_name[name].family for name in order[:28]]
        assert len(set(first)) == 28


def test_prompts_of_an_evaluation_say_names_descriptions_and_people():
    styles, objects, people = LARGE_SUITES
    prompts = {shot.prompt for shot in styles.shots(["Chess_Board"])}
    assert "An image of a star in Chess Board style." in prompts
    assert "An image of a star on big black squares." in prompts
    assert "An image of Otto Brask in Awning style." in {s.prompt for s in people.shots(["Otto_Brask"])}
    assert suite_of(["Chess Board", "cat"], LARGE) == (styles, ["Chess_Board"])
    assert suite_of(["Cat"], LARGE) == (objects, ["cat"])
    assert suite_of(["otto brask"], LARGE) == (people, ["Otto_Brask"])


def test_hidden_near_neighbours_are_reported_apart_from_the_others():
    styles = LARGE_SUITES[0]
    near = styles.near(["Candy_Stripes"])
    assert set(near) <= set(LARGE.near["Candy_Stripes"]) and set(near) <= set(styles.hidden)
    target = next(name for name in styles.orders["a"] if styles.near([name]))
    figures = {name: {"style": 0.0 if name in styles.near([target]) else 100.0} for name in styles.hidden}
    assert _hidden_apart(styles, [target], figures) == {"ira_hidden_apart": {"near": 0.0, "other": 100.0}}
    assert _hidden_apart(SUITES["styles"], ["Lava"], {}) == {}


# --- training


def fresh():
    torch.manual_seed(0)
    return Trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))


def run(trained, path, steps):
    def loss_of(draws):
        inputs = torch.randn(8, 3, generator=draws.generator) * draws.rng.random()
        return (trained.module(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    train(trained, path, loss_of, lambda step: 1e-2, seed=4, steps=steps)
    return trained


def test_a_training_that_went_on_has_the_state_of_one_that_never_stopped(tmp_path):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = run(fresh(), tmp_path / "whole" / "toy.state", 7)
    run(fresh(), tmp_path / "parts" / "toy.state", 3)
    parts = run(fresh(), tmp_path / "parts" / "toy.state", 7)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, parts.module.state_dict()[name]), name
        assert torch.equal(whole.average[name], parts.average[name]), name
    moments = (trained.optimizer.state_dict()["state"] for trained in (whole, parts))
    for one, other in zip(*(entry.values() for entry in moments), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert progress(tmp_path / "parts" / "toy.state")["step"] == 7


def test_a_state_without_moments_starts_the_optimizer_anew(tmp_path):
    trained = fresh()
    trained.step = trained.fresh_at = 3
    trained.save(tmp_path / "toy.state")
    goes_on = run(fresh(), tmp_path / "toy.state", 4)
    assert goes_on.step == 4 and goes_on.fresh_at == 3
    assert all(entry["step"] == 1 for entry in goes_on.optimizer.state_dict()["state"].values())


def test_the_learning_rate_rises_after_a_fresh_start_and_has_no_end():
    rates = [unet_rate(step, fresh_at=5000) for step in (5000, 5100, 5200, 8000, 20000)]
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[4] > 0.2 * rates[2]


# --- the shipped weights


@pytest.fixture(scope="module")
def large_network():
    return load_network(models.checkpoint_path("large"))


def test_the_shipped_files_are_small_and_say_what_they_reached_and_cost():
    paths = [path(world) for path in (models.checkpoint_path, models.classifier_path) for world in FAMILY_OF]
    assert sum(path.stat().st_size for path in paths) <= 40e6
    with safe_open(models.checkpoint_path("large"), "pt") as file:
        figures, cost = (
            json.loads(file.metadata()[f"minicanvas_{name}"]) for name in ("figures", "training")
        )
    for wording in ("name", "description", "paraphrase"):
        assert {f"{what}_by_{wording}" for what in ("style", "object", "person")} <= figures[
            "sampling"
        ].keys()
    assert all(stage["cpu_seconds"] > 0 and stage["loss_curve"] for stage in cost.values())


def test_the_shipped_file_is_recognized_and_draws_styles_by_name(large_network):
    assert large_network.family is MINI_LARGE
    untouched = open_model(models.checkpoint_path("large"))
    shots = LARGE_SUITES[0].shots([], across=["star"])[::3]
    verdicts = Judge(world=LARGE)(take(large_network, untouched, shots, seed=1))
    assert np.mean([v.style == s.style for s, v in zip(shots, verdicts, strict=True)]) >= 0.75


def test_the_classifier_knows_fresh_renderings_and_rejects_noise():
    rng = random.Random("fresh")
    cells = [(style, LARGE.subjects[i % 24]) for i, style in enumerate(LARGE.style_labels)]
    judge = Judge(world=LARGE)
    verdicts = judge(renderings([((subject,), style) for style, subject in cells], rng))
    assert np.mean([(v.style, v.object) == cell for v, cell in zip(verdicts, cells, strict=True)]) >= 0.9
    noise = judge(torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(9)))
    assert {(verdict.style, verdict.object) for verdict in noise} == {("", "")}


def test_the_classifier_knows_most_of_two_objects():
    rng = random.Random("pairs")
    cells = [(tuple(rng.sample(LARGE.objects, 2)), style) for style in LARGE.style_labels]
    verdicts = Judge(world=LARGE)(renderings(cells, rng))
    known = [
        name in v.object.split(" and ") for v, (pair, _) in zip(verdicts, cells, strict=True) for name in pair
    ]
    assert np.mean(known) >= 0.75


def test_without_a_work_folder_training_goes_on_from_the_shipped_weights(tmp_path, large_network):
    resume_from_shipped(tmp_path)
    with safe_open(models.checkpoint_path("large"), "pt") as file:
        cost = json.loads(file.metadata()["minicanvas_training"])
    assert {path.stem for path in tmp_path.glob("*.state")} == cost.keys()
    numbers = progress(tmp_path / "unet.state")
    assert numbers["step"] == numbers["fresh_at"] == cost["unet"]["step"] > 0
    unet = result_of(tmp_path, "unet")
    assert all(torch.equal(unet[k], v) for k, v in large_network.unet.float().state_dict().items())
    images = renderings(random_cells(2, random.Random(0)), random.Random(0))
    latents = trained_autoencoder(tmp_path).encode(images)
    shipped = large_network.autoencoder.encode(images * 2 - 1).latents
    assert torch.allclose(latents, shipped, atol=1e-4)
