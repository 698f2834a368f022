"""New memory that slices are written into, one beside the other, as the concatenation that it is."""

from __future__ import annotations

from typing import Any

from autosp_ir.comm.rules.base import FILL_OPS
from autosp_ir.ir.graph import Node, Value
from autosp_ir.rewrite.rules import Match, rule


@rule("writes-joined")
def written_slices(op: Any, base: Any, last: Any) -> Any:
    """Slices written into new memory until nothing of it is left are a concatenation."""
    return op.aten.slice_scatter(base, last, ...)


@written_slices.let("parts", "its slices do not lie side by side in new memory, or leave some of it")
def _(match: Match) -> list[Value] | None:
    return side_by_side(match.root)


@written_slices.replacement
def _(op: Any, match: Match, parts: list[Value]) -> Any:
    return op.aten.cat(parts, match.root.arg("dim"))


def side_by_side(node: Node) -> list[Value] | None:
    """What a chain of `slice_scatter` that ends at `node` writes, in the order of memory.

    None unless the slices are along one dimension, cover each of its places once, have the dtype of the result and lie
    in memory that holds no operand's values (`torch.empty` and its like).
    """
    kind = node.result.tensor_type
    dim = int(node.arg("dim")) % kind.ndim
    extent, parts = kind.shape[dim], dict[int, tuple[int, Value]]()
    while node.is_op("aten.slice_scatter") and int(node.arg("dim")) % kind.ndim == dim:
        start, end, written = node.arg("start"), node.arg("end"), node.arg("src")
        known = all(b is None or isinstance(b, int) for b in (start, end)) and isinstance(extent, int)
        if not known or node.arg("step") != 1 or written.tensor_type.dtype != kind.dtype:
            return None
        start, end, _ = slice(start, end).indices(int(extent))
        if start in parts:
            return None
        parts[start] = (end, written)
        node = node.args[0].producer
    ends = [0, *(parts[start][0] for start in sorted(parts))]
    if node.op.name not in FILL_OPS or ends != [*sorted(parts), extent]:
        return None
    return [parts[start][1] for start in sorted(parts)]


__all__ = ["side_by_side", "written_slices"]
