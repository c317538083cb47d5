"""Layers for frozen weights, which save fewer activations for the backward pass and are faster on a CPU.

On other devices their outputs are bit for bit PyTorch's. On a CPU, fp32 matrix products use oneDNN instead of
MKL, which does not use all vector units of AMD processors.
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
"""Up to this many output positions in a batch, im2col and a matrix product are faster than a convolution: its
time is dominated by oneDNN's weight reordering."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_for_onednn(inputs: Tensor) -> bool:
    return _HAS_ONEDNN and inputs.device.type == "cpu" and inputs.dtype == torch.float32


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., m) from inputs (..., n), weight (m, n) and bias (m,)."""
    if not _is_for_onednn(inputs):
        return F.linear(inputs, weight, bias)
    # not public: used only here
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return product(gradient, ctx.saved_tensors[0].t()), None, None


class _Convolution(torch.autograd.Function):
    """Convolution that saves its weight and its input's shape; PyTorch's saves the input as well."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, images: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = images.shape, geometry
        return F.conv2d(images, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *[None] * (2 + len(ctx.geometry))


class _Gate(torch.autograd.Function):
    """GEGLU's gate a * gelu(b) for inputs (..., 2n) = [a, b]; gelu(b) is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        passed, gate = inputs.chunk(2, -1)
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
    """`torch.nn.Linear` that uses oneDNN on a CPU while its weights are frozen."""

    def forward(self, inputs: Tensor) -> Tensor:
        if _is_trained(self) or not _is_for_onednn(inputs):
            return super().forward(inputs)
        return _Linear.apply(inputs, self.weight, self.bias)


class FrozenConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that saves its input (b, c, h, w) only while its own weights are trained."""

    def forward(self, images: Tensor) -> Tensor:
        if _is_trained(self) or images.device.type != "cpu":
            return super().forward(images)
        if self.groups == 1 and _is_for_onednn(images):
            sides = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip(
                    images.shape[-2:],
                    self.padding,
                    self.dilation,
                    self.kernel_size,
                    self.stride,
                    strict=True,
                )
            ]
            if len(images) * sides[0] * sides[1] <= _FEW_POSITIONS:
                patches = F.unfold(
                    images, self.kernel_size, self.dilation, self.padding, self.stride
                ).transpose(1, 2)
                outputs = _Linear.apply(patches, self.weight.flatten(1), self.bias)
                return outputs.transpose(1, 2).reshape(len(images), self.out_channels, *sides)
        return _Convolution.apply(
            images, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


@lru_cache(maxsize=1)
def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """Layer class of PyTorch or diffusers -> its replacement; imports diffusers."""
    from diffusers.models.activations import GEGLU

    class FrozenGEGLU(GEGLU):
        def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return _Gate.apply(self.proj(inputs)) if inputs.device.type == "cpu" else super().forward(inputs)

    return {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d, GEGLU: FrozenGEGLU}


def replace_frozen_layers(network: nn.Module) -> nn.Module:
    """The network, with its layers replaced in place by those of this module."""
    for module in network.modules():
        module.__class__ = _kinds().get(type(module), type(module))
    return network
