"""Closed-form methods: their algebra beside numpy's, the rows they take, and requests as a set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from short import SHORT

from cul_core.base.errors import ConceptError, ConfigError
from cul_core.concepts.concept import Concept
from cul_core.methods import METHODS
from cul_core.methods.null_space import NullSpaceConfig, apart, check_free
from cul_core.methods.trce_text import TRCETextConfig
from cul_core.methods.uce import UCEConfig
from cul_core.parts.subspace import complement_basis, orthonormal_basis
from cul_core.parts.text_maps import TextMap, damped, ridge_map
from cul_core.parts.text_rows import TEXT, TextRows
from cul_core.requests.resolve import Overrides, resolve
from cul_core.training.solved_chain import take_back
from cul_core.training.step import run_step

OUT, WIDTH = 7, 12
EYE = torch.eye(WIDTH, dtype=torch.float64)
KEPT = ("Navy Stripes", "Denim")
CAPTIONS = ("A star image.", "a house", "an image of a cat", "a picture of a boat")


SOLVED = [
    pytest.param(entry.config(**SHORT.get(entry.name, {})), id=entry.name)
    for entry in METHODS
    if entry.cls.solves_chain
]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    """Weight W (out, d), rows to forget, their goals, rows to keep; weights s_e and s_p, and lambda."""
    return random(OUT, WIDTH), random(3, WIDTH, seed=1), random(3, WIDTH, seed=2), random(4, WIDTH, seed=3)


def edited(weight, targets, goals, kept, ridge=0.5, erase=1.0, keep=1.0, free=None):
    metric = keep * kept.T @ kept + ridge * EYE
    return weight + ridge_map(erase**0.5 * targets, erase**0.5 * goals, metric, free).change(weight)


# --- ridge regression


@pytest.mark.parametrize(("erase", "keep", "ridge"), [(1, 1, 0.5), (4, 0.25, 1e-3)])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_edit_is_numpys_least_squares_solution(problem, erase, keep, ridge, rows):
    weight, _, _, kept = problem
    targets, goals = random(rows, WIDTH, seed=1), random(rows, WIDTH, seed=2)
    found = edited(weight, targets, goals, kept, ridge, erase, keep)
    scales = erase**0.5, keep**0.5, ridge**0.5
    system = torch.cat([s * x for s, x in zip(scales, (targets, kept, EYE), strict=True)])
    wanted = torch.cat([s * x @ weight.T for s, x in zip(scales, (goals, kept, EYE), strict=True)])
    expected = np.linalg.lstsq(system.numpy(), wanted.numpy(), rcond=None)[0].T
    assert np.linalg.norm(found.numpy() - expected) < 1e-8 * np.linalg.norm(expected)


def test_without_a_ridge_independent_rows_reach_their_goals_exactly(problem):
    weight, targets, goals, kept = problem
    found = edited(weight, targets, goals, kept, ridge=1e-9)
    torch.testing.assert_close(targets @ found.T, goals @ weight.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(kept @ found.T, kept @ weight.T, rtol=0, atol=1e-6)


def test_rows_that_are_their_own_goals_and_no_rows_change_no_bit(problem):
    weight, targets, _, kept = problem
    for rows in (targets, targets[:0]):
        assert edited(weight, rows, rows, kept).equal(weight)


def test_the_edit_has_the_factors_of_a_lora_whose_rank_is_the_number_of_rows(problem):
    weight, targets, goals, kept = problem
    found = ridge_map(targets, goals, kept.T @ kept + 0.5 * EYE)
    change = edited(weight, targets, goals, kept) - weight
    assert torch.linalg.matrix_rank(change) == 3
    up, down = (weight @ found.up).float(), found.down.float()
    assert up.shape == (OUT, 3) and down.shape == (3, WIDTH)
    torch.testing.assert_close(up @ down, change.float(), rtol=0, atol=1e-6)


def test_the_order_of_rows_changes_nothing(problem):
    weight, targets, goals, kept = problem
    order = [2, 0, 1]
    one = edited(weight, targets, goals, kept)
    torch.testing.assert_close(
        edited(weight, targets[order], goals[order], kept.flip(0)), one, rtol=1e-10, atol=1e-12
    )


def test_rows_outside_the_free_directions_keep_their_response_and_no_such_edit_has_a_lower_error(problem):
    weight, targets, goals, kept = problem
    free = complement_basis(orthonormal_basis(kept))
    found = ridge_map(targets, goals, 0.3 * EYE, free).change(weight)
    assert (found @ kept.T).abs().max() < 1e-12

    def error(change):
        return (targets @ (weight + change).T - goals @ weight.T).square().sum() + 0.3 * change.square().sum()

    others = [found + 1e-3 * random(OUT, free.shape[1], seed=seed) @ free.T for seed in range(20)]
    assert min(map(error, others)) > error(found)


def test_trces_stage_is_uces_edit_where_captions_know_nothing_and_one_row_counts(problem):
    """W' = (sum W v c^T / N + mu W K0) (sum c c^T / N + mu K0)^-1 with K0 = I is UCE's of lambda = N mu."""
    weight, targets, goals, kept = problem
    count, mu = len(targets), 0.02
    inverse = torch.linalg.inv(targets.T @ targets / count + mu * EYE)
    by_paper = (weight @ goals.T @ targets / count + mu * weight) @ inverse
    mean = count**-0.5
    found = weight + ridge_map(mean * targets, mean * goals, mu * EYE).change(weight)
    torch.testing.assert_close(found, by_paper, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        found, edited(weight, targets, goals, kept[:0], ridge=count * mu), rtol=1e-10, atol=1e-10
    )


# --- the rows of each method, on the shipped network


@pytest.fixture
def request_of(shipped_model):
    def make(config, *names, keep=KEPT, kind="style", anchor="", captions=None):
        concepts = [Concept(name, kind, anchor) for name in names]
        kept = [Concept(name, "style") for name in keep]
        overrides = Overrides(config, anchor_prompts=captions)
        return resolve("exact", shipped_model.family, concepts, kept, overrides)

    return make


@pytest.fixture
def step(shipped_model, request_of, networks):
    def run(config, *names, model=shipped_model, **values):
        return run_step(model, request_of(config, *names, **values), networks=networks["shipped"])

    return run


@pytest.fixture
def rows_at(shipped_network):
    def find(prompt, *places):
        """Rows (n, d): the numbers of own tokens, or `end`."""
        text, at = shipped_network.encode([prompt]).text[0].double(), shipped_network.content(prompt)
        return torch.stack([text[at.stop if place == "end" else at.start + place] for place in places])

    return find


def check_edits(network, edits, expected):
    """`expected` gives the change of a pretrained matrix in fp64."""
    assert edits.keys() == network.weights("text_readers").keys()
    for key, weight in network.exact(list(edits)).items():
        wanted = expected(weight.double())
        assert (edits[key] - wanted).norm() < 1e-5 * wanted.norm()


def test_uces_reference_maps_the_last_token_of_a_style_onto_art(step, shipped_network, rows_at):
    model, _ = step(UCEConfig(**UCEConfig.REFERENCE, ridge=0.7, keep_weight=2.0), "Candy Stripes")
    last = shipped_network.token_count("Candy Stripes") - 1
    target, goal = rows_at("Candy Stripes", last), rows_at("art", shipped_network.token_count("art") - 1)
    kept = torch.cat([rows_at(name, shipped_network.token_count(name) - 1) for name in KEPT])
    metric = torch.linalg.inv(target.T @ target + 2 * kept.T @ kept + 0.7 * torch.eye(len(target.T)).double())
    check_edits(shipped_network, model.edits, lambda weight: weight @ (goal - target).T @ target @ metric)


@pytest.mark.parametrize(("kind", "anchor"), [("style", ""), ("object", "flower")])
def test_uce_maps_all_tokens_and_eos_of_a_name(step, shipped_network, rows_at, kind, anchor):
    name = "Candy Stripes"
    model, _ = step(UCEConfig(erase_weight=3.0), name, kind=kind, anchor=anchor, keep=("Denim",))
    count = shipped_network.token_count(name)
    target = rows_at(name, *range(count), "end")
    token = rows_at(anchor, shipped_network.token_count(anchor) - 1 if anchor else "end")
    goal = torch.cat([token.expand(count, -1), rows_at(anchor, "end")])
    kept = rows_at("Denim", *range(shipped_network.token_count("Denim")), "end")
    metric = torch.linalg.inv(3 * target.T @ target + kept.T @ kept + 0.5 * torch.eye(len(target.T)).double())
    check_edits(shipped_network, model.edits, lambda weight: 3 * weight @ (goal - target).T @ target @ metric)


def test_uce_expands_a_name_into_five_more_prompts_of_its_kind(step):
    rank = {expand: step(UCEConfig(expand=expand), "Lava")[1].figures["rank"] for expand in (False, True)}
    assert rank[True] == 6 * rank[False]
    style, _ = step(UCEConfig(expand=True), "Lava", anchor="snow")
    thing, _ = step(UCEConfig(expand=True), "Lava", kind="object", anchor="snow")
    assert style.content_hash != thing.content_hash


def test_a_larger_ridge_changes_less(step):
    models = [step(UCEConfig(ridge=ridge), "Lava")[0] for ridge in (1e-3, 1, 1e3)]
    sizes = [sum(edit.square().sum() for edit in model.edits.values()) for model in models]
    assert sizes[0] > sizes[1] > 100 * sizes[2] > 0


def test_trce_maps_eos_rows_alone_as_its_formula_says(step, shipped_network, rows_at):
    model, _ = step(TRCETextConfig(keep_weight=0.05), "Lava", captions=CAPTIONS)
    prompts, goals = TextRows(shipped_network).prompts(Concept("Lava"), CAPTIONS, 15)
    assert len(prompts) == len(CAPTIONS) and sorted(goals) == sorted(CAPTIONS)
    c, v = (torch.cat([rows_at(prompt, "end") for prompt in side]) for side in (prompts, goals))
    kept = [Concept(name) for name in KEPT]
    captions = [*TextRows(shipped_network).sentences(kept), *CAPTIONS]
    text = shipped_network.encode(captions).text[:, 1:].double().flatten(0, 1)
    moment = damped(text.T @ text / len(captions), 1e-9)
    inverse = torch.linalg.inv(c.T @ c / len(c) + 0.05 * moment)
    check_edits(
        shipped_network,
        model.edits,
        lambda weight: (weight @ v.T @ c / len(c) + 0.05 * weight @ moment) @ inverse - weight,
    )


# --- what is held exactly

FEW = NullSpaceConfig(made_up=60)


def test_names_to_keep_keep_their_rows_in_fp32_and_the_target_does_not(step, shipped_network, rows_at):
    model, report = step(FEW, "Candy Stripes", "Lava")
    held = [
        rows_at(prompt, *range(shipped_network.token_count(prompt)), "end").float()
        for prompt in ("", *(Concept(name).prompt for name in KEPT))
    ]
    held = torch.cat([shipped_network.encode([""]).text[0, :1], *held])
    for key, weight in shipped_network.exact(list(model.edits)).items():
        new = weight + model.edits[key]
        assert ((new - weight) @ held.T).norm() < 1e-6 * (weight @ held.T).norm()
        target = rows_at("An image in the style of Lava", "end").float()
        assert ((new - weight) @ target.T).norm() > 0.05 * (weight @ target.T).norm()
    assert report.figures["rank"] == 2 and report.figures["largest_residue"] < 0.5
    width, count = held.shape[1], torch.linalg.matrix_rank(held.double(), rtol=1e-6).item()
    assert report.figures["expected_collateral"] == pytest.approx((2 / (width - count)) ** 0.5)
    assert report.figures["rank_there_is"] == (width - count) // 2


@pytest.mark.parametrize("wanted", [0.6, 0.9])
def test_a_wanted_residue_is_found(step, wanted):
    _, report = step(replace(FEW, residue=wanted), "Lava", "Arcade")
    residues = [report.figures[f"residue_of_{name}"] for name in ("Lava", "Arcade")]
    assert sum(residues) / 2 == pytest.approx(wanted, abs=1e-3)


def test_a_target_inside_the_span_of_a_prompt_is_refused_with_both_names():
    held = {"An image of Denim": random(2, WIDTH), "Frost": random(3, WIDTH, seed=1)}
    free = complement_basis(orthonormal_basis(torch.cat(list(held.values()))))
    inside = random(2, 2, seed=2) @ held["An image of Denim"]
    with pytest.raises(ConceptError, match="tells 'Lava' from its anchor lies inside.*'An image of Denim';"):
        check_free("Lava", inside, free, held)
    half = orthonormal_basis(inside)[:, :1].T + free[:, :1].T
    assert check_free("Lava", half, free, held) == pytest.approx(0.5**0.5)


def test_names_that_fill_all_directions_leave_no_target(step):
    names = [f"{a} {b} {c}" for a in "abcdefg" for b in "hijkl" for c in "mnop"]
    with pytest.raises(ConceptError, match="'Lava' from its anchor lies inside the span of the 141 prompts"):
        step(FEW, "Lava", keep=names)


def test_an_output_change_is_kept_apart_from_the_dominant_directions_of_earlier_ones():
    factor, down = random(20, WIDTH), random(3, WIDTH, seed=1)
    past = TextMap(random(WIDTH, 3, seed=2), down)
    left, values, _ = torch.linalg.svd(factor @ past.up @ past.down)
    count = int((values.square().cumsum(0) < 0.9 * values.square().sum()).sum()) + 1
    assert count < 3
    new = past.up[:, :1] + 0.1 * random(WIDTH, 1, seed=3)
    found = apart(new, past, factor, 0.3)
    inside = left[:, :count] @ left[:, :count].T @ factor @ new
    torch.testing.assert_close(factor @ found, factor @ new - inside, rtol=0, atol=1e-9)
    assert apart(new, past, factor, 1.0) is new


def test_overlap_lets_the_order_in_and_changes_the_first_request_not_at_all(step, networks):
    config = replace(FEW, overlap=0.0)
    one, _ = step(config, "Lava")
    assert one.content_hash == step(FEW, "Lava")[0].content_hash
    both, _ = step(config, "Arcade", model=one)
    other, _ = step(config, "Lava", model=step(config, "Arcade")[0])
    assert both.content_hash != other.content_hash
    left = take_back(both, ["Arcade"], networks=networks["shipped"])
    assert left.content_hash == one.content_hash


# --- the requests of a chain as a set, for every method that solves one


@pytest.mark.parametrize("config", SOLVED)
class TestSet:
    @pytest.fixture
    def chain(self, shipped_model, request_of, networks):
        def run(*requests, model=shipped_model):
            for request in requests:
                model, _ = run_step(model, request, networks=networks["shipped"])
            return model

        return run

    def test_any_order_gives_the_same_bits_and_what_is_taken_back_was_never_asked_for(
        self, config, chain, request_of, networks
    ):
        one = request_of(config, "Candy Stripes", "Neon Cyan")
        two = request_of(config, "Lava", keep=("Lime Dots", "Denim"))
        three = request_of(config, "cat", kind="object", anchor="house")
        whole, never = chain(one, two, three), chain(one, three)
        assert [record.targets for record in whole.history][1:] == [("Lava",), ("cat",)]
        assert chain(three, one, two).content_hash == whole.content_hash
        left = take_back(whole, ["lava"], networks=networks["shipped"])
        assert left.content_hash == never.content_hash
        assert left.history[-1].result == left.content_hash
        assert left.history[1].parent == left.history[0].result
        assert chain(two, model=left).content_hash == whole.content_hash
        fewer = take_back(left, ["Neon_Cyan"], networks=networks["shipped"])
        assert fewer.content_hash == chain(request_of(config, "Candy Stripes"), three).content_hash

    def test_requests_share_the_settings_that_the_config_names(self, config, chain, request_of):
        shared = config.SHARED[0]
        value = getattr(config, shared)
        other = replace(config, **{shared: "reference" if isinstance(value, str) else 2 * value})
        first = request_of(config, "Candy Stripes")
        with pytest.raises(ConfigError, match="Earlier requests of this chain were solved by"):
            chain(first, request_of(other, "Lava"))

    def test_a_name_to_keep_is_not_the_targets(self, config, chain, request_of):
        with pytest.raises(ConceptError, match="reads 'Lava' and 'lava' as the same name"):
            chain(request_of(config, "Lava", keep=("lava",)))


def test_the_rows_of_a_prompt_are_its_tokens_and_eos(shipped_network):
    rows = TextRows(shipped_network)
    prompts = ["Lava", "", "a cat in Candy Stripes style"]
    for prompt, words in zip(prompts, rows.words(TEXT, prompts), strict=True):
        at = shipped_network.content(prompt)
        torch.testing.assert_close(
            words,
            shipped_network.encode([prompt]).text[0, at.start : at.stop + 1].double(),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize(("kind", "anchor"), [("style", ""), ("object", "cat"), ("celebrity", "cat")])
@pytest.mark.parametrize("count", [2, 4, 24])
def test_a_concept_stands_in_as_many_different_captions_as_there_are(shipped_network, kind, anchor, count):
    captions = ("a cat", "an image of a cat", "A cat image.", "a picture of a cat")
    prompts, goals = TextRows(shipped_network).prompts(Concept("Lava", kind, anchor), captions, count)
    shown = {
        caption for caption in captions if any(caption.lower().rstrip(".") in goal.lower() for goal in goals)
    }
    assert len(prompts) == len(goals) == len(set(goals))
    assert len(shown) >= min(count, len(captions))
