"""Audits: what they say of an untouched, a broken and a real edited model, and the intervals of their
figures."""

import json
from types import SimpleNamespace

import pytest
import torch
from toy_network import TOY, Toy

from cul_core.audits import AUDITS
from cul_core.audits.base import BUDGETS, Figure
from cul_core.audits.from_image import redrawn
from cul_core.audits.intervals import mean, ratio, share, student_quantile
from cul_core.audits.inversion import FreeTokens, noisy_times, outcome, unseen_style
from cul_core.audits.ladder import climb, ladder_text, rungs
from cul_core.audits.probes import Probes, audited_concepts, images_of
from cul_core.audits.prompt_search import evolved
from cul_core.audits.recognition import Recognizer
from cul_core.audits.relapse import Relapse
from cul_core.audits.residual import parse_wordings, state_of
from cul_core.audits.resurgence import benign_captions, tuned_copy
from cul_core.base.errors import ConceptError, ConfigError, ModelError
from cul_core.concepts.concept import Concept
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.methods.exact import ExactConfig
from cul_core.models.family import FAMILIES
from cul_core.requests.resolve import Overrides, resolve
from cul_core.store.steps import StepStore
from cul_core.training.step import run_step

LAVA, DENIM = Concept("lava"), Concept("denim")
TINY = {
    "residual": {"pictures": 3, "states": 4, "wordings": "a moon image"},
    "changes": {"pictures": 3, "states": 4, "neighbours": 2, "names": "moon, cat, denim, house"},
    "from_image": {"pictures": 3},
    "prompt_search": {"queries": 12, "best": 2, "drawn": 2},
    "inversion": {"pictures": 4, "steps": 3, "renderings": 2},
    "resurgence": {"pictures": 3, "states": 4, "steps": 2, "benign": 4},
}
"""Settings that make an audit fast. Tests of their own have `classification`, which needs a classifier, and
`relapse`, which needs a store."""


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    return Toy()


def toy_model(toy, factor=None):
    """The toy, its text readers multiplied by a factor; untouched without one."""
    source = SimpleNamespace(name="toy.safetensors", identity="0" * 64)
    readers = toy.exact(list(toy.weights("text_readers")))
    edits = {} if factor is None else {key: (factor - 1) * weight for key, weight in readers.items()}
    return UnlearnModel(source, TOY, edits)


def audit(name, network, model, concepts=(LAVA,), on_progress=lambda done, total: None, **settings):
    entry = AUDITS.get(name)
    config = entry.config(**(TINY[name] | settings))
    return entry.cls(config).run(network, model, concepts, on_progress)


# --- every audit


@pytest.mark.parametrize("name", TINY)
def test_an_audit_repeats_itself_tells_its_progress_and_leaves_the_network_as_it_was(toy, name):
    before = {key: weight.clone() for key, weight in toy.weights("all").items()}
    told, model = [], toy_model(toy, 0.5)
    first = audit(name, toy, model, on_progress=lambda done, total: told.append((done, total)))
    assert audit(name, toy, model) == first
    assert first.figures and first.verdict and LAVA.name in first.text
    assert told[-1][0] == told[-1][1] and all(0 <= done <= total for done, total in told)
    assert told == sorted(told)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(name, toy, model, on_progress=stop)
    for key, weight in toy.weights("all").items():
        assert torch.equal(weight, before[key]) and not weight.requires_grad


def test_every_audit_is_tested():
    assert {entry.name for entry in AUDITS} == {*TINY, "classification", "relapse"}
    assert [entry.name for entry in rungs()][0] == "residual"
    assert {entry.name for entry in rungs()} == {*TINY, "relapse"}


def test_budgets_differ_and_settings_replace_theirs():
    for entry in rungs():
        quick, standard, thorough = map(entry.config.of, BUDGETS)
        assert standard == entry.config() and len({str(c) for c in (quick, standard, thorough)}) == 3
    assert AUDITS.get("residual").config.of("thorough", pictures=3).pictures == 3
    with pytest.raises(ConfigError, match="'long'.*quick, standard, thorough"):
        AUDITS.get("residual").config.of("long")


