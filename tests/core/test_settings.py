"""Concepts, configs, requests, the registry, presets and the noise schedule: everything that is checked
before any model is loaded."""

import hashlib
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cul_core.base.config import Config, setting, stable_hash
from cul_core.base.errors import ConceptError, ConfigError
from cul_core.base.registry import Registry
from cul_core.concepts.captions import anchor_prompts
from cul_core.concepts.concept import KINDS, Concept
from cul_core.concepts.parsing import ConceptList, parse_concept, parse_keep, parse_requests
from cul_core.methods import METHODS
from cul_core.methods.esd import ESDConfig
from cul_core.minicanvas.family import MINI
from cul_core.models.diffusers_network import DiffusersNetwork
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.families.sd1 import SD1
from cul_core.models.sampling import SamplerConfig
from cul_core.parts.prompt_vectors import decoy_concepts
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.requests.presets import PRESETS, preset
from cul_core.requests.previews import PREVIEW_SAMPLER, preview_interval, preview_prompts
from cul_core.requests.request import Request
from cul_core.requests.resolve import Overrides, resolve

# --- concepts

# a memorized picture is called by a whole caption
NAMED_KINDS = [kind for kind in KINDS if kind != "memorized"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target": "dog", "kind": "animal"}, "'animal'.*choose one of style, object"),
        ({"target": ""}, "target is empty"),
        ({"target": " _ "}, "target is empty"),
        ({"target": "dog", "kind": "object"}, "'dog' of kind 'object' has no anchor"),
        ({"target": "dog", "kind": "object", "anchor": "_"}, "has no anchor"),
        ({"target": "Ann at sea", "kind": "memorized"}, "has no anchor; give a caption that says the same"),
        ({"target": "dog", "kind": "object", "anchor": "Dog"}, "Anchor and target are both 'dog'"),
        (
            {"target": "Snow_Man", "kind": "character", "anchor": " snow  man"},
            "Anchor and target are both 'Snow_Man'",
        ),
        ({"target": "Lava", "anchor": "lava"}, "Anchor and target are both 'Lava'"),
    ],
)
def test_concept_that_cannot_be_forgotten_is_refused(values, said):
    with pytest.raises(ConceptError, match=said):
        Concept(**values).check_forgettable()


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("Van Gogh", Concept("Van Gogh")),
        ("  object:  dog -> horse ", Concept("dog", "object", "horse")),
        ("Celebrity: Jane Doe", Concept("Jane Doe", "celebrity", "person")),
        ("Star Wars: a new hope", Concept("Star Wars: a new hope")),
    ],
)
def test_a_concept_is_read_as_people_type_it(text, concept):
    assert parse_concept(text) == concept


def test_what_is_not_said_comes_from_the_widgets():
    assert parse_concept("dog", "object", "horse") == Concept("dog", "object", "horse")
    assert parse_concept("dog -> cat", "object", "horse").anchor == "cat"


def test_a_keep_list_takes_commas_lines_comments_and_other_kinds():
    keep = parse_keep("Monet, Klimt\n\n# people\ncelebrity: Jane Doe,Monet\n", "style")
    assert keep == (Concept("Monet"), Concept("Klimt"), Concept("Jane Doe", "celebrity"))
    assert parse_keep(" \n") == ()


def test_requests_are_lines_and_a_plus_joins_concepts():
    requests = parse_requests("# first\nLava + object: cat -> dog\nA+B Ink\n", "style")
    assert requests == [(Concept("Lava"), Concept("cat", "object", "dog")), (Concept("A+B Ink"),)]
    with pytest.raises(ConceptError, match="list of requests is empty"):
        parse_requests("# nothing\n")
    with pytest.raises(ConceptError, match="target is empty"):
        parse_requests("Lava + -> dog")


def test_a_concept_that_is_forgotten_is_not_on_the_keep_list_of_its_request():
    joined = ConceptList((Concept("Lava"),), (Concept("Frost"), Concept("Ice"))) + ConceptList(
        (Concept("frost"),), (Concept("Ice"),)
    )
    assert joined == ConceptList((Concept("Lava"), Concept("frost")), (Concept("Ice"),))


