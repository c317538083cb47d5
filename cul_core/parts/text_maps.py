"""Low-rank maps of text rows, solved in closed form: W' = W (I + U V^T) for every matrix W that reads
text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INDEPENDENT = 1e-9
"""Relative singular value below which a direction counts as a combination of others."""


@dataclass(frozen=True, eq=False)
class TextMap:
    """The map I + up @ down of text rows (as columns), in fp64.

    Args:
        up: (d, n).
        down: (n, d).
    """

    up: Tensor
    down: Tensor

    def change(self, weight: Tensor) -> Tensor:
        """W up down, the change (out, d) of a matrix (out, d) that reads mapped rows; in fp64."""
        return (weight @ self.up) @ self.down

    def __call__(self, rows: Tensor) -> Tensor:
        """Mapped rows (n, d)."""
        return rows + (rows @ self.down.T) @ self.up.T


def damped(moment: Tensor, damping: float) -> Tensor:
    """moment + damping trace(moment) / d I.

    Args:
        moment: second moment (d, d), in fp64.
        damping: share of the mean variance that is added to every direction.
    """
    width = len(moment)
    return moment + damping * moment.trace() / width * torch.eye(width, dtype=moment.dtype)


def whitener(moment: Tensor, damping: float) -> Tensor:
    """The Cholesky factor L (d, d), lower triangular, of the damped second moment S; see `damped`."""
    return torch.linalg.cholesky(damped(moment, damping))


def principal_directions(differences: Tensor, factor: Tensor, count: int) -> Tensor:
    """Orthonormal left singular vectors (d, m) of L^-1 differences^T, the m <= count largest.

    Args:
        differences: (n, d), n at most d.
        factor: L (d, d).
        count: number of directions.
    """
    whitened = torch.linalg.solve_triangular(factor, differences.T, upper=False)
    values, vectors = torch.linalg.eigh(whitened.T @ whitened)
    kept = [i for i in range(len(values) - 1, -1, -1) if values[i] > _INDEPENDENT**2 * values[-1]][:count]
    return whitened @ vectors[:, kept] / values[kept].sqrt()


def removal(directions: Tensor, factor: Tensor, strengths: Tensor) -> TextMap:
    """The map that removes directions with the least mean change of kept text.

    At strength 1, I + M = I - L Q Q^T L^-1, where Q is an orthonormal basis of `directions`. It annihilates
    L Q. Of all maps that do, it has the least mean square change tr(M S M^T) of text with the second moment
    S = L L^T. Other strengths scale each direction's share, M = -L U diag(s) U^+ L^-1.

    Args:
        directions: U (d, n), unit columns in whitened space.
        factor: L (d, d).
        strengths: s (n,), 0 to 1.
    """
    left, values, right = torch.linalg.svd(directions, full_matrices=False)
    kept = values > _INDEPENDENT * values[:1]
    inverse = (right[kept].T / values[kept]) @ left[:, kept].T
    if bool((strengths == 1).all()):
        basis = left[:, kept]
        up, dual = -factor @ basis, basis.T
    else:
        up, dual = -factor @ directions * strengths, inverse
    down = torch.linalg.solve_triangular(factor.T, dual.T, upper=True).T
    return TextMap(up, down.contiguous())


def with_goals(removed: TextMap, directions: Tensor, factor: Tensor, rows: Tensor, goals: Tensor) -> TextMap:
    """A `removal` at strength 1, and what brings rows nearer to their goals without undoing it.

    I + M + N has the least sum_i ||(I + M + N) c_i - a_i||^2 + tr(N S N^T), of all N with N L Q = 0.

    Args:
        removed: I + M, which annihilates L Q; see `removal`.
        directions: U (d, n), which Q is an orthonormal basis of.
        factor: L (d, d), with S = L L^T.
        rows: C (r, d); a weighted row is a row times the square root of its weight.
        goals: A (r, d).
    """
    left, values, _ = torch.linalg.svd(directions, full_matrices=False)
    basis = left[:, values > _INDEPENDENT * values[:1]]
    whitened = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    whitened = whitened - basis @ (basis.T @ whitened)
    gram = whitened.T @ whitened + torch.eye(len(rows), dtype=rows.dtype)
    weights = torch.cholesky_solve(whitened.T, torch.linalg.cholesky(gram))
    down = torch.linalg.solve_triangular(factor.T, weights.T, upper=True).T
    up = (goals - removed(rows)).T
    return TextMap(torch.cat([removed.up, up], 1), torch.cat([removed.down, down]))


def ridge_map(targets: Tensor, goals: Tensor, metric: Tensor, free: Tensor | None = None) -> TextMap:
    """The map I + M that takes rows C to their goals A by ridge regression, for every matrix W at once.

    W' = W (I + M) has the least sum_i ||W' c_i - W a_i||^2 + tr((W' - W) R (W' - W)^T). This is UCE's
    objective (Gandikota et al., WACV 2024), with M written as (A - C)^T C (C^T C + R)^-1, which subtracts no
    large numbers. A weighted row is a row times the square root of its weight.

    Args:
        targets: C (n, d), in fp64.
        goals: A (n, d).
        metric: R (d, d), positive definite.
        free: orthonormal basis B (d, m) of the directions on which W' - W may act; None for all.
    """
    basis = torch.eye(len(metric), dtype=metric.dtype) if free is None else free
    own, change = targets @ basis, (goals - targets).T
    factor = torch.linalg.cholesky(own.T @ own + basis.T @ metric @ basis)
    if len(targets) <= basis.shape[1]:
        return TextMap(change, torch.cholesky_solve(own.T, factor).T @ basis.T)
    return TextMap(change @ own, torch.cholesky_solve(basis.T, factor))


def expected_collateral(directions: int, width: int, held: int = 0) -> float:
    """sqrt(n / (d - r)), the relative change of unrelated text if n directions are removed without knowing
    it.

    Args:
        directions: n.
        width: d.
        held: r, directions that are held exactly.
    """
    return (directions / max(width - held, 1)) ** 0.5 if directions < width - held else 1.0
