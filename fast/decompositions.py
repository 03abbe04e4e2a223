"""Eq. 13 in half the time of an SVD or less, as exact.

    svd             farss.svd's U, S, Vh, by way of smaller_side where W is large
    smaller_side    σ and the singular vectors of W's smaller side, from eigendecompositions of
                    Gram matrices
    Directions      what a start keeps of a layer: σ and the smaller side; the other side is
                    computed for the directions that are chosen, alone
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import farss
from farss import at_least_fp32

from .sums import OuterSum

SMALL = 1024  # below so many singular values torch's own SVD is as fast as any detour
EXACT = 1 / 32  # of σ_1: down to there one Gram matrix gives directions as exact as an SVD's


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose W = U diag(S) Vh as farss.svd does (Eq. 13). The larger side, u_i = W v_i / σ_i or
    v_i = Wᵀ u_i / σ_i, is exact to σ_1 / σ_i units of rounding."""
    if min(W.shape) < SMALL:
        return farss.svd(W)
    W = at_least_fp32(W)
    S, X = smaller_side(W)
    return both_sides(W, S, X, across(W, X, S))


def both_sides(W: Tensor, S: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of directions of W, from X on its smaller side and Y on the other."""
    return (Y, S, X.T) if W.shape[0] >= W.shape[1] else (X, S, Y.T)


def smaller_side(W: Tensor) -> tuple[Tensor, Tensor]:
    """σ (k,), falling, and the singular vectors X (k, k) of W's smaller side: V where m >= n.

    From the Gram matrix WᵀW = V Σ² Vᵀ. Its rounding, ε σ_1², is ε σ_1² / σ_i to direction i: to
    those with σ_i >= σ_1 / 32 no more than an SVD's own. The others are found in the same way from
    W on their complement, whose σ_1 is smaller; a small rest by torch's SVD, and so, with a
    warning, a W whose Gram matrix torch cannot decompose.
    """
    m, n = W.shape
    if m < n:
        return smaller_side(W.T)
    if n < SMALL:
        _, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return S, Vh.T
    gram = OuterSum()
    gram.add(W)
    try:
        square, V = torch.linalg.eigh(gram.total)  # reads the lower triangle alone
    except torch.linalg.LinAlgError:
        warnings.warn(f"eigh did not converge on the Gram matrix of a {m} x {n} matrix: its SVD is "
                      "taken instead, which takes longer", stacklevel=2)
        _, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return S, Vh.T
    del gram
    S, V = square.clamp(min=0).sqrt().flip(0), V.flip(1)
    top = int((S / S[0] >= EXACT).sum()) if S[0] > 0 else n
    if top == n:
        return S, V
    low = V[:, top:].contiguous()
    S_low, X_low = smaller_side(W @ low)
    return torch.cat([S[:top], S_low]), torch.cat([V[:, :top], low @ X_low], dim=1)


def across(W: Tensor, X: Tensor, S: Tensor) -> Tensor:
    """The other side (max(m, n), r) of directions X (k, r) of the smaller side: u_i = W v_i / σ_i,
    or v_i = Wᵀ u_i / σ_i; 0 where σ_i is."""
    W = at_least_fp32(W)
    Y = (W if W.shape[0] >= W.shape[1] else W.T) @ X
    return Y / torch.where(S > 0, S, 1)


class Directions(NamedTuple):
    """What a start keeps of the SVD of W (m, n): of a large one, its smaller side alone."""

    S: Tensor  # (k,), falling
    X: Tensor  # (k, k), V where m >= n, else U
    Y: Tensor | None = None  # (max(m, n), k), the other side; None: across(W, X, S), where needed

    @classmethod
    def of(cls, W: Tensor) -> "Directions":
        if min(W.shape) >= SMALL:
            return cls(*smaller_side(at_least_fp32(W)))
        U, S, Vh = farss.svd(W)
        return cls(S, Vh.T, U) if len(U) >= Vh.shape[1] else cls(S, U, Vh.T)

    def take(self, W: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, r), S (r,) and Vh (r, n) of the directions `index`."""
        S, X = self.S[index], self.X[:, index]
        return both_sides(W, S, X, across(W, X, S) if self.Y is None else self.Y[:, index])
