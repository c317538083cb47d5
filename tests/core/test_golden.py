"""Every preset does what it did: to the bit where `golden.json` was recorded, within rounding elsewhere."""

import json

import pytest
import torch
from golden import MERGERS, PATH, PRESETS, Golden, environment, step_keys

GOLDEN = json.loads(PATH.read_text(encoding="utf-8"))
ROUNDING = 2e-3


@pytest.fixture(scope="module")
def golden():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Golden()
    torch.set_num_threads(threads)


def check(found, recorded):
    if environment() == GOLDEN["environment"]:
        assert found["hashes"] == recorded["hashes"]
    assert found["norm"] == pytest.approx(recorded["norm"], rel=ROUNDING)
    for losses, before in zip(found["losses"], recorded["losses"], strict=True):
        assert losses == pytest.approx(before, rel=ROUNDING)


def test_the_record_is_whole():
    assert GOLDEN["presets"].keys() == PRESETS.keys() and GOLDEN["mergers"].keys() == {
        entry.name for entry in MERGERS
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_chain_by_every_preset_has_the_recorded_weights(golden, name):
    check(golden.chain(name), GOLDEN["presets"][name])


@pytest.mark.parametrize("name", [entry.name for entry in MERGERS])
def test_every_merger_makes_the_recorded_weights(golden, name):
    check(golden.merged(name), GOLDEN["mergers"][name])


def test_every_step_has_the_recorded_key():
    assert step_keys() == GOLDEN["step_keys"]
