"""Graphs that free their arguments: a caller hands over a list, and each tensor dies at its last use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.head_starts import give_head_starts
from autosp_ir.emit.loops import prepare_loops
from autosp_ir.emit.split import SplitJoint

Boxed = Callable[[list[Any]], Any]
"""Takes one list of arguments, empties it, and returns the outputs in order."""


class StepGraphs(NamedTuple):
    """The two halves of a step, callable.

    Args:
        forward: Takes the forward program's inputs, returns its outputs and the saved values.
        backward: Takes the backward program's inputs, returns the gradients; None when there are none.
        overwrites: Names of the saved values that the backward may overwrite.
    """

    forward: Boxed
    backward: Boxed | None
    overwrites: frozenset[str] = frozenset()


def aten_graphs(split: SplitJoint) -> StepGraphs:
    """The ATen graphs of a step, run operation by operation in exactly the order of the program.

    Args:
        split: The halves of a joint program.
    """
    overlaps = "overlapped" in split.forward.facts
    backward = _boxed(executable(split.backward), overlaps) if split.backward is not None else None
    return StepGraphs(_boxed(executable(split.forward), overlaps), backward)


def _boxed(graph: fx.GraphModule, overlaps: bool) -> Boxed:
    prepare_loops(graph.graph, "eager")
    if overlaps:
        give_head_starts(graph.graph)
    interpreter = fx.Interpreter(graph)

    def run(arguments: list[Any]) -> Any:
        try:
            return interpreter.boxed_run(arguments)
        finally:
            # It keeps what its graph returned, which would hold every saved tensor until the next step.
            interpreter.env = {}

    return run
