"""Attention over cut tokens, made runnable in the plainest way, so that what a strategy pass made can be compared."""

from __future__ import annotations

from autosp_ir.comm.rules.attention import unresolved_axes
from autosp_ir.ir.graph import Node, Value, map_values
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.rewriter import Rewriter

_TOKENS = 2


def with_gathered_attention(program: Program) -> Program:
    """A copy in which every rank attends over all tokens and keeps its own rows.

    Args:
        program: A forward program; attention that a strategy pass has resolved is left alone.
    """
    copy = program.clone()
    rewriter = Rewriter(copy, "gathered-attention")
    for node in copy.find("autosp.attention"):
        axes = {axis: copy.mesh[axis] for axis in unresolved_axes(node)}
        if axes:
            _gather(node, axes, rewriter)
    # What was replaced must go: with a mask over all tokens it cannot be traced in local shapes.
    rewriter.dead_code()
    return copy


def _gather(node: Node, axes: dict[str, int], rewriter: Rewriter) -> None:
    with rewriter.before(node):
        whole = {value: _whole(value, axes, rewriter) for value in (node.arg("q"), node.arg("k"), node.arg("v"))}
        pair = rewriter.create(
            node.op,
            map_values(node.args, lambda v: whole.get(v, v)),
            map_values(dict(node.kwargs), lambda v: whole.get(v, v)),
        )
        for reader in node.users:
            rows = rewriter.create("operator.getitem", (pair, reader.args[1]))
            for axis, size in reversed(axes.items()):
                rows = rewriter.create("autosp.shard", (rows, _TOKENS, axis, size))
            rewriter.replace(reader, rows)


def _whole(value: Value, axes: dict[str, int], rewriter: Rewriter) -> Value:
    for axis, size in axes.items():
        value = rewriter.create("autosp.all_gather", (value, _TOKENS, axis, size))
    return value


__all__ = ["with_gathered_attention"]