def test_the_ladder_gives_each_audit_the_settings_it_has(toy):
    found = climb([AUDITS.get("residual")], toy, toy_model(toy), [LAVA], "quick", {"seed": 7, "store": "x"})
    assert [rung.name for rung in found] == ["Residual Score"]
    assert found[0].report == audit(
        "residual", toy, toy_model(toy), seed=7, pictures=4, states=8, wordings=""
    )
    assert found[0].report.verdict in ladder_text(found)
    assert json.loads(json.dumps(found[0].to_json()))["verdict"] == found[0].report.verdict


def test_an_edited_file_without_the_one_it_was_made_from_is_refused(toy):
    record = SimpleNamespace(has_changed=True, request={"concepts": [LAVA.to_json()], "retain": []})
    model = toy_model(toy).with_history((record,))
    with pytest.raises(ModelError, match="'toy.safetensors' was edited.*pretrained"):
        audited_concepts(model, ())
    assert audited_concepts(UnlearnModel(model.source, TOY, {"a": torch.ones(1)}, (record,)), ()) == (LAVA,)
    with pytest.raises(ConceptError, match="name the concepts"):
        audited_concepts(toy_model(toy), ())


# --- intervals


def test_a_ratio_and_its_interval_by_hand():
    """Parts 1, 3 of wholes 2, 2: 1; the rests are -0.5 and 0.5, so the standard error is 0.5."""
    figure = ratio(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert figure.value == 1 and figure.high - 1 == pytest.approx(12.706 * 0.5) == 1 - figure.low
    assert ratio(torch.ones(1), torch.ones(1)).low is None
    assert ratio(torch.ones(2), torch.tensor([1.0, -1.0])).value is None


def test_students_quantiles_are_those_of_the_tables():
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 7: 2.365, 11: 2.201, 30: 2.042}
    for freedom, quantile in tables.items():
        assert student_quantile(freedom) == pytest.approx(quantile, rel=0.01)


def test_intervals_cover_what_they_should():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2000, 8, generator=generator) + 2
    wholes = 0.5 * torch.randn(2000, 8, generator=generator) + 4
    found = [ratio(*pair) for pair in zip(parts, wholes, strict=True)]
    covered = sum(figure.low <= 0.5 <= figure.high for figure in found) / 2000
    assert 0.93 < covered < 0.97
    hits = torch.bernoulli(torch.full((2000, 24), 0.2), generator=generator).sum(1).int().tolist()
    found = [share(count, 24) for count in hits]
    assert 0.93 < sum(figure.low <= 0.2 <= figure.high for figure in found) / 2000 < 0.98


def test_wilsons_interval_is_that_of_the_tables():
    none, all_of_them = share(0, 24), share(24, 24)
    assert (none.low, none.high) == pytest.approx((0, 0.138), abs=1e-3)
    assert (all_of_them.low, all_of_them.high) == pytest.approx((0.862, 1), abs=1e-3)
    assert share(0, 0).value is None and mean(torch.tensor([1.0, 3.0])).value == 2


# --- noised images


def test_an_image_is_noised_the_same_whatever_stands_beside_it(toy):
    images = images_of(toy, LAVA, 4, seed=3)
    whole, part = Probes.of(toy, images, 5, 3, "x"), Probes.of(toy, images[:2], 5, 3, "x")
    assert torch.equal(whole.noised[:10], part.noised) and torch.equal(whole.times[:10], part.times)
    assert not torch.equal(whole.noised, Probes.of(toy, images, 5, 4, "x").noised)
    signal, sigma = toy.process.coefficients(part.times)
    clean = images[:2].repeat_interleave(5, 0)
    assert torch.allclose(part.noised - clean * signal, sigma * (part.targets + clean), atol=1e-5)


def test_the_error_of_an_image_does_not_depend_on_the_order(toy):
    images = images_of(toy, LAVA, 3, seed=0)
    probes = Probes.of(toy, images, 4, 0)
    prompts = toy.encode(["a cat", "lava", "moon"])
    each = [probes.errors(toy, prompt)[i] for i, prompt in enumerate(["a cat", "lava", "moon"])]
    assert torch.allclose(probes.errors(toy, prompts), torch.stack(each), rtol=1e-5)


# --- residual score


def test_wordings_are_of_one_concept_or_of_all():
    found = parse_wordings("hot red; Denim = blue cloth;\n lava=rock", [LAVA, DENIM])
    assert found == {LAVA: ["hot red", "rock"], DENIM: ["hot red", "blue cloth"]}
    with pytest.raises(ConceptError, match="'moon'.*lava, denim"):
        parse_wordings("moon = night", [LAVA, DENIM])


