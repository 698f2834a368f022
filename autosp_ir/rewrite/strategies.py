"""What an attention strategy is made of: finding its sites, saying where cut tokens stand, and replacing a site.

A strategy resolves every attention over cut tokens. It may change what is cut (`ulysses`), gather the keys and values,
or attend to one rank's keys at a time and merge the partial results by `lse`.
"""

from __future__ import annotations

from typing import Any

import torch

from autosp_ir.comm.rules.attention import unresolved_axes
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.rewriter import Rewriter

_ATTRIBUTES = ("segment_ids", "causal", "window", "scale", "softcap")


def unresolved_attention(program: Program, axis: str) -> list[Node]:
    """Every attention over tokens that are cut along a mesh axis and that no strategy has resolved.

    Args:
        program: A forward program.
        axis: The mesh axis.
    """
    return [node for node in program.find("autosp.attention") if axis in unresolved_axes(node)]


def attention_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an attention that hold wherever its tokens stand: all but q, k, v, bias and the positions.

    Raises:
        UnsupportedError: It says itself where its tokens stand, by offsets or positions; or it drops probabilities.
    """
    if node.arg("q_offset") or node.arg("kv_offset") or node.arg("q_positions") or node.arg("kv_positions"):
        raise UnsupportedError(
            f"%{node.name} says where its tokens stand already",
            node=node,
            hint="run the strategy on attention as token-partition leaves it",
        )
    if node.arg("keep") is not None:
        raise UnsupportedError(
            f"%{node.name} drops out attention probabilities, whose mask this strategy does not place",
            node=node,
            hint="use `ulysses`, or set the model's attention dropout to 0",
        )
    return {name: value for name in _ATTRIBUTES if (value := node.arg(name)) is not None}


def replace_attention(rewriter: Rewriter, node: Node, out: Value, lse: Value) -> None:
    """Make every reader of an attention read these results, and erase it.

    Args:
        rewriter: Of the node's program.
        node: The attention.
        out: `[B, H, S, D]`, of the type and layout of the old one.
        lse: `[B, H, S]`, likewise; erased with what it is made of when nothing reads it.
    """
    for reader in list(node.users):
        rewriter.replace(reader, (out, lse)[reader.args[1]])
    if any(member is node for member in rewriter.graph.nodes):
        rewriter.erase(node)


def token_positions(
    rewriter: Rewriter, length: int | Value, axis: str, size: int, *, shift: int = 0, origin_from: Node | None = None
) -> Value:
    """The global positions of the tokens that each rank holds: int64 `[length / size]`, on the CPU, cut along `axis`.

    This is how a program learns where a rank's tokens stand: a value with a layout, where a number would have none.

    Args:
        rewriter: Where to create; inside `with rewriter.before(node)`.
        length: Number of tokens on all ranks, or a scalar value that holds it.
        axis: The mesh axis.
        size: Ranks on it.
        shift: Rank r gets the positions of rank `r - shift`, whose tokens it holds after so many sends to the next.
        origin_from: The node whose origin the new ones take.

    Raises:
        UnsupportedError: A shift of a length that is symbolic.
    """
    if shift and not isinstance(length, int):
        raise UnsupportedError(
            "positions that move from rank to rank need a length that is a number",
            node=origin_from,
            hint="capture with dynamic=False, or use a strategy that leaves the positions where they are",
        )
    kind = {"dtype": torch.int64, "device": torch.device("cpu")}
    positions = rewriter.create("aten.arange", (length,), kind, origin_from=origin_from)
    if shift and isinstance(length, int):
        positions = rewriter.create("aten.roll", (positions, [shift * (length // size)], [0]), origin_from=origin_from)
    return rewriter.create("autosp.shard", (positions, 0, axis, size), origin_from=origin_from)


__all__ = ["attention_arguments", "replace_attention", "token_positions", "unresolved_attention"]
