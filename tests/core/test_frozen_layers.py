"""Layers that keep less: what they give, what they keep, and when they are PyTorch's own."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn
from torch.utils.checkpoint import checkpoint

from cul_core.models.frozen_layers import FrozenConv2d, FrozenLinear, product, replace_frozen_layers

_LAYERS = {
    "linear": (nn.Linear(40, 24), (3, 7, 40)),
    "linear without bias": (nn.Linear(40, 24, bias=False), (5, 40)),
    "convolution of few positions": (nn.Conv2d(24, 16, 3, padding=1), (2, 24, 6, 7)),
    "of few, with stride": (nn.Conv2d(24, 16, 3, stride=2, padding=1), (2, 24, 7, 6)),
    "of few, pointwise, without bias": (nn.Conv2d(24, 16, 1, bias=False), (2, 24, 5, 5)),
    "of few, dilated": (nn.Conv2d(24, 16, 3, padding=(2, 1), dilation=(2, 1)), (1, 24, 8, 6)),
    "of few, in groups": (nn.Conv2d(24, 16, 3, groups=2), (1, 24, 8, 6)),
    "convolution of many positions": (nn.Conv2d(24, 16, 3, padding=1), (2, 24, 16, 20)),
    "gate": (GEGLU(40, 24), (3, 7, 40)),
}
_SAME_BITS = ("convolution of many positions", "of few, in groups")


def _pair(name, dtype=torch.float32):
    """(PyTorch's layer, ours, an input), with equal frozen weights."""
    layer, shape = _LAYERS[name]
    layer = copy.deepcopy(layer).to(dtype).requires_grad_(False)
    return (
        layer,
        replace_frozen_layers(copy.deepcopy(layer)),
        torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),
    )


def _run(layer, rows):
    """(output, gradient of the input, bytes kept for the backward pass beside weights)."""
    rows = rows.clone().requires_grad_(True)
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in layer.parameters()}

    def keep(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(rows)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return output.detach(), rows.grad, sum(kept.values())


@pytest.mark.parametrize("name", _LAYERS)
def test_output_and_gradient_are_pytorchs(name):
    theirs, ours, rows = _pair(name)
    for a, b in zip(_run(theirs, rows)[:2], _run(ours, rows)[:2], strict=True):
        assert a.shape == b.shape and a.abs().max() > 0.1
        assert torch.equal(a, b) if name in _SAME_BITS else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", _LAYERS)
def test_other_precisions_are_pytorchs_to_the_bit(name, dtype):
    theirs, ours, rows = _pair(name, dtype)
    for a, b in zip(_run(theirs, rows)[:2], _run(ours, rows)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in _LAYERS if "linear" not in name])
def test_less_is_kept(name):
    theirs, ours, rows = _pair(name)
    kept, less = _run(theirs, rows)[2], _run(ours, rows)[2]
    if name == "gate":  # the products remain, gelu of half of them is computed again
        assert (kept, less) == (3 * 7 * 24 * 4 * 3, 3 * 7 * 24 * 4 * 2)
    else:
        assert kept >= rows.nbytes and less == 0


@pytest.mark.parametrize("name", _LAYERS)
def test_a_trained_layer_is_pytorchs_to_the_bit(name):
    theirs, ours, rows = _pair(name)
    for layer in (theirs, ours):
        layer.requires_grad_(True)
    for a, b in zip(_run(theirs, rows)[:2], _run(ours, rows)[:2], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.any()


@pytest.mark.parametrize("name", _LAYERS)
def test_on_other_devices_a_layer_is_pytorchs(name, monkeypatch):
    """No GPU has timed the layers, so a device other than the CPU gets what it always had."""
    _, ours, rows = _pair(name)
    for kind in ("_Linear", "_Convolution", "_Gate"):
        monkeypatch.setattr(f"cul_core.models.frozen_layers.{kind}", None)  # a call of it would fail
    assert ours.to("meta")(rows.to("meta")).device.type == "meta"
    with pytest.raises(AttributeError):
        ours.to_empty(device="cpu")(rows)


def test_products_without_onednn(monkeypatch):
    _, ours, rows = _pair("linear")
    expected = _run(ours, rows)
    monkeypatch.setattr("cul_core.models.frozen_layers._HAS_ONEDNN", False)
    for a, b in zip(expected[:2], _run(ours, rows)[:2], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        product(rows, ours.weight, ours.bias), nn.functional.linear(rows, ours.weight, ours.bias)
    )


def test_a_network_is_turned_in_place_and_only_where_it_is_pytorchs():
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1), Own(2, 2), nn.GroupNorm(1, 2))
    weights = dict(network.named_parameters())
    assert replace_frozen_layers(network) is network and replace_frozen_layers(network) is network
    assert [type(layer) for layer in network] == [FrozenLinear, FrozenConv2d, Own, nn.GroupNorm]
    assert all(weight is weights[name] for name, weight in network.named_parameters())


class _Network(nn.Module):
    def __init__(self, is_checkpointed=False):
        super().__init__()
        torch.manual_seed(1)
        self.layers = replace_frozen_layers(
            nn.Sequential(nn.Conv2d(4, 40, 3, padding=1), nn.Flatten(2), GEGLU(36, 12), nn.Linear(12, 3))
        )
        self.requires_grad_(False)
        self.is_checkpointed = is_checkpointed

    def forward(self, rows):
        return (
            checkpoint(self.layers, rows, use_reentrant=False) if self.is_checkpointed else self.layers(rows)
        )


def test_layers_can_be_compiled_and_checkpointed():
    rows = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    plain = _run(_Network(), rows)
    for other in (
        torch.compile(_Network(), backend="aot_eager", fullgraph=True),
        _Network(is_checkpointed=True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain[:2], _run(other, rows)[:2], strict=True))
