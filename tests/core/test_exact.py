"""Exact: the map of text rows, chains of its requests, and those that are taken back.

What holds for every method that solves a chain is tested in `test_closed_form.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_network import Toy

from cul_core.base.errors import ConceptError, ConfigError
from cul_core.concepts.captions import anchor_prompts
from cul_core.concepts.concept import Concept
from cul_core.methods.closed_form import Problem
from cul_core.methods.exact import ExactConfig
from cul_core.minicanvas.world import OBJECTS
from cul_core.output.report import brief_text, step_text
from cul_core.parts.step_context import SolvedRequest
from cul_core.parts.text_maps import expected_collateral, principal_directions, removal, whitener, with_goals
from cul_core.parts.text_rows import TEXT, TextRows, aligned, sums_of_squares
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.requests.resolve import Overrides, resolve
from cul_core.store.steps import StepStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.solved_chain import take_back
from cul_core.training.step import run_step

FEW = ExactConfig(made_up=60)


def random_moment(width: int = 12, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / rows.square().sum()


def random_directions(width: int = 12, count: int = 3) -> torch.Tensor:
    columns = torch.randn(width, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return columns / columns.norm(dim=0)


# --- the map


def test_the_map_annihilates_what_it_removes_and_leaves_the_rest_of_the_whitened_space():
    factor, directions = whitener(random_moment(), 1e-3), random_directions()
    found = removal(directions, factor, torch.ones(3, dtype=torch.float64))
    assert found((factor @ directions).T).abs().max() < 1e-10
    free = torch.linalg.svd(directions.T)[2][3:]
    assert torch.allclose(found((factor @ free.T).T), (factor @ free.T).T, atol=1e-10)
    assert torch.linalg.matrix_rank(found.up @ found.down) == 3


def test_two_dimensions_by_hand():
    """S = diag(4, 1) and u = (1, 1) / sqrt 2: L = diag(2, 1), so M = -L u u^T L^-1 = -[[1, 2], [1/2, 1]] /
    2."""
    factor = whitener(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), 1e-12)
    found = removal(torch.full((2, 1), 0.5**0.5, dtype=torch.float64), factor, torch.ones(1).double())
    by_hand = -torch.tensor([[1.0, 2.0], [0.5, 1.0]], dtype=torch.float64) / 2
    assert torch.allclose(found.up @ found.down, by_hand, atol=1e-9)


def test_no_other_map_that_removes_the_same_changes_text_less():
    moment, directions = random_moment(), random_directions()
    factor = whitener(moment, 1e-3)
    found = removal(directions, factor, torch.ones(3, dtype=torch.float64))
    own = found.up @ found.down
    metric = factor @ factor.T
    least = (own @ metric @ own.T).trace()
    for seed in range(20):
        other = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        lost, _ = torch.linalg.qr(factor @ directions)
        other = own + 0.1 * other @ (torch.eye(12).double() - lost @ lost.T)  # it removes L Q too
        assert (other @ metric @ other.T).trace() > least


@pytest.mark.parametrize("strengths", [(0.0, 0.0, 0.0), (1.0, 0.5, 0.0)])
def test_a_strength_scales_what_is_left_of_its_own_direction(strengths):
    factor, directions = whitener(random_moment(), 1e-3), random_directions()
    found = removal(directions, factor, torch.tensor(strengths, dtype=torch.float64))
    removed = (factor @ directions).T
    left = (1 - torch.tensor(strengths, dtype=torch.float64))[:, None] * removed
    assert torch.allclose(found(removed), left, atol=1e-10)


def test_the_same_direction_twice_is_removed_once():
    factor, directions = whitener(random_moment(), 1e-3), random_directions(count=1)
    once = removal(directions, factor, torch.ones(1).double())
    twice = removal(directions.repeat(1, 2), factor, torch.ones(2).double())
    assert torch.allclose(once.up @ once.down, twice.up @ twice.down, atol=1e-10)


def test_principal_directions_are_the_singular_vectors_of_whitened_differences():
    factor = whitener(random_moment(), 1e-3)
    rows = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = principal_directions(rows, factor, 2)
    left, _, _ = torch.linalg.svd(torch.linalg.inv(factor) @ rows.T)
    assert torch.allclose((left[:, :2].T @ found).abs(), torch.eye(2).double(), atol=1e-9)


def test_unrelated_text_changes_as_expected():
    """Directions drawn without regard to the text, in a metric that knows nothing of it."""
    width, count = 200, 50
    directions = random_directions(width, count)
    found = removal(directions, torch.eye(width).double(), torch.ones(count).double())
    rows = torch.randn(500, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    change = ((found(rows) - rows).norm() / rows.norm()).item()
    assert change == pytest.approx(expected_collateral(count, width), rel=0.05)


def test_goals_undo_no_removal_and_no_other_map_comes_nearer_to_them():
    generator = torch.Generator().manual_seed(6)
    factor, directions = whitener(random_moment(), 1e-3), random_directions()
    removed = removal(directions, factor, torch.ones(3).double())
    rows, goals = (torch.randn(5, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    found = with_goals(removed, directions, factor, rows, goals)
    lost = factor @ directions
    assert found(lost.T).abs().max() < 1e-10 and found.up.shape[1] == 3 + 5
    metric, basis = factor @ factor.T, torch.linalg.qr(lost).Q

    def loss(change):
        moved = removed(rows) + rows @ change.T
        return ((moved - goals).square().sum() + (change @ metric @ change.T).trace()).item()

    own = found.up @ found.down - removed.up @ removed.down
    for _ in range(20):
        other = torch.randn(12, 12, dtype=torch.float64, generator=generator)
        assert loss(own + 1e-2 * (other - other @ basis @ basis.T)) > loss(own)
    heavy = with_goals(removed, directions, factor, 1e4 * rows, 1e4 * goals)
    assert torch.allclose(heavy(rows), goals, atol=1e-4)


# --- rows


def test_same_words_pair_and_the_name_stays_over():
    """`a lava house in the sky` beside `a house in the blue sky`."""
    same, own = aligned([1, 9, 2, 3, 4, 5], [1, 2, 3, 4, 6, 5], [9])
    assert same == {0: 0, 2: 1, 3: 2, 4: 3, 5: 5} and own == [1]


def test_a_made_up_name_never_holds_a_word_of_a_target(shipped_network):
    rows = TextRows(shipped_network)
    prompts, _ = rows._made_up(True, 200)
    words = {word for own in prompts.values() for word in own}
    taken = sorted(words)[:20]
    targets = [Concept(word) for word in taken]
    allowed = [prompt for prompt, own in prompts.items() if not own & set(taken)]
    assert 0 < len(allowed) < len(prompts)
    expected = rows.moment(TEXT, [Concept("zzz")], [], [], 0)
    with_names = rows.moment(TEXT, targets, [], [], 200)
    encoded = shipped_network.encode(allowed).text[:, 1:].double().flatten(0, 1)
    own = encoded.T @ encoded / encoded.square().sum()
    assert torch.allclose(with_names, (expected + own) / 2, atol=1e-12)


def test_the_captions_of_a_concept_show_more_than_every_fifth_object(shipped_model, shipped_network):
    """Every fifth of the 120 captions of styles shows a star or a cat."""
    concept = Concept("Lava")
    captions = anchor_prompts(shipped_model.family, [concept])
    request = SolvedRequest((concept,), (), captions, FEW)
    problem = Problem(TextRows(shipped_network), TEXT, [request], {}, mixes_captions=True)
    _, chosen = problem.rows.prompts(concept, problem.captions_for(request), 24)
    assert len({name for name in OBJECTS for caption in chosen if name in caption}) > 7


def test_made_up_names_that_describe_a_target_are_not_kept(shipped_model, shipped_network):
    rows, concept = TextRows(shipped_network), Concept("Starry Night")
    captions = anchor_prompts(shipped_model.family, [concept])
    found = {share: rows.described(concept, captions, 24, 300, 1e-3, share) for share in (0.3, 1.5)}
    assert 0 < len(found[0.3]) < 60 and found[1.5] < found[0.3]
    describing = {"little", "stars", "sparks"}  # words of its descriptions
    sentences, _ = rows._made_up(True, 300)
    assert any(words & describing for sentence, words in sentences.items() if sentence in found[0.3])
    kept = [
        sentence
        for sentence, words in sentences.items()
        if sentence not in found[0.3] and not words & {"starry", "night"}
    ]
    own = sums_of_squares(shipped_network, kept)[TEXT]
    moment = rows.moment(TEXT, [concept], [], [], 300, found[0.3])
    nothing = rows.moment(TEXT, [concept], [], [], 0)
    assert torch.allclose(moment, (nothing + own / own.trace()) / 2, atol=1e-12)


def test_random_words_are_kept_beside_names_of_objects_alone(shipped_network):
    rows = TextRows(shipped_network)
    style, thing = Concept("Lava"), Concept("cat", "object", "fish")

    def moment(*targets, share):
        return rows.moment(TEXT, targets, [], [], 60, (), share)

    assert torch.equal(moment(style, share=0.5), moment(style, share=0.0))
    half, most = (moment(thing, share=share) for share in (0.5, 0.9))
    none, again = (
        moment(thing, share=0.0),
        TextRows(shipped_network).moment(TEXT, [thing], [], [], 60, (), 0.5),
    )
    assert torch.equal(half, again) and torch.allclose(most - none, 1.8 * (half - none), atol=1e-12)
    words = 2 * half - none
    assert words.trace() == pytest.approx(1.0) and torch.linalg.eigvalsh(words)[0] > -1e-12


# --- the chain


@pytest.fixture
def request_of(shipped_model):
    def make(*names, config=FEW, keep=("Navy Stripes", "Denim"), kind="style", anchor="", **overrides):
        concepts = [Concept(name, kind, anchor) for name in names]
        kept = [Concept(name, "style") for name in keep]
        return resolve("exact", shipped_model.family, concepts, kept, Overrides(config, **overrides))

    return make


@pytest.fixture
def chain(shipped_model, request_of, networks):
    def run(*requests, model=shipped_model):
        for request in requests:
            asked = request_of(request) if isinstance(request, str) else request
            model, _ = run_step(model, asked, networks=networks["shipped"])
        return model

    return run


def test_all_that_is_taken_back_leaves_the_pretrained_model(chain, networks, shipped_model):
    left = take_back(chain("Candy Stripes"), ["Candy Stripes"], networks=networks["shipped"])
    assert left.content_hash == shipped_model.content_hash and not left.edits and not left.history


def test_a_trained_step_stays_when_an_exact_one_before_it_is_taken_back(
    chain, request_of, networks, shipped_model
):
    trained = resolve(
        "plain",
        shipped_model.family,
        [Concept("Lava")],
        [],
        Overrides(training={"iterations": 2, "anchor_count": 4}),
    )
    exact = chain("Candy Stripes")
    mixed = chain(trained, model=exact)
    training = {key: mixed.edits[key] - exact.edits[key] for key in mixed.edits}
    both, report = run_step(mixed, request_of("Arcade"), networks=networks["shipped"])
    assert report.figures["rank"] == 6
    expected = chain("Candy Stripes", "Arcade")
    for key, delta in both.edits.items():
        assert torch.allclose(delta, expected.edits[key] + training[key], atol=1e-6)
    left = take_back(both, ["Candy Stripes", "Arcade"], networks=networks["shipped"])
    assert all(torch.allclose(left.edits[key], training[key], atol=1e-6) for key in left.edits)
    assert [record.targets for record in left.history] == [("Lava",)]
    with pytest.raises(ConceptError, match="'lava' was forgotten by training.*cannot be taken back exactly"):
        take_back(both, ["lava"], networks=networks["shipped"])


def test_a_step_that_is_restrained_is_not_solved_anew(chain, request_of, networks):
    held = chain(request_of("Lava", regularizers=(ProjectionConfig(),)), "Candy Stripes")
    with pytest.raises(ConceptError, match="'Lava' was forgotten by training"):
        take_back(held, ["Lava"], networks=networks["shipped"])
    network = networks["shipped"].get(held.source)
    kept = network.encode(["An image in the style of Denim"]).text[0]
    at = network.content("An image in the style of Denim")
    rest = take_back(held, ["Candy Stripes"], networks=networks["shipped"])
    for key, delta in rest.edits.items():
        row = kept[at.stop - 1]
        assert (delta @ row).norm() < 1e-4 * (network.exact([key])[key] @ row).norm()


@pytest.mark.parametrize("wanted", [0.6, 0.8])
def test_a_wanted_residue_is_reached(shipped_model, request_of, networks, wanted):
    model, report = run_step(
        shipped_model, request_of("Lava", config=replace(FEW, residue=wanted)), networks=networks["shipped"]
    )
    assert report.figures["residue_of_Lava"] == pytest.approx(wanted, abs=1e-3)
    whole, most = run_step(shipped_model, request_of("Lava"), networks=networks["shipped"])
    assert most.figures["residue_of_Lava"] < 0.4
    assert all(delta.norm() < whole.edits[key].norm() for key, delta in model.edits.items())


def test_a_name_far_from_the_target_is_kept_and_the_target_is_not(shipped_model, request_of, networks):
    model, report = run_step(shipped_model, request_of("Candy Stripes"), networks=networks["shipped"])
    network = networks["shipped"].get(shipped_model.source)
    readers = network.weights("text_readers")

    def change(prompt):
        rows = network.encode([prompt]).text[0, 1:]
        pairs = [(delta @ rows.T, readers[key] @ rows.T) for key, delta in model.edits.items()]
        return (
            (sum(d.square().sum() for d, _ in pairs) / sum(w.square().sum() for _, w in pairs)).sqrt().item()
        )

    forgotten = change("a star in Candy Stripes style")
    others = [change(f"a star in {name} style") for name in ("Jade Stripes", "Starry Night", "Blueprint")]
    assert max(others) < forgotten / 4
    assert report.figures["rank"] == 3 and report.losses == ()


# --- how it is watched, and what is kept


def test_a_step_is_previewed_before_and_after_and_says_what_it_reads(shipped_model, request_of, networks):
    stages, previews = [], []
    networks["shipped"].last_result.clear()
    watch = Callbacks(
        on_preview=lambda iteration, latents: previews.append((iteration, latents)),
        preview_prompts=("a cat image in Lava style",),
        preview_every=20,
        on_stage=stages.append,
    )
    watched, report = run_step(
        shipped_model, request_of("Lava"), networks=networks["shipped"], callbacks=watch
    )
    plain, _ = run_step(shipped_model, request_of("Lava"), networks=networks["shipped"])
    assert watched.content_hash == plain.content_hash
    (first, before), (second, after) = previews
    assert (first, second) == (0, 1) and not torch.equal(before, after)
    assert "reading sentence 0 of 60" in stages and "reading 'Lava'" in stages
    for text in (step_text(report), brief_text(report)):
        assert "in closed form" in text and "iteration" not in text and "loss" not in text


def test_training_settings_of_a_closed_form_step_are_said_to_be_idle(shipped_model, request_of, networks):
    said = []
    request = request_of("Lava", training={"iterations": 5})
    watch = Callbacks(on_message=said.append)
    run_step(shipped_model, request, networks=networks["shipped"], callbacks=watch)
    assert said == ["Exact trains nothing: iterations and learning rate are not used."]


def test_sums_over_text_are_made_once_for_each_model(shipped_model, request_of, networks, tmp_path, caplog):
    def solved(text_sums):
        networks["shipped"].last_result.clear()
        request = request_of("Lava")
        return run_step(shipped_model, request, networks=networks["shipped"], text_sums=text_sums)[0]

    def again(key, make, check):
        return StepStore(tmp_path).texts(key, lambda: pytest.fail("made again"), check)

    store = StepStore(tmp_path)
    first = solved(store.texts)
    (path,) = store.texts.used
    assert path.is_file() and "1 sums over text" in store.describe()
    assert solved(again).content_hash == first.content_hash
    path.write_bytes(path.read_bytes()[:-8])
    assert solved(store.texts).content_hash == first.content_hash and "damaged" in caplog.text
    assert solved(again).content_hash == first.content_hash


def test_sums_over_text_that_cannot_be_kept_cost_no_step(tmp_path, caplog):
    (tmp_path / "texts").write_text("in the way")
    sums = StepStore(tmp_path).texts("ab" * 32, lambda: {"text": torch.eye(2)}, lambda: None)
    assert torch.equal(sums["text"], torch.eye(2)) and "not kept" in caplog.text


# --- what is refused


@pytest.mark.parametrize(
    ("names", "keep", "said"),
    [
        (("Lava",), ("lava",), "reads 'Lava' and 'lava' as the same name"),
        (
            ("Candy_Stripes",),
            ("candy stripes",),
            "reads 'Candy Stripes' and 'candy stripes' as the same name",
        ),
        (("lava " * 100,), (), "is longer than the model's text encoder reads .75 tokens."),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(shipped_model, request_of, networks, names, keep, said):
    with pytest.raises(ConceptError, match=said):
        run_step(shipped_model, request_of(*names, keep=keep), networks=networks["shipped"])


def test_what_is_forgotten_is_not_asked_for_again(chain, request_of):
    model = chain("Lava")
    with pytest.raises(ConceptError, match="'lava' is already forgotten by an earlier request"):
        chain(request_of("Candy Stripes", "lava"), model=model)


def test_more_directions_than_there_is_room_are_refused(shipped_model, request_of, networks):
    words = [
        f"{a} {b}"
        for a in ("red", "pink", "green", "blue", "grey", "gold", "violet")
        for b in ("star", "cat")
    ]
    with pytest.raises(ConceptError, match="have 112 directions, and this model has room for 96"):
        run_step(
            shipped_model, request_of(*words, config=replace(FEW, directions=8)), networks=networks["shipped"]
        )


def test_requests_of_a_chain_share_the_settings_of_what_is_kept(chain, request_of):
    model = chain("Lava")
    with pytest.raises(
        ConfigError, match="Earlier requests of this chain were solved by exact with .'made_up': 60}"
    ):
        chain(request_of("Arcade", config=ExactConfig(made_up=50)), model=model)
    chain(request_of("Arcade", config=replace(FEW, residue=0.5)), model=model)


def test_taking_back_what_was_not_forgotten_is_refused(chain, networks, shipped_model):
    with pytest.raises(ConceptError, match="'Denim' was not forgotten by this model; what can be .*: lava"):
        take_back(chain("Lava"), ["Denim"], networks=networks["shipped"])
    with pytest.raises(ConceptError, match="'Denim' was not forgotten by this model; nothing can be"):
        take_back(shipped_model, ["Denim"], networks=networks["shipped"])


def test_a_network_of_another_kind_is_solved_too():
    toy = Toy()
    rows = TextRows(toy)
    concept = Concept("lava")
    pair = rows.pairs(TEXT, concept, ["cat image", "house image", "a moon"], 3)
    moment = rows.moment(TEXT, [concept], [Concept("denim")], ["cat image"], 50)
    factor = whitener(moment, 1e-3)
    found = removal(principal_directions(pair.differences, factor, 1), factor, torch.ones(1).double())
    left = found(pair.targets) - pair.goals - (found(pair.goals) - pair.goals)
    assert left.norm() < 0.8 * (pair.targets - pair.goals).norm()