def test_what_a_residual_score_says():
    said = [
        state_of(SimpleNamespace(value=value, low=value - 5, high=value + 5)) for value in (0, 24, 40, 52, 90)
    ]
    assert said == ["forgotten", "not sure", "dormant", "not sure", "comes back"]


# --- searches


def test_a_prompt_search_finds_what_scores_best_within_its_queries(toy):
    class Fitness:
        """Low errors for prompts that say lava often."""

        def errors(self, network, prompt):
            asked.append(prompt)
            return torch.tensor([-float(prompt.split().count("lava"))])

    asked: list[str] = []
    found = evolved(toy, Fitness(), ["a cat", "the moon"], 400, seed=0)
    assert len(found) == len(asked) - 1 == len(set(found)) == 400  # and the empty prompt
    assert found[0].split().count("lava") >= 4
    assert evolved(toy, Fitness(), ["a cat", "the moon"], 400, seed=0) == found


def test_free_tokens_are_the_words_they_start_at_until_they_are_changed(toy):
    free = FreeTokens.of(toy, LAVA, 2, at_name=False, seed=0)
    prompts = [free.placeholder.prompt, *free.captions(3, 0)]
    assert torch.equal(free.encode(prompts).text, toy.encode(prompts).text)
    with torch.no_grad():
        free.rows[0].add_(1.0)
    assert not torch.allclose(free.encode(prompts).text[1:], toy.encode(prompts).text[1:])
    assert FreeTokens.of(toy, LAVA, 2, at_name=True, seed=0).placeholder == LAVA


def test_an_inversion_learns(toy):
    losses = [
        audit("inversion", toy, toy_model(toy), steps=steps, renderings=0).figures["lava: loss"].value
        for steps in (0, 40)
    ]
    assert losses[1] < 0.98 * losses[0]


def test_what_an_inversion_says():
    said = [
        outcome(Figure(gap, gap - 0.1, gap + 0.1), Figure(times, times - 0.1, times + 0.1))
        for gap, times in ((0.01, 1.1), (0.3, 3.0), (0.95, 9.0))
    ]
    assert said == ["comes back", "is not sure", "resists"]


def test_times_of_an_inversion_are_noisy(toy):
    times = noisy_times(toy.process, 50, torch.Generator().manual_seed(0))
    signal, sigma = toy.process.coefficients(times)
    assert len(times) == 50 and (sigma >= 0.35 * signal).all()


def test_a_style_that_never_existed_has_the_same_channels_on_average_and_other_images():
    latents = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 5).view(
        1, 4, 1, 1
    )
    latents[:, 0] += latents[:, 1] + 3
    rows = [x.movedim(1, -1).flatten(0, 2) for x in (latents, unseen_style(latents, 0))]
    assert torch.allclose(rows[0].mean(0), rows[1].mean(0), atol=1e-4)
    assert torch.allclose(torch.cov(rows[0].T), torch.cov(rows[1].T), atol=1e-2)
    assert (rows[0] - rows[1]).abs().mean() > 1


def test_a_weaker_noise_takes_fewer_steps(toy, monkeypatch):
    predict, asked = toy.predict, []
    monkeypatch.setattr(toy, "predict", lambda *inputs: asked.append(inputs[1]) or predict(*inputs))
    images = images_of(toy, LAVA, 2, seed=0)
    counts = []
    for strength in (0.25, 0.5, 1.0):
        asked.clear()
        redrawn(toy, images, ["lava", ""], strength, seed=0)
        counts.append(len(asked))
    assert counts == [3, 6, 12]


def test_a_recognizer_has_the_nearest_names_and_the_empty_prompt_for_rivals(toy):
    recognizer = Recognizer.of(toy, toy_model(toy), LAVA, 0)
    assert len(set(recognizer.rivals)) == 5 and "" in recognizer.rivals
    assert LAVA.prompt not in recognizer.rivals


# --- benign fine-tuning


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_tuned_copy_begins_as_the_model_and_the_network_forgets_it(toy, how):
    before = {key: weight.clone() for key, weight in toy.weights("all").items()}
    model = toy_model(toy, 0.5)
    noised = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    with tuned_copy(toy, model, how, 1e-2) as copy:
        for key in model.edits:
            assert torch.allclose(toy.weights("all")[key], 0.5 * before[key])
        start = {key: weight.clone() for key, weight in toy.weights("all").items()}
        for _ in range(2):  # one update of a LoRA changes only one of its factors
            copy.update(noised, torch.full((3,), 0.5), torch.zeros_like(noised), ["a cat"] * 3)
        moved = {key for key, weight in toy.weights("all").items() if not torch.equal(weight, start[key])}
    assert all(torch.equal(weight, before[key]) for key, weight in toy.weights("all").items())
    assert moved == set(before if how == "full" else model.edits)