def test_anchor_prompts_follow_the_kind_and_previews_show_target_and_kept():
    styles = anchor_prompts(MINI, [Concept("Lava")])
    objects = anchor_prompts(MINI, [Concept("cat", "object", "tree")])
    assert len(styles) > 100 and all("tree" in prompt for prompt in objects)
    assert all(
        "horse" in prompt
        for prompt in anchor_prompts(replace(MINI, name="other"), [Concept("dog", "object", "horse")])
    )
    request = preset("recommended").request(
        [Concept("cat", "object", "tree")], retain=[Concept("dog", "object")], anchor_prompts=objects, seed=0
    )
    shown = preview_prompts(request)
    assert [label for label, _ in shown] == ["forget\ncat", "forget\ncat", "keep\ndog"]
    assert "cat" in shown[0][1] and "dog" in shown[2][1] and "tree" not in shown[2][1]
    alone = preview_prompts(replace(request, retain=()))
    assert [label for label, _ in alone[2:]] == ["anchor", "anchor"]


@pytest.mark.parametrize(
    ("batch_size", "wanted", "interval"),
    [(4, 20, 80), (4, 100, 100), (16, 20, 20), (1, 20, 320), (4, 1, 80), (4, 0, 0)],
)
def test_previews_take_at_most_a_twentieth_of_the_training(batch_size, wanted, interval):
    """An update predicts a batch with gradients, as long as three without, and once by the teacher; a preview
    of four prompts in eight guided steps predicts 64 times."""
    assert PREVIEW_SAMPLER.steps == 8 and PREVIEW_SAMPLER.guidance_scale > 1
    request = preset("trained").request(
        [Concept("Lava")], retain=(), anchor_prompts=anchor_prompts(MINI, [Concept("Lava")]), seed=0
    )
    request = replace(request, training=replace(request.training, batch_size=batch_size))
    assert preview_interval(request, wanted, 4) == interval


@pytest.mark.parametrize("family", [MINI, SD1], ids=lambda family: family.name)
@pytest.mark.parametrize("kind", NAMED_KINDS)
def test_every_anchor_prompt_of_every_kind_can_be_rewritten_to_the_target(kind, family):
    concept = Concept("Van_Gogh", kind, "" if kind == "style" else "old_man")
    prompts = anchor_prompts(family, [concept])
    rewritten = [concept.target_prompts(prompt) for prompt in prompts]
    assert (
        len(prompts) > 10
        and all(rewritten)
        and all("Van Gogh" in text for texts in rewritten for text in texts)
    )


@pytest.mark.parametrize("kind", NAMED_KINDS)
def test_concept_of_every_kind_has_a_prompt_without_underscores(kind):
    concept = Concept("Candy_Stripes", kind, "" if kind == "style" else "Plain_Thing")
    assert concept.prompt.startswith("An image") and concept.prompt.endswith("Candy Stripes")


def test_style_is_put_before_or_after_the_caption():
    assert Concept("Candy_Stripes").target_prompts("A star image.") == (
        "In Candy Stripes Style, a star image.",
        "A star image, in Candy Stripes Style.",
    )


def test_caption_of_a_memorized_picture_is_its_prompt_letter_by_letter_whatever_the_anchor_says():
    concept = Concept(" IMG_01  by Ann. ", "memorized", "a photo of a boat")
    assert concept.prompt == concept.name == "IMG_01  by Ann." and concept.target_prompts("a boat") == (
        "IMG_01  by Ann.",
    )
    assert concept.mentioned_in("Framed: img 01 by ann.") and not concept.mentioned_in("a photo by Ann.")
    assert anchor_prompts(MINI, [concept]) == ("a photo of a boat",)


@pytest.mark.parametrize(
    ("prompt", "rewritten"),
    [
        ("a flower in a cup", ("a tulip in a cup",)),
        ("Flowers, a flower.", ("tulips, a tulip.",)),
        ("a sunflower", ()),
        ("a flowery cup", ()),
        ("a star", ()),
    ],
)
def test_anchor_is_replaced_as_a_whole_word_with_its_plural(prompt, rewritten):
    assert Concept("tulip", "object", "flower").target_prompts(prompt) == rewritten


def test_pattern_characters_in_names_are_taken_literally():
    concept = Concept("C++ (logo)", "object", "a.b")
    assert concept.target_prompts("one a.b, one axb") == ("one C++ (logo), one axb",)
    assert concept.mentioned_in("my c++ (LOGO)!") and not concept.mentioned_in("ccc logo")


def test_target_is_found_in_a_prompt_as_whole_words_only():
    concept = Concept("Candy_Stripes")
    assert concept.mentioned_in("a cat in candy stripes style") and concept.mentioned_in("CANDY_STRIPES")
    assert not concept.mentioned_in("a candy with stripes") and not concept.mentioned_in("candy stripesy")


