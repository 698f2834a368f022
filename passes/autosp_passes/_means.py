"""Means over tokens as a sum over a count, so that each rank adds its own part and the count stays global."""

from __future__ import annotations

from typing import Any

from autosp_ir.analysis.token_axis import TokenFactors, token_factors
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.rewrite.rewriter import Rewriter

_MEAN, _SUM = 1, 2
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
    """Rewrite every mean that runs over tokens into a sum divided by the global count.

    Args:
        program: A forward program in global shapes.
        rewriter: Owner of the mutations.

    Returns:
        How many means were rewritten.
    """
    factors = token_factors(program)
    count = 0
    for node in list(program.graph.nodes):
        if node.is_op("aten.mean.dim", "aten.mean") and _over_tokens(node, factors):
            _split_mean(node, rewriter)
        elif node.op.name in _CLASS_LOSSES and node.arg("reduction") == _MEAN and _carries(node, factors):
            _split_class_loss(node, rewriter)
        elif node.op.name in _ELEMENT_LOSSES and node.arg("reduction") == _MEAN and _carries(node, factors):
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
        # Summed in the result's dtype, as mean(dtype=) does.
        kwargs = {"dtype": node.arg("dtype")} if node.arg("dtype") is not None else {}
        total = rewriter.create(
            "aten.sum.dim_IntList", (source, dims, bool(node.arg("keepdim"))), kwargs, origin_from=node
        )
        count = _product(source, dims, node, rewriter)
        mean = rewriter.create("aten.div.Tensor", (total, count), origin_from=node)
    rewriter.replace(node, mean)


def _split_element_loss(node: Node, rewriter: Rewriter) -> None:
    source = node.operands[0]
    kind = source.tensor_type
    with rewriter.before(node):
        total = rewriter.create(node.op.name, *node.with_arg("reduction", _SUM), origin_from=node)
        count = _product(source, range(kind.ndim), node, rewriter)
        mean = rewriter.create("aten.div.Tensor", (total, count), origin_from=node)
    rewriter.replace(node, mean)


def _split_class_loss(node: Node, rewriter: Rewriter) -> None:
    with rewriter.before(node):
        total = rewriter.create(node.op.name, *node.with_arg("reduction", _SUM), origin_from=node)
        count = _class_count(node, total, rewriter)
        mean = rewriter.create("aten.div.Tensor", (total, count), origin_from=node)
    rewriter.replace(node, mean)


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
    return make("aten.sum", counted)


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