def test_no_benign_caption_names_what_is_audited(toy):
    captions = benign_captions(toy, [Concept("horse", "object"), LAVA], 60)
    assert len(captions) == 60 and not [caption for caption in captions if "horse" in caption]


# --- what MiniCanvas has forgotten

CANDY, NAVY = Concept("Candy_Stripes"), Concept("Navy_Stripes")


@pytest.fixture(scope="module")
def forgetful(shipped_model, networks):
    """MiniCanvas without Candy Stripes."""
    overrides = Overrides(method=ExactConfig(made_up=60))
    request = resolve("exact", shipped_model.family, [CANDY], [NAVY], overrides)
    return run_step(shipped_model, request, networks=networks["shipped"])[0]


@pytest.fixture(scope="module")
def deaf(shipped_model, networks):
    """MiniCanvas that hears no text any more."""
    network = networks["shipped"].get(shipped_model.source)
    weights = network.exact(list(network.weights("text_readers")))
    return UnlearnModel(shipped_model.source, shipped_model.family, {k: -w for k, w in weights.items()})


def test_the_residual_score_is_100_until_name_and_description_are_forgotten(
    shipped_network, shipped_model, forgetful
):
    prompt, described = CANDY.prompt, "An image with pink horizontal stripes"

    def scores(model):
        report = audit(
            "residual", shipped_network, model, (CANDY,), pictures=5, wordings=described, made_up=0
        )
        return [report.figures[f"Candy Stripes: {text}"] for text in (prompt, described)]

    for figure in scores(shipped_model):
        assert (figure.value, figure.low, figure.high) == (100, 100, 100)
    assert all(figure.high < 25 for figure in scores(forgetful))


def test_what_else_changed_is_nothing_in_the_untouched_and_everything_in_a_deaf_model(
    shipped_network, shipped_model, deaf
):
    tiny = {"pictures": 2, "states": 3, "neighbours": 0, "made_up": 1, "names": ""}
    found = audit("changes", shipped_network, shipped_model, (CANDY,), **tiny).figures
    assert {figure.value for figure in found.values()} == {0}
    lost = audit("changes", shipped_network, deaf, (CANDY,), **tiny).figures
    assert all(figure.value > 0 for name, figure in lost.items() if name != "random: divergence")
    direct = [figure.value for name, figure in lost.items() if name.endswith("direct change")]
    assert direct and min(direct) > 50


def test_the_untouched_model_recognizes_a_style_in_images(shipped_network):
    recognizer = Recognizer(CANDY, ("", NAVY.prompt), 0)
    for concept, is_shown in ((CANDY, True), (Concept("Jade_Stripes"), False)):
        images = images_of(shipped_network, concept, 2, 5)
        assert recognizer.shown(shipped_network, images) == [is_shown] * 2


def test_relapse_reads_the_chain_from_the_store_alone(shipped_model, networks, tmp_path):
    store, model = StepStore(tmp_path), shipped_model
    for concept in (CANDY, Concept("Neon_Cyan")):
        request = resolve("exact", model.family, [concept], [NAVY], Overrides(method=ExactConfig(made_up=60)))
        edited, report = run_step(model, request, networks=networks["shipped"])
        store.put(model, request, edited, report)
        model = edited
    network = networks["shipped"].get(shipped_model.source)
    config = AUDITS.get("relapse").config(store=str(tmp_path), pictures=2, states=3)
    report = Relapse(config).run(network, model, ())
    assert [name for name in report.figures] == [
        "Candy Stripes: after request 1",
        "Candy Stripes: after request 2",
        "Neon Cyan: after request 2",
    ]
    assert all(figure.value < 30 for figure in report.figures.values())
    with pytest.raises(ConfigError, match="lacks step 1"):
        Relapse(AUDITS.get("relapse").config(store=str(tmp_path.parent))).run(network, model, ())
    with pytest.raises(ConfigError, match="no folder"):
        Relapse(AUDITS.get("relapse").config()).run(network, model, ())