def vocabulary(*words):
    ids = {word: i for i, word in reversed([*enumerate(words)])}
    return DiffusersNetwork(MINI, nn.Identity(), (), SimpleNamespace(get_vocab=lambda: ids), None)


def test_vocabulary_words_are_whole_words_of_letters_in_id_order():
    network = vocabulary("zebra</w>", "str", "of</w>", "candy</w>", "a1b</w>", "<|end|>")
    assert network.words() == ["zebra", "candy"]


def test_decoys_are_of_the_targets_kind_and_never_use_its_words():
    network = vocabulary("candy</w>", "stripes</w>", "lava</w>", "moon</w>", "cup</w>")
    targets = [Concept("Candy_Stripes"), Concept("LAVA")]
    decoys = decoy_concepts(network, targets, 60, torch.Generator().manual_seed(0))
    assert len(decoys) == 60 and {concept.kind for concept in decoys} == {"style"}
    assert {word for concept in decoys for word in concept.name.split()} == {"moon", "cup"}


@pytest.mark.parametrize("anchor", ["moon", "Moon", "moon_"])
def test_decoys_leave_out_the_anchor_however_it_is_written(anchor):
    network = vocabulary("moon</w>", "cup</w>")
    decoys = decoy_concepts(network, [Concept("cat", "object", anchor)], 60, torch.Generator().manual_seed(0))
    assert "moon" not in {concept.name for concept in decoys} and "cup" in {
        concept.name for concept in decoys
    }


# --- configs


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrainingConfig(group="attn9"), "group is 'attn9'; choose one of kv, attn2"),
        (lambda: TrainingConfig(iterations=-1), "iterations is -1; give a number between 0 and 1000000"),
        (lambda: TrainingConfig(iterations=2.5), "iterations is 2.5"),
        (lambda: TrainingConfig(iterations="5"), "iterations is '5'"),
        (lambda: TrainingConfig(batch_size=0), "batch_size is 0"),
        (
            lambda: TrainingConfig(learning_rate=1.5),
            "learning_rate is 1.5; give a number between 0.0 and 1.0",
        ),
        (lambda: TrainingConfig(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: TrainingConfig(seed=-1), "seed is -1"),
        (lambda: SamplerConfig(steps=0), "steps is 0"),
        (lambda: SamplerConfig(guidance_scale=0.5), "guidance_scale is 0.5"),
        (lambda: ProjectionConfig(form="sideways"), "form is 'sideways'; choose one of update, reference"),
        (lambda: replace(TrainingConfig(), iterations=-5), "iterations is -5"),
        (
            lambda: TrainingConfig.from_json({"iterations": 3, "learning_rat": 1}),
            "no setting 'learning_rat'; it has .*learning_rate",
        ),
    ],
)
def test_setting_that_cannot_work_is_refused_with_its_value(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_limits_themselves_are_allowed():
    assert TrainingConfig(iterations=0, batch_size=1, learning_rate=1.0, seed=0) == TrainingConfig.from_json(
        {"iterations": 0, "batch_size": 1, "learning_rate": 1.0}
    )


@pytest.mark.parametrize("entry", [*METHODS, *REGULARIZERS], ids=lambda entry: entry.name)
def test_default_config_of_every_entry_comes_back_from_json(entry):
    config = entry.config()
    values = json.loads(json.dumps(config.to_json()))
    assert values["name"] == entry.name
    assert entry.config.from_json(values) == config


def test_stable_hash_is_that_of_sorted_compact_json():
    expected = hashlib.sha256(b'{"a":[1,"\\u00e9"],"b":0.5}').hexdigest()
    assert stable_hash({"b": 0.5, "a": [1, "é"]}) == expected


# --- requests


@pytest.fixture
def full_request(make_request):
    parts = make_request(regularizers=[entry.config() for entry in REGULARIZERS], seed=7)
    concepts = (Concept("Lava"), Concept("cat", "object", "star"))
    return replace(parts, concepts=concepts, anchor_sampler=SamplerConfig(steps=5), anchor_seed=3)


def test_a_request_is_made_into_json_once(full_request, monkeypatch):
    request, expected = replace(full_request), full_request.hash
    made, to_json = [], Concept.to_json
    monkeypatch.setattr(Concept, "to_json", lambda concept: made.append(concept) or to_json(concept))
    values = [request.to_json() for _ in range(3)]
    assert request.hash == stable_hash(values[0]) == expected
    assert made == [*request.concepts, *request.retain]
    values[0]["concepts"][0]["target"] = "changed by the caller"
    assert values[1] == request.to_json() != values[0]


def test_request_comes_back_from_json_with_the_same_hash(full_request):
    back = Request.from_json(json.loads(json.dumps(full_request.to_json())))
    assert back == full_request and back.hash == full_request.hash


def test_request_hash_depends_on_every_part(full_request):
    changes = {
        "concepts": full_request.concepts[:1],
        "method": replace(full_request.method, teacher="pretrained"),
        "regularizers": full_request.regularizers[::-1],
        "training": replace(full_request.training, seed=8),
        "retain": (),
        "anchor_prompts": ("a cup",),
        "anchor_count": 9,
        "anchor_sampler": SamplerConfig(steps=6),
        "anchor_seed": 4,
    }
    assert changes.keys() == full_request.to_json().keys()
    hashes = {replace(full_request, **{name: value}).hash for name, value in changes.items()}
    assert len(hashes | {full_request.hash}) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"concepts": ()}, "names no concept"),
        ({"anchor_prompts": ()}, "no anchor prompts"),
        ({"method": TrainingConfig()}, "no method ''; choose one of conabl"),
        ({"regularizers": (TrainingConfig(),)}, "no regularizer ''; choose one of .*projection"),
    ],
)
def test_request_that_lacks_something_is_refused(make_request, change, said):
    with pytest.raises(ConfigError, match=said):
        replace(make_request(), **change)


