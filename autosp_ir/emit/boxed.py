"""Graphs that free their arguments: a caller hands over a list, and each tensor dies at its last use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.split import SplitJoint

Boxed = Callable[[list[Any]], Any]
"""Takes one list of arguments, empties it, and returns the outputs in order."""


def aten_graphs(split: SplitJoint) -> tuple[Boxed, Boxed | None]:
    """The ATen graphs of a step, run operation by operation in exactly the order of the program.

    Args:
        split: The halves of a joint program.
    """
    backward = _boxed(executable(split.backward)) if split.backward is not None else None
    return _boxed(executable(split.forward)), backward


def _boxed(graph: fx.GraphModule) -> Boxed:
    runner: Boxed = fx.Interpreter(graph).boxed_run
    return runner
