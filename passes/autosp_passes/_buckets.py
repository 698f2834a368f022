"""Several small gradients in one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autosp_ir.ir.graph import Node
from autosp_ir.rewrite.rewriter import Rewriter


def buckets(reductions: Sequence[Node], limit: float) -> Iterator[list[Node]]:
    """Group the reductions that are smaller than a limit and that only the caller reads, in program order.

    A bucket is closed when it reaches the limit, so that it is sent while there is work left to run beside it.

    Args:
        reductions: All-reduces of static shapes.
        limit: Bytes.

    Yields:
        At least two reductions over the same ranks, of one dtype and phase.
    """
    open_: dict[object, list[Node]] = {}
    filled: dict[object, int] = {}
    place = reductions[0].graph.index() if reductions else {}
    for node in sorted(reductions, key=place.__getitem__):
        kind = node.result.tensor_type
        size = kind.numel * kind.dtype.itemsize
        # What computes with a gradient reads it before the last one of its bucket is there.
        read = any(user.op.kind != "output" for user in node.users)
        if not isinstance(size, int) or size >= limit or read:
            continue
        key = (node.arg("axis"), node.arg("size"), kind.dtype, kind.layout, node.phase)
        open_.setdefault(key, []).append(node)
        filled[key] = filled.get(key, 0) + size
        if filled[key] >= limit:
            filled[key] = 0
            if len(members := open_.pop(key)) > 1:
                yield members
    yield from (members for members in open_.values() if len(members) > 1)


def reduce_together(members: Sequence[Node], rewriter: Rewriter) -> None:
    """Put one all-reduce of the flattened operands in the place of the last reduction.

    Every gradient gets memory of its own again: an optimizer that frees one frees its bytes.

    Args:
        members: From `buckets`.
        rewriter: Rewrites the program.
    """
    last = members[-1]
    with rewriter.before(last):
        flat = [rewriter.create("aten.reshape", (m.operands[0], [-1])) for m in members]
        joined = rewriter.create("aten.cat", (flat,))
        reduced = rewriter.create(
            last.op, (joined, last.arg("axis"), last.arg("size")), layout=last.result.tensor_type.layout
        )
        begin = 0
        results = []
        for member in members:
            kind = member.result.tensor_type
            piece = rewriter.create("aten.slice.Tensor", (reduced, 0, begin, begin + kind.numel))
            own = rewriter.create("aten.clone", (piece,))
            results.append(rewriter.create("aten.view", (own, list(kind.shape))))
            begin += kind.numel
    for member, result in zip(members, results, strict=True):
        rewriter.replace(member, result)


__all__ = ["buckets", "reduce_together"]
