"""Dropout as a state, a mask made from it, and a product.

The states of a program are chained, so that they are drawn in the order of the model whatever moves around them.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from autosp_ir.comm.random_masks import GLOBAL
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._canonicalize.match import base, inactive_dropout

_ELEMENTS = frozenset({"dropout", "native_dropout", "alpha_dropout"})
_FEATURES = frozenset({"feature_dropout", "feature_alpha_dropout"})
# What dropout in place is recorded as.
_COINS = "aten.bernoulli.p"
_LONG = 1009
# What an element that alpha dropout drops becomes: where the SELU saturates.
_SATURATION = -1.7580993408473766


def active_dropout(node: Node) -> bool:
    """A dropout, or a toss of coins, that draws a mask."""
    return node.is_op(_COINS) or (base(node) in _ELEMENTS | _FEATURES and not inactive_dropout(node))


def draw_mask(
    rewriter: Rewriter, shape: list[Any], p: float, like: TensorType, order: list[int] | None = None
) -> Value:
    """At the insertion point, draw a state and the mask made from it: bool `shape`.

    Args:
        rewriter: Inside `with rewriter.before(…)`, in front of where the model draws.
        shape: Extents; scalar values where they are symbolic.
        p: The probability with which an element is dropped.
        like: Type of the tensor that the model drops elements of.
        order: Its dimensions as they lie in memory, the outermost first, where that is not their own order.
    """
    where = {"device": like.device, "dtype": like.dtype}
    drawn = shape if order is None else [shape[dim] for dim in order]
    state = rewriter.create("autosp.random_state", (None, drawn, p), where)
    keep = rewriter.create("autosp.keep_mask", (state, drawn, p), where)
    if order is None:
        return keep
    return rewriter.create("aten.permute", (keep, [order.index(dim) for dim in range(len(order))]))


def memory_order(node: Node) -> list[int] | None:
    """The dimensions of a dropout's result as they lie in memory, which is how torch draws; None for their own order.

    torch gives the result, and the mask, the memory order of the operand.
    """
    recorded = node.meta.get("val")
    recorded = recorded[0] if isinstance(recorded, tuple | list) else recorded
    if not isinstance(recorded, Tensor):
        return None
    sizes, strides = (tuple(map(_typical, numbers)) for numbers in (recorded.shape, recorded.stride()))
    # An extent of one lies anywhere.
    wide = [dim for dim, size in enumerate(sizes) if size != 1]
    ordered = sorted(wide, key=lambda dim: -strides[dim])
    return None if ordered == wide else [*ordered, *(dim for dim, size in enumerate(sizes) if size == 1)]


def _typical(extent: Any) -> int:
    """A size as a number; a symbolic one at a length that nothing else has."""
    if isinstance(extent, int):
        return extent
    expression = extent.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _LONG)))


def extents(rewriter: Rewriter, value: Value) -> list[Any]:
    """The extents of a value, as arguments."""
    return [
        extent if isinstance(extent, int) else rewriter.create("aten.sym_size.int", (value, dim))
        for dim, extent in enumerate(value.tensor_type.shape)
    ]


def rewrite_dropouts(program: Program, rewriter: Rewriter, ctx: PassContext, rng: str) -> None:
    """Replace every active dropout; only masks of the dense model depend on how its tensors lie in memory."""
    for node in list(program.graph.nodes):
        if not active_dropout(node):
            continue
        order = memory_order(node) if rng == GLOBAL else None
        with rewriter.rewrite("dropout"):
            if base(node) == "native_dropout":
                _replace_pair(rewriter, node, order)
            else:
                with rewriter.before(node):
                    dropped = _dropped(rewriter, node, order)
                rewriter.replace(node, dropped)
        ctx.count("dropouts")


def order_draws(program: Program, rewriter: Rewriter, rng: str) -> None:
    """Chain the states of a program, and say how they are drawn."""
    after: Value | None = None
    for node in list(program.graph.nodes):
        if node.is_op("autosp.keep_mask"):
            rewriter.set_arg(node, "rng", rng)
        if not node.is_op("autosp.random_state"):
            continue
        rewriter.set_arg(node, "after", after)
        rewriter.set_arg(node, "rng", rng)
        if not any(u.is_op("autosp.keep_mask") for u in node.users):
            rewriter.set_arg(node, "unread", True)
        rewriter.set_type(node.result, program.infer(node))
        after = node.result


def _dropped(rewriter: Rewriter, node: Node, order: list[int] | None) -> Value:
    x, p = node.operands[0], float(node.arg("p"))
    if node.is_op(_COINS):
        heads = draw_mask(rewriter, extents(rewriter, x), 1.0 - p, x.tensor_type, order)
        return rewriter.create("aten.to.dtype", (heads, x.tensor_type.dtype))
    if p == 1:
        return rewriter.create("aten.mul.Tensor", (x, 0.0))
    order = None if base(node) in _FEATURES else order
    keep = draw_mask(rewriter, _mask_shape(rewriter, node, x), p, x.tensor_type, order)
    if "alpha" in base(node):
        return _saturated(rewriter, x, keep, p)
    return _product(rewriter, x, keep, p)


def _mask_shape(rewriter: Rewriter, node: Node, x: Value) -> list[Any]:
    """One element for each of `x`, or one for each channel `[N, C, 1, …]`."""
    shape = extents(rewriter, x)
    return shape[:2] + [1] * (len(shape) - 2) if base(node) in _FEATURES else shape


def _product(rewriter: Rewriter, x: Value, keep: Value, p: float) -> Value:
    # By a bool, so that the backward saves one byte an element; what is dropped times 0, as torch has it.
    kept = rewriter.create("aten.mul.Tensor", (x, keep))
    return rewriter.create("aten.mul.Tensor", (kept, 1.0 / (1.0 - p)))


def _saturated(rewriter: Rewriter, x: Value, keep: Value, p: float) -> Value:
    """Alpha dropout: what is dropped saturates, and the whole is brought back to mean 0 and variance 1."""
    scale = 1.0 / math.sqrt((_SATURATION**2 * p + 1) * (1 - p))
    shift = -scale * _SATURATION * p
    kept = rewriter.create("aten.mul.Tensor", (rewriter.create("aten.mul.Tensor", (x, keep)), scale))
    dropped = rewriter.create("aten.logical_not", (keep,))
    dropped = rewriter.create("aten.to.dtype", (dropped, x.tensor_type.dtype))
    floor = rewriter.create("aten.mul.Tensor", (dropped, scale * _SATURATION))
    return rewriter.create("aten.add.Tensor", (rewriter.create("aten.add.Tensor", (kept, floor)), shift))


def _replace_pair(rewriter: Rewriter, node: Node, order: list[int] | None) -> None:
    """`native_dropout` returns the mask too."""
    x, p = node.operands[0], float(node.arg("p"))
    with rewriter.before(node):
        keep = draw_mask(rewriter, extents(rewriter, x), p, x.tensor_type, order)
        results = (_product(rewriter, x, keep, p) if p < 1 else rewriter.create("aten.mul.Tensor", (x, 0.0)), keep)
    for reader in list(node.users):
        rewriter.replace(reader, results[reader.args[1]])
    if not node.result.uses:
        rewriter.erase(node)


__all__ = ["active_dropout", "draw_mask", "extents", "memory_order", "order_draws", "rewrite_dropouts"]
