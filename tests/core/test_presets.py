"""Descriptions of presets are shown for every model family, so they hold on each, or name MiniCanvas."""

import re
from dataclasses import replace

import pytest

from cul_core.audits.memorization import MEMORIZATION
from cul_core.models.family import FAMILIES
from cul_core.requests.presets import PRESETS

CLAIM = re.compile(
    r"\b(batch|iterations|images per update|pictures per update|learning rate|rate|times?|twice|half as"
    r"|thrice|slow|slower|fast|faster|quick|quicker|minutes|hours)\b",
    re.IGNORECASE,
)
OVERWRITTEN = ("iterations", "batch_size", "learning_rate")
ALL = {**PRESETS, "memorization": MEMORIZATION}


def overwriting_families(preset):
    """Names of the families on which the preset trains with other values than its own."""
    return [
        family.name
        for family in FAMILIES.values()
        if any(
            getattr(preset.for_family(family).training, name) != getattr(preset.training, name)
            for name in OVERWRITTEN
        )
    ]


def unfounded_claims(description):
    """Sentences about batch, time or rate that do not say which family they are about."""
    sentences = re.split(r"(?<=[.;])\s", description)
    return [text for text in sentences if CLAIM.search(text) and "MiniCanvas" not in text]


@pytest.mark.parametrize("name", ALL)
def test_no_description_claims_a_batch_a_time_or_a_rate_that_a_family_overwrites(name):
    preset = ALL[name]
    if families := overwriting_families(preset):
        claims = unfounded_claims(preset.description)
        assert not claims, f"{name} trains with other values on {families}, so it must not claim: {claims}"


def test_what_two_descriptions_claim_of_minicanvas_is_true():
    trained = PRESETS["trained"].training
    assert PRESETS["thorough"].training.batch_size == 2 * trained.batch_size
    assert PRESETS["plain_ours"].training.learning_rate == pytest.approx(trained.learning_rate / 3)


def test_the_recommended_preset_is_the_exact_chain_under_another_description():
    recommended, exact = PRESETS["recommended"], PRESETS["exact"]
    assert replace(recommended, description="") == replace(exact, description="")
    assert recommended.description != exact.description


def test_the_check_sees_claims_that_hold_on_minicanvas_only():
    assert "sd1" in overwriting_families(PRESETS["thorough"])
    assert unfounded_claims("The recommended way with twice the pictures per update, in twice the time.")
    assert unfounded_claims("With nothing to hold the rest but a slow rate.")
    assert unfounded_claims("On MiniCanvas it forgets as much. It takes twice the time.")
    assert not unfounded_claims("Trained again. On MiniCanvas it takes twice the time.")
