"""Channel pruning of TAESD decoders with dead (all-zero) channels, for faster decoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, conv: nn.Sequential):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _slice(conv: nn.Conv2d, rows: Tensor, columns: Tensor) -> nn.Conv2d:
    small = nn.Conv2d(
        len(columns), len(rows), conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
    )
    small.weight.data = conv.weight.data[rows][:, columns].clone()
    if conv.bias is not None:
        small.bias.data = conv.bias.data[rows].clone()
    return small


def _live(conv: nn.Conv2d, columns: Tensor) -> Tensor:
    """Output channels that can be nonzero when only the input channels `columns` are."""
    alive = conv.weight.data[:, columns].flatten(1).abs().sum(1)
    return (alive if conv.bias is None else alive + conv.bias.data.abs()).nonzero().flatten()


def prune_decoder(layers: nn.Sequential) -> nn.Sequential:
    """A decoder equal to `layers` (of diffusers' `DecoderTiny`) up to rounding, without dead channels."""
    live, out, last = torch.arange(layers[0].in_channels), [], len(layers) - 1
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            rows = torch.arange(layer.out_channels) if index == last else _live(layer, live)
            out.append(_slice(layer, rows, live))
            live = rows
        elif hasattr(layer, "fuse"):
            first, second, third = (layer.conv[i] for i in (0, 2, 4))
            one = _live(first, live)
            two = _live(second, one)
            added = _live(third, two)
            if not len(added):
                out.append(nn.ReLU())
                continue
            if not torch.isin(added, live).all():
                return layers  # the block revives a pruned channel, so the decoder stays as it is
            out.append(
                _Block(
                    nn.Sequential(
                        _slice(first, one, live),
                        nn.ReLU(),
                        _slice(second, two, one),
                        nn.ReLU(),
                        _slice(third, live, two),
                    )
                )
            )
        else:
            out.append(layer)
    return nn.Sequential(*out).eval().requires_grad_(False)
