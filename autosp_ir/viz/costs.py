"""What a graph costs, for pictures: bytes alive at every node, its collectives, and its estimated time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy

from autosp_ir.analysis.aliasing import WAIT
from autosp_ir.analysis.liveness import liveness
from autosp_ir.ir.graph import Graph, Node
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.program import Stage as ProgramStage
from autosp_ir.ir.streams import mesh_axis
from autosp_ir.ir.types import Dim, TensorType
from autosp_ir.viz.lanes import predicted_lanes
from autosp_ir.viz.recording import Collective, RecordedLane

_SHORT = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


def memory_of(graph: Graph, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Bytes alive while each node runs, in program order and without the output.

    Raises:
        VerifyError: An extent is symbolic and has no number.
    """
    return liveness(graph, symbols=symbols).curve


def collectives_of(graph: Graph, mesh: Mapping[str, int], symbols: Mapping[str, int]) -> list[Collective]:
    """Every collective over more than one rank, in program order; as `simulate` reports them."""
    found = []
    for position, node in enumerate(graph.nodes):
        if not node.op.has(Trait.COLLECTIVE) or node.op.name == WAIT or not node.operands:
            continue
        axis = str(node.arg("axis") or node.arg("group_name") or "")
        size = node.arg("size", node.arg("group_size", mesh.get(mesh_axis(axis), 0)))
        if size != 1:
            name = node.op.name.rpartition(".")[2]
            found.append(
                Collective(
                    name=node.name,
                    op=_SHORT.get(name, name),
                    axis=axis,
                    size=size,
                    bytes=_bytes(node, symbols),
                    phase=node.phase.value,
                    position=position,
                )
            )
    return found


def lanes_of(graph: Graph, mesh: Mapping[str, int]) -> tuple[RecordedLane, ...]:
    """The estimated step of a lowered graph, operation by operation, on H100s over NVLink.

    Raises:
        UnsupportedError: An extent is symbolic.
    """
    lines = {node.name: position for position, node in enumerate(graph.nodes)}
    found = predicted_lanes(Program(graph, stage=ProgramStage.LOWERED, mesh=dict(mesh)))
    return tuple(
        RecordedLane(
            lane.name,
            tuple((lines[s.name], round(1e6 * s.begin, 2), round(1e6 * s.seconds, 2), s.kind) for s in lane.slices),
        )
        for lane in found
    )


def _bytes(node: Node, symbols: Mapping[str, int]) -> int:
    kind = node.operands[0].type
    if not isinstance(kind, TensorType):
        return 0
    return math.prod(_extent(d, symbols) for d in kind.shape) * kind.dtype.itemsize


def _extent(extent: Dim, symbols: Mapping[str, int]) -> int:
    if isinstance(extent, int):
        return extent
    number = sympy.sympify(extent).xreplace(
        {s: sympy.Integer(symbols[s.name]) for s in extent.free_symbols if s.name in symbols}
    )
    return int(number) if number.is_Integer else 0


__all__ = ["collectives_of", "lanes_of", "memory_of"]