# --- registry and presets


@dataclass(frozen=True)
class ThingConfig(Config):
    size: int = setting(1, "Its size.")


@pytest.fixture
def things():
    registry = Registry("thing")
    details = {"display_name": "First", "description": "", "paper": ""}
    registry.register("first", config=ThingConfig, **details)(object)
    return registry


def test_registered_class_is_found_by_name_and_by_its_config(things):
    assert things.get("first") is things.of(ThingConfig(3)) and [entry.name for entry in things] == ["first"]


@pytest.mark.parametrize(
    "name", ["first", "", "Second", "2nd", "with-dash", "with space", "_hidden", "second\n"]
)
def test_registry_refuses_duplicate_and_ill_formed_names(things, name):
    with pytest.raises(ConfigError, match="thing name .* is taken or not lower_snake_case"):
        things.register(name, config=ThingConfig)
    assert [entry.name for entry in things] == ["first"]


def test_unknown_name_is_refused_with_the_names_there_are(things):
    with pytest.raises(ConfigError, match="no thing 'third'; choose one of first"):
        things.get("third")


def test_unknown_preset_is_refused_with_the_presets_there_are():
    with pytest.raises(ConfigError, match="no preset 'best'; choose one of .*recommended"):
        preset("best")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_request_that_travels_as_json(name):
    request = preset(name).request(
        [Concept("Lava")], retain=[Concept("Frost")], anchor_prompts=["a cup"], seed=5, anchor_seed=6
    )
    assert (request.training.seed, request.anchor_seed, request.retain) == (5, 6, (Concept("Frost"),))
    assert Request.from_json(request.to_json()) == request


# --- noise schedule


def test_noise_schedule_is_diffusers_scaled_linear_one():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    torch.testing.assert_close(DiscreteProcess().alphas_cumprod, theirs.alphas_cumprod, atol=1e-6, rtol=0)
    with_noise = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    noisy = DiscreteProcess("v_prediction", ends_in_noise=True).alphas_cumprod
    torch.testing.assert_close(noisy, with_noise.alphas_cumprod, atol=1e-6, rtol=0)
    assert noisy[-1] == 0 and noisy[0] == pytest.approx(1 - 0.00085, abs=1e-6)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        DiscreteProcess().noised(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps)
    )


def test_a_trained_method_in_a_preset_without_training_is_trained_as_by_the_preset_trained():
    esd, trained = ESDConfig(), PRESETS["trained"]
    request = resolve("recommended", MINI, [Concept("Lava")], [], Overrides(esd, seed=3))
    expected = resolve("trained", MINI, [Concept("Lava")], [], Overrides(esd, seed=3))
    assert request == expected and request.training.iterations == trained.training.iterations > 0
    assert resolve("recommended", MINI, [Concept("Lava")]).training.iterations == 0


def test_settings_of_a_user_replace_those_of_the_preset_and_no_others():
    chosen = preset("trained").with_settings({"iterations": 7, "anchor_count": 9, "anchor_steps": 3})
    request = chosen.request([Concept("Lava")], retain=[], anchor_prompts=["a cup"], seed=5)
    assert (request.training.iterations, request.anchor_count, request.anchor_sampler.steps) == (7, 9, 3)
    assert request.training.learning_rate == PRESETS["trained"].training.learning_rate
