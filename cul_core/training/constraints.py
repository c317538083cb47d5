"""Hard constraints of all parts of a step, masks and protected subspaces, on the actual weight change."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..parts.part import Part
from ..parts.subspace import Subspace


class Constraints:
    """Joined hard constraints of the parts of a step; use it once every `Part.prepare` has run.

    The order is a contract: every part's `constrain`, the last part's first, so that their product is adjoint
    to that of `transform_gradient`; then the product of all masks and the joined subspace. If a matrix is
    limited to a subspace with orthonormal basis B, its mask acts on coordinates: the change D becomes
    ((D B) * mask) B^T, exactly orthogonal to the protected directions and exactly sparse in B.

    Args:
        parts: of the step, in their order.
        device: of the changes.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device | str):
        self._parts, self._device = parts, device
        self._joined: dict[tuple[Subspace, ...], Subspace] = {}
        self._placed: dict[tuple[Subspace, str], Tensor] = {}

    def _subspace(self, name: str) -> Subspace | None:
        found = (part.subspace(name) for part in self._parts)
        subspaces = tuple(subspace for subspace in found if subspace is not None)
        if not subspaces:
            return None
        if subspaces not in self._joined:
            self._joined[subspaces] = Subspace.join(subspaces)
        return self._joined[subspaces]

    def _on_device(self, subspace: Subspace, which: str) -> Tensor:
        key = subspace, which
        if key not in self._placed:
            self._placed[key] = getattr(subspace, which).float().to(self._device)
        return self._placed[key]

    def allowed_subspace(self, name: str) -> Tensor | None:
        """Orthonormal basis B (d, m), fp32, of the subspace allowed for a matrix; None if it has no limit."""
        subspace = self._subspace(name)
        return None if subspace is None else self._on_device(subspace, "allowed")

    def allowed(self, name: str, change: Tensor) -> Tensor:
        """The change of weight `name` that satisfies all constraints, in the shape of `change`."""
        for part in reversed(self._parts):
            change = part.constrain(name, change)
        masks = [mask for part in self._parts if (mask := part.mask(name, change)) is not None]
        mask, subspace = math.prod(masks[1:], start=masks[0]) if masks else None, self._subspace(name)
        if subspace is None:
            return change if mask is None else change * mask
        if mask is not None:
            basis = self._on_device(subspace, "allowed")
            return ((change @ basis) * mask) @ basis.T
        if subspace.protected is None:
            return change
        protected = self._on_device(subspace, "protected")
        return change - (change @ protected) @ protected.T
