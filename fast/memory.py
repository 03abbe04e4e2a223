"""Bytes that a start by fast/ holds, from shapes alone, for the plan of a run."""

from dataclasses import replace

from farss import Budget
from model import READS

from .decompositions import SMALL
from .start import sums_first
from .sums import size_of_stripes

Shapes = dict[str, tuple[int, int]]  # layer: (m, n)


def summed_first(shapes: Shapes, budget: Budget, tokens: int) -> list[str]:
    """Those of a block's layers whose tokens would be summed first (start.sums_first) if the block
    were a deep one."""
    deep = replace(budget, shallow=0)
    return [name for name, shape in shapes.items() if sums_first(deep, name, min(shape), tokens)]


def block_sums(shapes: Shapes, budget: Budget, shallow: bool, tokens: int, itemsize: int
               ) -> dict[str, float]:
    """Bytes of what `measure` holds of one shallow or deep block's layers, by part; weights have
    `itemsize` bytes."""
    first = [] if shallow else summed_first(shapes, budget, tokens)
    moments: dict[tuple[str, str], int] = {}  # numbers, by what they are of
    for name, (m, n) in shapes.items():
        source = READS.get(name.rpartition(".")[2], name) if m >= n else name
        if shallow:
            moments[name, "forward"] = moments[name, "backward"] = size_of_stripes(min(m, n))
        elif name in first:
            moments[source, "forward"] = moments[name, "backward"] = min(m, n) ** 2
    return {"directions of a block": 4 * sum(
                directions(m, n, itemsize, name in first) for name, (m, n) in shapes.items()),
            "moments of a block": 4 * sum(moments.values())}


def directions(m: int, n: int, itemsize: int, summed: bool) -> int:
    """Numbers that Directions and Way hold of a layer: the smaller side; of a small layer the other
    side, too; and W times it where the model's own products are rounded to less than fp32, unless
    tokens are summed first."""
    k = min(m, n)
    return k * k + k * max(m, n) * ((k < SMALL) + (itemsize < 4 and not summed))
