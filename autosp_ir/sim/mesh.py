"""Ranks of a simulated mesh: row-major, the last axis fastest, as in torch's DeviceMesh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankMesh:
    """The ranks of a mesh and the groups they form along each axis.

    Args:
        axes: Axis sizes in mesh order; empty for one rank.
    """

    axes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(mesh: Mapping[str, int]) -> RankMesh:
        """The mesh of a program."""
        return RankMesh(tuple(mesh.items()))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(size for _, size in self.axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The index of `rank` on every axis."""
        found: dict[str, int] = {}
        for axis, size in reversed(self.axes):
            rank, found[axis] = divmod(rank, size)
        return found

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axis` alone, in order of their index on it; `rank` included."""
        sizes = dict(self.axes)
        if axis not in sizes:
            return (rank,)
        names = [a for a, _ in self.axes]
        stride = math.prod(size for _, size in self.axes[names.index(axis) + 1 :])
        first = rank - self.coordinates(rank)[axis] * stride
        return tuple(first + i * stride for i in range(sizes[axis]))
