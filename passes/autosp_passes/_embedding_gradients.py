"""Gradients of embeddings: gather what the ranks add up, where that is less than what they would reduce.

A rank's part of the gradient has a row for every entry of the table, and is zero but for those of its own tokens. A
reduction sends all of it twice. The tokens' gradients, gathered, give the whole sum on every rank, added up in float32
and in the order in which one rank alone would add it.
"""

from __future__ import annotations

from typing import Literal

from autosp_ir.analysis.cost import Link, cost_of, link_seconds
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.types import INVARIANT, Shard
from autosp_ir.rewrite.rewriter import Rewriter

Choice = Literal["auto", "gather", "reduce"]

_REDUCE, _GATHER, _BACKWARD = "autosp.all_reduce", "autosp.all_gather", "aten.embedding_dense_backward"
# Every rank then adds up the rows of all: what is sent has to shrink by more than that costs.
_WORTH_IT = 0.5


def gather_rows(reduction: Node, choice: Choice, over: Link, rewriter: Rewriter) -> bool:
    """all_reduce(embedding_dense_backward(g, ids)) -> embedding_dense_backward(all_gather(g), all_gather(ids)).

    Args:
        reduction: An all-reduce; rewritten if it has this form, its operands are cut along one dimension of tokens
            and nothing else reads the partial sum.
        choice: `auto` compares what either way sends; a symbolic extent then leaves the reduction.
        over: What connects the ranks.
        rewriter: Rewrites the program.

    Returns:
        Whether it was rewritten.
    """
    partial = reduction.operands[0].producer if reduction.is_op(_REDUCE) else reduction
    if choice == "reduce" or not partial.is_op(_BACKWARD) or len(partial.result.uses) != 1:
        return False
    axis, size = str(reduction.arg("axis")), reduction.arg("size")
    gradient, ids = partial.operands
    placement = gradient.tensor_type.layout[axis]
    if not isinstance(placement, Shard) or ids.tensor_type.layout[axis] != placement or placement.outer != 1:
        return False
    if choice == "auto" and not _sends_less(reduction, gradient, size, over):
        return False
    with rewriter.before(partial), rewriter.rewrite("gather-rows"):
        whole = [
            rewriter.create(
                _GATHER, (x, placement.dim, axis, size), layout=x.tensor_type.on_axis(axis, INVARIANT).layout
            )
            for x in (gradient, ids)
        ]
        summed = rewriter.clone_node(partial, mapping=dict(zip(partial.operands, whole, strict=True)))
        rewriter.set_type(summed, reduction.result.tensor_type)
    rewriter.replace(reduction, summed)
    return True


def _sends_less(reduction: Node, gradient: Value, size: int, over: Link) -> bool:
    rows = gradient.tensor_type
    sent = rows.numel * rows.dtype.itemsize * (size - 1)
    reduced = reduction.result.tensor_type
    if not isinstance(sent, int) or not isinstance(reduced.numel, int):
        return False
    gathered = over.latency + sent / over.bandwidth
    return gathered <= _WORTH_IT * link_seconds(cost_of(reduction), over)


__all__ = ["Choice", "gather_rows"]
