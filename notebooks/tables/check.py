"""Every Avg, K, T and KT that the paper prints, beside what its own row gives (Eq. 36-38).

A printed number stands for every value that rounds to it, so a row gives an interval. All four grow
with the row's scores; K falls with the untouched model's, T with full fine-tuning's: the ends of
the interval come from moving every printed score to the end of its own.
"""

from collections.abc import Iterator
from typing import NamedTuple

from eval import summary_metrics
from results import paper_references, paper_tables

METRICS = ("Avg", "K", "T", "KT")
LABELS = ("model", "task", "method", "params", "samples", "(r_min, r_avg, r_max)")
Row = dict[str, str]


class Cell(NamedTuple):
    """One printed metric, what its row gives, and between which bounds."""

    table: str
    model: str
    label: str  # of the row: its method, or what the table varies
    metric: str
    printed: str
    computed: float
    low: float
    high: float

    @property
    def contradicts(self) -> bool:
        """No values that round to the row's scores give one that rounds to the printed metric."""
        half = half_unit(self.printed) + 1e-9  # floating point
        return not self.low - half <= float(self.printed) <= self.high + half


def half_unit(printed: str) -> float:
    """Half a unit of the last printed digit."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def recompute(row: Row, shift: float = 0.0) -> dict[str, float]:
    """Avg, K, T and KT of a row, as far as its table's model and task have what they divide by.

    `shift` 1 gives the upper, -1 the lower ends of what the printed scores allow.
    """
    def moved(source: Row, columns: list[str], by: float) -> dict[str, float]:
        return {c: float(source[c]) + by * half_unit(source[c]) for c in columns}

    scores = [c for c in row if row[c] and c not in LABELS + METRICS]
    origin, full = paper_references(row["model"], row.get("task", "")) or ({}, {})
    known = [c for c in scores if origin.get(c)]
    task = [c for c in scores if full.get(c) and not origin.get(c)]
    return summary_metrics(moved(row, scores, shift), moved(origin, known, -shift),
                           moved(full, task, -shift))


def cells() -> Iterator[Cell]:
    """Every printed Avg, K, T and KT, in the order of the paper."""
    for table, rows in paper_tables().items():
        for row in rows:
            printed = [m for m in METRICS if row.get(m)]
            if not printed:
                continue
            label = next((row[c] for c in LABELS[2:] if row.get(c)), "")
            low, computed, high = (recompute(row, by) for by in (-1, 0, 1))
            for m in printed:
                yield Cell(table, row["model"], label, m, row[m], computed[m], low[m], high[m])


def errata() -> list[Cell]:
    """The printed metrics that contradict their own row."""
    return [cell for cell in cells() if cell.contradicts]
