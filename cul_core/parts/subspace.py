"""Protected text directions, on which a matrix's change must not act: joined exactly, in fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def orthonormal_basis(rows: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormal basis (d, r) of the span of rows (n, d), by SVD in fp64.

    Directions whose singular value is at most `tolerance` times the largest are dropped.
    """
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    return right[values > tolerance * values[:1]].T


def complement_basis(basis: Tensor) -> Tensor:
    """Orthonormal basis (d, d - r) of the orthogonal complement of a basis (d, r), in fp64.

    The complete QR decomposition gives a product of r Householder reflections, so the basis vectors are the
    axes plus a rank-r correction. Coordinates that are sparse in this basis are nearly sparse in the axes.
    """
    return torch.linalg.qr(basis.double(), mode="complete").Q[:, basis.shape[1] :]


@dataclass(frozen=True, eq=False)
class Subspace:
    """Text directions on which a matrix's change must not act, and text whose response is only damped.

    Args:
        width: width d of the text rows.
        protected: orthonormal basis (d, r) of the protected directions; None if there are none.
        moment: second moment (d, d) of the text rows whose response is damped; None if there are none.
    """

    width: int
    protected: Tensor | None = None
    moment: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Subspace]) -> Subspace:
        """The subspace that protects the joint span of several, and damps the sum of their moments."""
        if len(parts) == 1:
            return parts[0]
        bases = [part.protected.T for part in parts if part.protected is not None]
        moments = [part.moment for part in parts if part.moment is not None]
        return cls(
            parts[0].width,
            orthonormal_basis(torch.cat(bases)) if bases else None,
            sum(moments) if moments else None,
        )

    @cached_property
    def allowed(self) -> Tensor:
        """Orthonormal basis B (d, m) of the allowed directions, the complement of the protected ones.

        With a moment M the basis diagonalizes B^T M B, so that a mask of coordinates never raises the mean
        square response to the damped text.
        """
        if self.protected is None:
            free = torch.eye(self.width, dtype=torch.float64)
        else:
            free = complement_basis(self.protected)
        if self.moment is None:
            return free
        return free @ torch.linalg.eigh(free.T @ self.moment @ free).eigenvectors
