"""Which values belong to a single chunk of tokens."""

from __future__ import annotations

from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.program import Program

_NONE: frozenset[int] = frozenset()


def chunk_values(program: Program) -> dict[Value, int]:
    """The forward values that exist for one chunk only, with the number of the chunk.

    A value belongs to chunk c when it depends on parts number c of `autosp.chunk` and on no other part; behind an
    `autosp.unchunk` nothing belongs to a chunk any more.

    Args:
        program: A program at any stage before emission.
    """
    return {
        node.result: next(iter(parts))
        for node, parts in chunk_parts(program).items()
        if node.phase is Phase.FORWARD and len(parts) == 1
    }


def chunk_parts(program: Program) -> dict[Node, frozenset[int]]:
    """The numbers of the chunks that each computed node of any phase depends on; none before and behind chunks."""
    parts: dict[Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node.op.kind not in ("placeholder", "output"):
            parts[node] = _parts(node, parts)
    return parts


def _parts(node: Node, known: dict[Node, frozenset[int]]) -> frozenset[int]:
    if node.is_op("autosp.chunk", "autosp.unchunk"):
        return _NONE
    if node.is_op("operator.getitem") and node.operands[0].producer.is_op("autosp.chunk"):
        return frozenset({int(node.args[1])})
    return _NONE.union(*(known.get(v.producer, _NONE) for v in node.operands))


__all__ = ["chunk_parts", "chunk_values"]
