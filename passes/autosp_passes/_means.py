"""Means over tokens as a sum over a count, so that each rank adds its own part and the count stays global."""

from __future__ import annotations

from typing import Any

import torch

from autosp_ir.analysis.token_axis import TokenFactors, token_factors
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.rewrite.rewriter import Rewriter

_NONE, _MEAN, _SUM = 0, 1, 2
_CLASS_LOSSES = frozenset({"aten.cross_entropy_loss", "aten.nll_loss_nd", "aten.nll_loss", "aten.nll_loss2d"})
_ELEMENT_LOSSES = frozenset(
    {
        "aten.mse_loss",
        "aten.l1_loss",
        "aten.smooth_l1_loss",
        "aten.huber_loss",
        "aten.binary_cross_entropy",
        "aten.binary_cross_entropy_with_logits",
        "aten.kl_div",
        "aten.soft_margin_loss",
        "aten.poisson_nll_loss",
    }
)


def split_means(program: Program, rewriter: Rewriter) -> int:
    """Rewrite every mean that runs over tokens into a sum divided by the global count, and losses into plain sums.

    Args:
        program: A forward program in global shapes.
        rewriter: Owner of the mutations.

    Returns:
        How many nodes were rewritten.
    """
    factors = token_factors(program)
    count = 0
    for node in list(program.graph.nodes):
        if node.is_op("aten.mean.dim", "aten.mean") and _over_tokens(node, factors):
            _split_mean(node, rewriter)
        elif node.op.name in _CLASS_LOSSES and node.arg("reduction") == _MEAN and _carries(node, factors):
            _split_class_loss(node, rewriter)
        elif node.op.name in _ELEMENT_LOSSES and node.arg("reduction") != _NONE and _carries(node, factors):
            _split_element_loss(node, rewriter)
        else:
            continue
        count += 1
    return count


def _carries(node: Node, factors: TokenFactors) -> bool:
    return any(factors.of(v) for v in node.operands)


def _over_tokens(node: Node, factors: TokenFactors) -> bool:
    source = node.operands[0]
    dims = reduced_dims(node, source.tensor_type.ndim)
    return any(f.dim in dims for f in factors.of(source))


def reduced_dims(node: Node, rank: int) -> frozenset[int]:
    """The dimensions a reduction runs over: all of them when `dim` is absent or empty."""
    dims = node.arg("dim")
    if dims is None or (isinstance(dims, tuple | list) and not dims):
        return frozenset(range(rank))
    return frozenset(d % rank for d in (dims if isinstance(dims, tuple | list) else [dims]))


def _split_mean(node: Node, rewriter: Rewriter) -> None:
    source = node.operands[0]
    dims = sorted(reduced_dims(node, source.tensor_type.ndim))
    with rewriter.before(node):
        total = _sum(source, dims, bool(node.arg("keepdim")), node, rewriter)
        mean = _quotient(total, _product(source, dims, node, rewriter), node, rewriter)
    rewriter.replace(node, mean)


def _split_element_loss(node: Node, rewriter: Rewriter) -> None:
    """Element by element, then the sum: only a plain sum can leave out padding rows."""
    with rewriter.before(node):
        losses = rewriter.create(node.op.name, *node.with_arg("reduction", _NONE), origin_from=node)
        dims = range(losses.tensor_type.ndim)
        count = _product(losses, dims, node, rewriter) if node.arg("reduction") == _MEAN else None
        total = _quotient(_sum(losses, list(dims), False, node, rewriter), count, node, rewriter)
    rewriter.replace(node, total)


def _split_class_loss(node: Node, rewriter: Rewriter) -> None:
    kept = _wide(node) == node.result.tensor_type.dtype
    with rewriter.before(node):
        total = rewriter.create(node.op.name, *node.with_arg("reduction", _SUM if kept else _NONE), origin_from=node)
        if not kept:
            total = _sum(total, list(range(total.tensor_type.ndim)), False, node, rewriter)
        mean = _quotient(total, _class_count(node, total, rewriter), node, rewriter)
    rewriter.replace(node, mean)


def _wide(node: Node) -> torch.dtype:
    """The dtype to sum a node's result in: a sum over all tokens overflows half precision where a mean does not."""
    dtype: torch.dtype = node.result.tensor_type.dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sum(source: Value, dims: list[int], keepdim: bool, node: Node, rewriter: Rewriter) -> Value:
    kwargs = {"dtype": _wide(node)} if source.tensor_type.dtype != _wide(node) else {}
    return rewriter.create("aten.sum.dim_IntList", (source, dims, keepdim), kwargs, origin_from=node)


def _quotient(total: Value, count: Any, node: Node, rewriter: Rewriter) -> Value:
    """`total / count` (`total` without a count) in the dtype of the node's result."""
    made = total if count is None else rewriter.create("aten.div.Tensor", (total, count), origin_from=node)
    dtype = node.result.tensor_type.dtype
    if made.tensor_type.dtype == dtype:
        return made
    return rewriter.create("aten._to_copy", (made,), {"dtype": dtype}, origin_from=node)


def _class_count(node: Node, total: Value, rewriter: Rewriter) -> Any:
    """What `reduction="mean"` divides by: targets not ignored, weighted by their class weights."""
    target, weight = node.arg("target"), node.arg("weight")
    if target.tensor_type.dtype.is_floating_point:
        shape = list(range(target.tensor_type.ndim))
        classes = 1 if target.tensor_type.ndim > 1 else 0
        return _product(target, [d for d in shape if d != classes], node, rewriter)

    def make(name: str, *args: Any, **kwargs: Any) -> Value:
        return rewriter.create(name, args, kwargs, origin_from=node)

    valid = make("aten.ne.Scalar", target, node.arg("ignore_index"))
    dtype = total.tensor_type.dtype
    if weight is None:
        return make("aten._to_copy", make("aten.sum", valid), dtype=dtype)
    flat = make("aten.reshape", make("aten.mul.Tensor", target, valid), [-1])
    picked = make("aten.index_select", weight, 0, flat)
    counted = make("aten.mul.Tensor", picked, make("aten.reshape", valid, [-1]))
    return make("aten.sum", counted, dtype=dtype)


def _product(source: Value, dims: Any, node: Node, rewriter: Rewriter) -> Any:
    """The number of elements over `dims`: an int, or a scalar Value where it is symbolic."""
    kind = source.type
    known, symbolic = 1, []
    for dim in dims:
        extent = kind.shape[dim] if isinstance(kind, TensorType) else 1
        if isinstance(extent, int):
            known *= extent
        else:
            symbolic.append(rewriter.create("aten.sym_size.int", (source, dim), origin_from=node))
    count: Any = known
    for size in symbolic:
        count = rewriter.create("operator.mul", (size, count), origin_from=node)
    return count
