"""Layers whose weights are frozen: they keep less of a forward pass for the backward pass than PyTorch's, and
on a CPU take less time.

What a layer gives on other devices is bit for bit what PyTorch's gives. On a CPU fp32 products are oneDNN's
instead of MKL's, which does not use all of an AMD processor's vector units.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

_FEW_POSITIONS = 256
"""Up to so many output positions of a batch, a convolution's time goes into bringing its weights into
oneDNN's order; a product takes them as they are."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_for_onednn(rows: Tensor) -> bool:
    return _HAS_ONEDNN and rows.device.type == "cpu" and rows.dtype == torch.float32


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `torch.nn.functional.linear` does: (..., m) of rows (..., n), weight (m, n) and bias (m,)."""
    if not _is_for_onednn(rows):
        return F.linear(rows, weight, bias)
    # not public: used only here
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return product(gradient, ctx.saved_tensors[0].t()), None, None


class _Convolution(torch.autograd.Function):
    """PyTorch keeps a convolution's input even if no weight needs gradients; those of the input need only its
    shape."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, picture: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = picture.shape, geometry
        return F.conv2d(picture, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *[None] * (2 + len(ctx.geometry))


class _Gate(torch.autograd.Function):
    """a * gelu(b) of (..., 2 n) numbers, a the first n and b the rest; gelu(b) is computed again instead of
    kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        passed, gate = rows.chunk(2, -1)
        return F.gelu(gate).mul_(passed)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        passed, gate = ctx.saved_tensors[0].chunk(2, -1)
        return torch.cat(
            [F.gelu(gate).mul_(gradient), torch.ops.aten.gelu_backward(gradient * passed, gate)], -1
        )


def _is_trained(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters(recurse=False))


class FrozenLinear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN while it is frozen."""

    def forward(self, rows: Tensor) -> Tensor:
        if _is_trained(self) or not _is_for_onednn(rows):
            return super().forward(rows)
        return _Linear.apply(rows, self.weight, self.bias)


class FrozenConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that keeps its input only while it is trained itself."""

    def forward(self, picture: Tensor) -> Tensor:
        if _is_trained(self) or picture.device.type != "cpu":
            return super().forward(picture)
        if self.groups == 1 and _is_for_onednn(picture):
            sides = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip(
                    picture.shape[-2:],
                    self.padding,
                    self.dilation,
                    self.kernel_size,
                    self.stride,
                    strict=True,
                )
            ]
            if len(picture) * sides[0] * sides[1] <= _FEW_POSITIONS:
                patches = F.unfold(
                    picture, self.kernel_size, self.dilation, self.padding, self.stride
                ).transpose(1, 2)
                made = _Linear.apply(patches, self.weight.flatten(1), self.bias)
                return made.transpose(1, 2).reshape(len(picture), self.out_channels, *sides)
        return _Convolution.apply(
            picture, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


@lru_cache(maxsize=1)
def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """PyTorch's and diffusers' layers -> ours; diffusers is loaded for it."""
    from diffusers.models.activations import GEGLU

    class FrozenGEGLU(GEGLU):
        def forward(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return _Gate.apply(self.proj(rows)) if rows.device.type == "cpu" else super().forward(rows)

    return {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d, GEGLU: FrozenGEGLU}


def replace_frozen_layers(network: nn.Module) -> nn.Module:
    """Turns the layers of a network into those of this module, and returns it."""
    for module in network.modules():
        module.__class__ = _kinds().get(type(module), type(module))
    return network
