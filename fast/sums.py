"""Symmetric sums Σ_t x_t x_tᵀ of many rows, for half of the products.

Only the lower triangle is summed, in stripes: rows i to j - 1, up to the diagonal. `OuterSum` is
such a sum; `add_moment` keeps the stripes alone, one after the other in a flat tensor, which takes
half of the memory, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from farss import at_least_fp32

STRIPE = 1024  # rows of the sum that are added to at once


@contextmanager
def short_factors(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 products go through units that read bf16 or TF32 and sum in fp32 (tensor cores,
    AMX), if the numbers were bf16 before: these lose nothing there."""
    if dtype != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # TF32 on CUDA, bf16 on a CPU that has it
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stripes(width: int) -> list[tuple[int, int]]:
    """(i, j) of each stripe: rows i to j - 1, of which the columns up to j are summed."""
    return [(i, min(i + STRIPE, width)) for i in range(0, width, STRIPE)]


def size_of_stripes(width: int) -> int:
    """How many numbers the stripes hold."""
    return sum((j - i) * j for i, j in stripes(width))


def add_to_stripes(total: list[Tensor], rows: Tensor) -> None:
    """Add the products of rows (tokens, width) to the stripes (j - i, j)."""
    for stripe, (i, j) in zip(total, stripes(rows.shape[1]), strict=True):
        stripe.addmm_(rows[:, i:j].T, rows[:, :j])


class OuterSum:
    """Σ_t x_t x_tᵀ of rows x_t; in fp32, or fp64 if the rows are."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # (width, width), of which the stripes are filled

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, width)."""
        width, wide = rows.shape[1], at_least_fp32(rows)
        if self.total is None:
            self.total = wide.new_zeros(width, width)
        with short_factors(rows.dtype):
            add_to_stripes([self.total[i:j, :j] for i, j in stripes(width)], wide)

    def value(self) -> Tensor:
        """The whole sum (width, width): the lower triangle is copied to the upper one, in place."""
        assert self.total is not None, "nothing was added"
        for i, j in stripes(len(self.total)):
            self.total[:i, i:j] = self.total[i:j, :i].T
        return self.total


def add_moment(sums: dict[str, Tensor], name: str, rows: Tensor, squares: bool) -> None:
    """Add Σ_t x_t x_tᵀ of rows (tokens, width) to sums[name], but keep only its diagonal
    (`squares`), or only its stripes in one flat tensor. Overwrites `rows`."""
    width = rows.shape[1]
    if squares:
        sums[name] = sums.get(name, 0) + rows.pow_(2).sum(dim=0)
        return
    if name not in sums:
        sums[name] = rows.new_zeros(size_of_stripes(width))
    add_to_stripes(as_stripes(sums[name], width), rows)


def as_stripes(total: Tensor, width: int) -> list[Tensor]:
    """Views (j - i, j) of the stripes in a flat tensor of add_moment."""
    parts = total.split([(j - i) * j for i, j in stripes(width)])
    return [part.view(-1, j) for part, (_, j) in zip(parts, stripes(width), strict=True)]


def trace_and_diagonals(F: Tensor, B: Tensor, width: int) -> tuple[float, Tensor, Tensor]:
    """Tr(F B) and the diagonals (width,) of symmetric F and B, given as stripes of add_moment."""
    trace, diagonals = 0.0, []
    for f, b in zip(as_stripes(F, width), as_stripes(B, width), strict=True):
        f_square, b_square = f[:, -len(f) :], b[:, -len(b) :]  # on the diagonal, so counted once
        trace += 2 * (f * b).sum().item() - (f_square * b_square).sum().item()
        diagonals.append((f_square.diagonal(), b_square.diagonal()))
    f_all, b_all = (torch.cat(parts) for parts in zip(*diagonals, strict=True))
    return trace, f_all, b_all
