"""Rows of the program that `milp.py` solves, and which nodes share a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.sparse import csr_matrix

from autosp_passes._remat.model import Outcome, StepModel
from autosp_passes._remat.repeats import find_repeats

PEAKS_PER_ROUND = 8


@dataclass
class Rows:
    """Sparse rows `sum(coefficient * variable) <= limit`."""

    entries: list[dict[int, float]] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    seen: set[frozenset[tuple[int, float]]] = field(default_factory=set)

    def add(self, entries: dict[int, float], limit: float) -> None:
        """Add a row unless it is there."""
        key = frozenset((*entries.items(), (-1, limit)))
        if key not in self.seen:
            self.seen.add(key)
            self.entries.append(entries)
            self.limits.append(limit)


def worst_positions(outcome: Outcome, limit: float) -> list[int]:
    """Positions of the peak, and of the highest points of the other stretches that go over."""
    count = len(outcome.curve)
    step = max(count // 64, 1)
    tops = [max(range(a, min(a + step, count)), key=outcome.curve.__getitem__) for a in range(0, count, step)]
    tops = [p for p in tops if outcome.curve[p] > limit]
    return sorted(tops, key=lambda p: -outcome.curve[p])[:PEAKS_PER_ROUND]


def shared_decisions(model: StepModel) -> dict[int, tuple[int, int]]:
    """Node -> (group of layers, place in the layer): what shares a decision."""
    repeats = find_repeats(model)
    groups = _groups(repeats.layers)
    return {i: (groups[layer], place) for i, (layer, place) in repeats.place.items()}


def _groups(layers: int) -> list[int]:
    """Layer -> group; groups have 1, 1, 2, 4, … layers."""
    sizes: list[int] = []
    while sum(sizes) < layers:
        sizes.append(min(max(sum(sizes), 1), layers - sum(sizes)))
    return [g for g, size in enumerate(sizes) for _ in range(size)]


def sparse(entries: Sequence[dict[int, float]], width: int) -> csr_matrix:
    """Rows as a matrix with `width` columns."""
    rows = [r for r, row in enumerate(entries) for _ in row]
    columns = [c for row in entries for c in row]
    data = [v for row in entries for v in row.values()]
    return csr_matrix((data, (rows, columns)), shape=(len(entries), width))


__all__ = ["PEAKS_PER_ROUND", "Rows", "shared_decisions", "sparse", "worst_positions"]
