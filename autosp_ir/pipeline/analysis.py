"""Analyses: results computed from a program, cached until it changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar, cast

from autosp_ir.ir.graph import Graph
from autosp_ir.ir.program import Program

T = TypeVar("T")


class Analysis(ABC, Generic[T]):
    """Computes a result from a program without changing it: `class Liveness(Analysis[dict[str, int]])`."""

    @abstractmethod
    def run(self, program: Program) -> T:
        """Compute the result."""


AnalysisLike: TypeAlias = type[Analysis[T]] | Callable[[Program], T]
"""An `Analysis` subclass, or a function from a program to a result."""


def version_of(program: Program) -> tuple[Any, ...]:
    """A key that differs after every mutation of nodes, types, arguments, order, stage, mesh or nested graphs."""
    graphs = [program.graph, *(a for a in program.attrs.values() if isinstance(a, Graph))]
    return (
        *((g, g.version) for g in graphs),
        program.stage,
        tuple(program.mesh.items()),
        tuple(program.attrs),
        repr(program.info),
    )


class AnalysisCache:
    """Keeps each analysis's last result while the program's version stays the same."""

    def __init__(self) -> None:
        self._results: dict[Any, tuple[tuple[Any, ...], Any]] = {}

    def get(self, kind: AnalysisLike[T], program: Program) -> T:
        """The result of `kind` for `program` as it is now."""
        version = version_of(program)
        cached = self._results.get(kind)
        if cached is not None and cached[0] == version:
            return cast(T, cached[1])
        result: T
        if isinstance(kind, type) and issubclass(kind, Analysis):
            result = kind().run(program)
        else:
            result = cast("Callable[[Program], T]", kind)(program)
        # Keyed by the version before it ran: an analysis that mutates the program is never reused.
        self._results[kind] = (version, result)
        return result
