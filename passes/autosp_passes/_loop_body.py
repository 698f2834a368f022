"""One chunk of a region as a program of its own: the body of `autosp.chunk_loop`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from autosp_ir.comm.chunk_loop import SUM, WHOLE
from autosp_ir.ir.graph import Graph, Node, Value, map_values
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature
from autosp_ir.ir.types import TensorType, without_layout


class LoopBody(NamedTuple):
    """A body, and what it is run on.

    Args:
        text: Of the program; equal for equal work, whatever layer it comes from.
        operands: What the chunks read: values of the region's own program, in the order of the body's inputs.
        cuts: As in `autosp_ir.comm.chunk_loop.Loop`.
        joins: As there.
    """

    text: str
    operands: tuple[Value, ...]
    cuts: tuple[int, ...]
    joins: tuple[int, ...]


def loop_body(nodes: Sequence[Node], varying: Collection[Node], joins: Sequence[Node]) -> LoopBody | str:
    """The work of one chunk.

    Args:
        nodes: A region in program order, cut along its tokens over an axis that is a loop.
        varying: Of these, what differs from chunk to chunk.
        joins: The operations that put its results together: `autosp.all_gather` and `autosp.all_reduce`.

    Returns:
        The body, or why there is none.
    """
    graph = Graph()
    copies: dict[Value, Value] = {}
    operands: list[Value] = []
    cuts: list[int] = []
    for node in nodes:
        if node not in varying:
            continue
        if node.is_op("autosp.shard"):
            copies[node.result] = _input(graph, node.result, len(operands))
            operands.append(node.operands[0])
            cuts.append(node.arg("dim") % node.result.tensor_type.ndim)
            continue
        for value in node.operands:
            if value not in copies and value.producer not in varying:
                if not isinstance(value.type, TensorType):
                    return f"%{value.name} is no tensor, and every chunk reads it"
                copies[value] = _input(graph, value, len(operands))
                operands.append(value)
                cuts.append(WHOLE)
    kinds = [v.type for v in (*operands, *(j.operands[0] for j in joins))]
    if not all(isinstance(k, TensorType) and all(isinstance(e, int) for e in k.shape) for k in kinds):
        return "a length in it is no number"
    for node in nodes:
        if node in varying and not node.is_op("autosp.shard"):
            copy = graph.create(
                node.op,
                map_values(node.args, copies.__getitem__),
                map_values(dict(node.kwargs), copies.__getitem__),
                name=f"v{len(copies)}",
                type=without_layout(node.result.type),
            )
            copies[node.result] = copy.result
    graph.create("output", (tuple(copies[j.operands[0]] for j in joins),))
    floating = [v.tensor_type.dtype.is_floating_point for v in operands]
    names = [node.name for node in graph.inputs]
    inputs = [InputSpec(n, InputKind.USER_INPUT, n, f) for n, f in zip(names, floating, strict=True)]
    outputs = [OutputSpec(f"out{i}", OutputKind.USER_OUTPUT, f"out{i}") for i in range(len(joins))]
    return LoopBody(
        str(Program(graph, Signature(inputs, outputs))), tuple(operands), tuple(cuts), tuple(map(_joined_along, joins))
    )


def _input(graph: Graph, value: Value, position: int) -> Value:
    """A placeholder for what stands for `value` in one chunk; placeholders come first whatever else is there."""
    first = next((n for n in graph.nodes if n.op.kind != "placeholder"), None)
    kind = without_layout(value.type)
    return graph.create("placeholder", name=f"x{position}", type=kind, before=first).result


def _joined_along(join: Node) -> int:
    if join.is_op("autosp.all_reduce"):
        return SUM
    return int(join.arg("dim")) % join.operands[0].tensor_type.ndim


__all__ = ["LoopBody", "loop_body"]
