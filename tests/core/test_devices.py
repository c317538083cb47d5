"""A whole step on a device without fp64, such as Apple's GPUs, by every method and regularizer, in every
form."""

from dataclasses import fields, replace

import pytest
import torch
from fake_device import DEVICE, OnDevice, on_device
from short import SHORT

from cul_core.base.last_result import LastResult
from cul_core.methods import METHODS
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.sampling import SamplerConfig
from cul_core.parts.prompt_vectors import prompt_rows
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.store.anchors import AnchorStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.step import run_step


class Placed:
    """A cache of one network."""

    def __init__(self, network):
        self.network, self.last_result = network, LastResult()

    def get(self, *asked):
        return self.network


@pytest.fixture(scope="module")
def placed(random_model):
    network = NetworkCache().get(random_model.source)
    with on_device(network):
        yield Placed(network)


@pytest.fixture(scope="module")
def far_anchors():
    return AnchorStore()


@pytest.fixture
def both(random_model, placed, far_anchors, networks, anchors):
    """Losses of a step on the device, and of the same step on the CPU."""

    def run(request, **options):
        request = replace(request, anchor_count=2, anchor_sampler=SamplerConfig(steps=2))
        _, there = run_step(random_model, request, store=far_anchors, networks=placed, **options)
        _, here = run_step(random_model, request, store=anchors, networks=networks["random"], **options)
        return list(there.losses), list(here.losses)

    return run


def test_the_device_refuses_fp64_and_holds_what_it_is_given(placed):
    numbers = torch.arange(12.0).view(3, 4)
    there = numbers.to(DEVICE)
    assert isinstance(there, OnDevice) and there.device == DEVICE
    assert (there[[0, 2]] @ there.T).cpu().equal(numbers[[0, 2]] @ numbers.T)
    assert there.cpu().double().dtype == torch.float64
    for wide in (
        lambda: there.double(),
        lambda: there.to("cpu", torch.float64),
        lambda: numbers.double().to(DEVICE),
    ):
        with pytest.raises(TypeError, match="float64"):
            wide()
    with pytest.raises(RuntimeError, match="on the device and on the CPU"):
        there @ numbers.T
    assert placed.network.device == DEVICE


def short_methods():
    return [pytest.param(entry.config(**SHORT.get(entry.name, {})), id=entry.name) for entry in METHODS]


@pytest.mark.parametrize("method", short_methods())
def test_every_method_trains_without_fp64(method, both, make_request):
    there, here = both(make_request(method=method, iterations=2))
    assert there == pytest.approx(here, rel=1e-3)


def forms():
    """Every regularizer in each of its forms; the projection also damped, which needs more of the linear
    algebra."""
    for entry in REGULARIZERS:
        form = next((field for field in fields(entry.config) if field.name == "form"), None)
        for values in [{}] if form is None else [{"form": choice} for choice in form.metadata["choices"]]:
            yield pytest.param(
                entry.config(**SHORT.get(entry.name, {}), **values),
                id=" ".join([entry.name, *values.values()]),
            )
    yield pytest.param(ProjectionConfig(decoys=8, auxiliary="objects"), id="projection damped")
    yield pytest.param(ProjectionConfig(decoys=8, form="reference"), id="projection reference damped")


@pytest.mark.parametrize("regularizer", list(forms()))
def test_every_regularizer_holds_without_fp64(regularizer, both, make_request):
    there, here = both(make_request(regularizers=[regularizer], iterations=1))
    assert there == pytest.approx(here, rel=1e-3)


def test_previews_need_no_fp64(both, make_request):
    seen = []
    watch = Callbacks(
        on_preview=lambda *shown: seen.append(shown), preview_prompts=("a cat",), preview_every=1
    )
    there, here = both(make_request(iterations=1), callbacks=watch)
    assert there == pytest.approx(here, rel=1e-3) and all(latents.device.type == "cpu" for _, latents in seen)


@pytest.mark.parametrize("rows", ["mean", "last", "content", "all"])
def test_vectors_of_prompts_are_fp64_on_the_cpu(rows, placed):
    vectors = prompt_rows(placed.network, ["a cat", "a red house"], rows)
    assert vectors.dtype == torch.float64 and not isinstance(vectors, OnDevice)
