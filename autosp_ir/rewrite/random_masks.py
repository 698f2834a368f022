"""A rank's own part of a dropout mask, and a mask of another shape: where `rng` is `per_rank`, neither is a slice."""

from __future__ import annotations

import math
from typing import Any

import torch

from autosp_ir.comm.random_masks import PER_RANK
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.rewriter import Rewriter

_MASK = "autosp.keep_mask"


def drawn_per_rank(mask: Value) -> Node | None:
    """The node that draws a whole mask in which no two ranks need to agree; None for any other value."""
    node = mask.producer
    free = node.is_op(_MASK) and node.arg("rng") == PER_RANK and node.arg("index") is None
    return node if free else None


def own_part(
    rewriter: Rewriter, mask: Value, shape: list[Any], dim: int, axis: str, size: int, outer: int = 1
) -> Value:
    """Draw this rank's part of a mask, and no other's.

    Args:
        rewriter: At an insertion point behind the mask.
        mask: For which `drawn_per_rank` holds.
        shape: Of the part; scalar values where it is symbolic.
        dim: The dimension along which the ranks' parts lie.
        axis: The mesh axis.
        size: Ranks on it.
        outer: Blocks of that dimension, in each of which the parts lie one behind the other.

    Returns:
        bool `shape`, of layout `Shard(dim, outer)` along `axis`.
    """
    node = mask.producer
    numbers = {"dtype": torch.int64, "device": torch.device("cpu")}
    ranks = rewriter.create("aten.arange", (size,), numbers, origin_from=node)
    index = rewriter.create("autosp.shard", (ranks, 0, axis, size), origin_from=node)
    own = {"index": index, "axis": axis, "dim": dim, "outer": outer}
    return _drawn(rewriter, node, shape, own)


def replayed_masks(program: Program) -> set[Value]:
    """The masks that are larger than the state they are made from, and slices of them.

    Args:
        program: A program of any stage.
    """
    found: set[Value] = set()
    for node in program.graph.nodes:
        larger = node.is_op(_MASK) and _bytes(node.result) > _bytes(node.arg("state"))
        if larger or (node.is_op("autosp.shard") and node.operands[0] in found):
            found.add(node.result)
    return found


def _bytes(value: Value) -> float:
    """Size of a tensor; of a symbolic length, what is not reached in practice."""
    kind = value.tensor_type
    return kind.numel * kind.dtype.itemsize if isinstance(kind.numel, int) else math.inf


def of_shape(rewriter: Rewriter, mask: Value, shape: list[Any]) -> Value:
    """Draw a mask of another shape in place of one for which `drawn_per_rank` holds."""
    return _drawn(rewriter, mask.producer, shape, {})


def _drawn(rewriter: Rewriter, node: Node, shape: list[Any], own: dict[str, Any]) -> Value:
    where = {"device": node.arg("device"), "dtype": node.arg("dtype")}
    args = (node.arg("state"), shape, node.arg("p"), PER_RANK)
    return rewriter.create(_MASK, args, {**where, **own}, origin_from=node)


__all__ = ["drawn_per_rank", "of_shape", "own_part", "replayed_masks"]
