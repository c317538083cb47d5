"""An update whose gradients overflow in fp16 is left out, and every part goes on as without one."""

import math

import pytest
import torch
from short import SHORT

from cul_core.base.registry import Entry
from cul_core.concepts.concept import Concept
from cul_core.methods import METHODS
from cul_core.methods.base import Method
from cul_core.methods.sculpmem import SculpMem, SculpMemConfig
from cul_core.models.load_diffusers import NetworkCache
from cul_core.parts.prompt_vectors import target_vector
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.base import Regularizer
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.regularizers.weight_anchor import L1SPConfig
from cul_core.training.compute import Compute
from cul_core.training.step import run_step

FP16 = Compute(dtype="float16")
RETAIN = ("Navy_Stripes", "Lava")


class Overflow(Regularizer):
    """Makes one gradient infinite in one update; changes nothing else."""

    at = 0
    handles: list = []
    skipped: list = []

    def prepare_mask(self, context, allowed_subspace):
        self.update = 0
        weight = context.network.weights("all")[min(context.start)]
        self.handles.append(weight.register_hook(lambda g: g * math.inf if self.update == self.at else g))

    def penalty(self, weights):
        self.update += 1

    def update_skipped(self, iteration):
        self.skipped.append(iteration)


@pytest.fixture(scope="module")
def low_networks():
    return NetworkCache()


@pytest.fixture
def step(random_model, low_networks, anchors, make_request, monkeypatch):
    """Runs a step in fp16 whose update `at` overflows; (edited model, report, updates left out)."""
    config = type("OverflowConfig", (L1SPConfig,), {"registry_name": "overflow"})
    entry = Entry("overflow", Overflow, config, "d", "d", "p")
    monkeypatch.setitem(REGULARIZERS._entries, "overflow", entry)

    def run(at, regularizers=(), **settings):
        told = []
        monkeypatch.setattr(Overflow, "at", at)
        monkeypatch.setattr(Overflow, "handles", [])
        monkeypatch.setattr(Overflow, "skipped", [])
        monkeypatch.setattr(Method, "update_skipped", lambda self, iteration: told.append(iteration))
        settings = {"batch_size": 1, "retain": RETAIN} | settings
        request = make_request(regularizers=[*regularizers, config()], **settings)
        try:
            edited, report = run_step(
                random_model, request, store=anchors, networks=low_networks, compute=FP16
            )
        finally:
            for handle in Overflow.handles:
                handle.remove()
        assert told == Overflow.skipped
        return edited, report, told

    return run


def changed(edited, name):
    return (edited.edits[name] != 0).sum().item() if name in edited.edits else 0


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", [entry.name for entry in METHODS if not entry.cls.is_closed_form])
def test_every_method_goes_on_after_an_overflow(name, at, step):
    edited, report, skipped = step(at, method=METHODS.get(name).config(**SHORT.get(name, {})), iterations=3)
    assert skipped == [at] and len(report.losses) == 3
    assert len(edited.edits) == 14 and all(torch.isfinite(delta).all() for delta in edited.edits.values())


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", [entry.name for entry in REGULARIZERS])
def test_every_regularizer_goes_on_after_an_overflow(name, at, step):
    edited, report, skipped = step(at, [REGULARIZERS.get(name).config(**SHORT.get(name, {}))], iterations=3)
    assert skipped == [at] and len(report.losses) == 3
    assert edited.edits and all(torch.isfinite(delta).all() for delta in edited.edits.values())


@pytest.mark.parametrize("at", [1, 2])
def test_selft_leaves_all_but_its_share_after_an_overflow(at, step):
    edited, report, _ = step(at, [SelFTConfig(states=2)], iterations=3, weight_decay=0.1)
    allowed = report.figures["changeable_weights"]
    assert 0 < sum(changed(edited, name) for name in edited.edits) <= allowed


@pytest.mark.parametrize("at", [1, 2])
def test_a_projection_protects_what_it_protects_after_an_overflow(at, step, low_networks, random_model):
    edited, *_ = step(at, [ProjectionConfig()], iterations=3, learning_rate=1e-2, weight_decay=0.1)
    network = low_networks.get(random_model.source, "cpu", torch.float16)
    kept = torch.stack([target_vector(network, Concept(name)) for name in RETAIN])
    exact = network.exact(list(edited.edits))
    assert len(edited.edits) == 14
    for name, delta in edited.edits.items():
        assert (delta.double() @ kept.T).norm() < 1e-5 * (exact[name].double() @ kept.T).norm()


# --- SculpMem, whose mask depends on the number of updates


@pytest.mark.parametrize("at", [2, 3])
def test_an_overflow_in_sculpmems_warm_up_costs_no_mask(at, step, random_model, low_networks):
    method = SculpMemConfig(warm_up=2, interval=100, active_fraction=0.1)
    edited, *_ = step(at, method=method, iterations=5)
    network = low_networks.get(random_model.source, "cpu", torch.float16)
    for name, weight in network.weights("text_readers").items():
        active = math.floor(0.1 * weight.numel())
        assert 0.9 * active < changed(edited, name) <= active


@pytest.fixture
def masks(monkeypatch):
    """SculpMem's masks after the backward of every update that was not left out."""
    seen, original = [], SculpMem.after_backward

    def after_backward(self, iteration, weights, optimizer):
        applies = original(self, iteration, weights, optimizer)
        seen.append({name: mask.clone() for name, mask in self._masks.items()})
        return applies

    monkeypatch.setattr(SculpMem, "after_backward", after_backward)
    return seen


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_overflow_moves_sculpmems_exchanges_by_one_iteration(at, step, masks):
    step(at, method=SculpMemConfig(warm_up=1, interval=2, turnover=0.5), iterations=8)
    assert len(masks) == 7
    name = min(masks[0])
    moved = [not torch.equal(masks[n][name], masks[n + 1][name]) for n in range(6)]
    assert moved == [False, True, False, True, False, True]
