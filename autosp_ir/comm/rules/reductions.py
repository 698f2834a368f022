"""Reductions and operations along one dimension: a sum over a shard is a partial sum, all others need it whole."""

from __future__ import annotations

from collections.abc import Iterable

from autosp_ir.comm.rules.base import NEEDS_GATHER, NEEDS_SUM, Outcome, RuleContext, every, refuse_partial, rule, whole
from autosp_ir.comm.rules.pointwise import broadcast
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard

SPLIT_MEAN = "write it as a sum over the local elements divided by the whole model's count"


def kept(ctx: RuleContext, value: Value, reduced: Iterable[int], keepdim: bool) -> Placement:
    """Where a shard goes when the other dimensions are reduced."""
    placement = ctx.placement(value)
    removed = set(reduced)
    if not isinstance(placement, Shard) or keepdim:
        return placement
    return Shard(placement.dim - sum(r < placement.dim for r in removed), placement.outer)


def reduce(
    ctx: RuleContext, value: Value, reduced: Iterable[int], keepdim: bool, advice: str = NEEDS_GATHER
) -> Placement:
    """The placement of a reduction that needs every element of the reduced dimensions on one rank."""
    removed = set(reduced)
    placement = ctx.placement(value)
    if isinstance(placement, Shard) and placement.dim in removed:
        ctx.fail(f"it reduces dimension {placement.dim}, which is cut", advice)
    return kept(ctx, value, removed, keepdim)


@rule("aten.sum", "aten.sum.dim_IntList")
def _sum(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    dims = ctx.dims(value)
    placement = ctx.placement(value)
    if isinstance(placement, Shard) and placement.dim in dims:
        return PARTIAL
    return kept(ctx, value, dims, bool(ctx.arg("keepdim", False)))


@rule("aten.sum_to_size")
def _sum_to_size(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    made = ctx.result_type
    placement = ctx.placement(value)
    if not isinstance(placement, Shard) or made is None:
        return placement
    dim = placement.dim - (value.tensor_type.ndim - made.ndim)
    if dim < 0 or made.shape[dim] != value.tensor_type.shape[placement.dim]:
        return PARTIAL
    return Shard(dim, placement.outer)


@rule("aten.mean", "aten.mean.dim")
def _mean(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    return reduce(ctx, value, ctx.dims(value), bool(ctx.arg("keepdim", False)), SPLIT_MEAN)


@rule(
    "aten.amax",
    "aten.amin",
    "aten.max",
    "aten.min",
    "aten.max.dim",
    "aten.min.dim",
    "aten.argmax",
    "aten.argmin",
    "aten.any",
    "aten.any.dim",
    "aten.any.dims",
    "aten.all",
    "aten.all.dim",
    "aten.all.dims",
    "aten.prod",
    "aten.prod.dim_int",
    "aten.logsumexp",
    "aten.var",
    "aten.var.dim",
    "aten.var.correction",
    "aten.std",
    "aten.std.dim",
    "aten.std.correction",
    "aten.var_mean.correction",
    "aten.linalg_vector_norm",
    "aten.norm.ScalarOpt_dim",
    "aten.nansum",
    "aten.count_nonzero",
    "aten.count_nonzero.dim_IntList",
    "aten.aminmax",
    "aten.median.dim",
    "aten.nanmedian.dim",
    "aten.kthvalue",
    "aten.mode",
)
def _nonlinear_reduction(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    value = ctx.tensors[0]
    return every(ctx, reduce(ctx, value, ctx.dims(value), bool(ctx.arg("keepdim", False))))


def along(ctx: RuleContext, value: Value, dims: Iterable[int]) -> Placement:
    """The placement of an operation that keeps the shape and mixes elements along `dims`."""
    placement = ctx.placement(value)
    if isinstance(placement, Shard) and placement.dim in set(dims):
        ctx.fail(f"it mixes elements along dimension {placement.dim}, which is cut", NEEDS_GATHER)
    return placement


@rule("aten.cumsum")
def _cumsum(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    return along(ctx, value, ctx.dims(value))


@rule(
    "aten.softmax.int",
    "aten._softmax",
    "aten._safe_softmax",
    "aten.log_softmax.int",
    "aten._log_softmax",
    "aten.cumprod",
    "aten.cummax",
    "aten.logcumsumexp",
    "aten.sort",
    "aten.sort.stable",
    "aten.argsort",
    "aten.topk",
    "aten.glu",
)
def _nonlinear_along(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    value = ctx.tensors[0]
    return every(ctx, along(ctx, value, ctx.dims(value)))


@rule("aten._softmax_backward_data", "aten._log_softmax_backward_data")
def _softmax_backward(ctx: RuleContext) -> Outcome:
    gradient, output = ctx.operand("grad_output"), ctx.operand("output")
    if isinstance(ctx.placement(gradient), Partial):
        if not whole(ctx.placement(output)):
            ctx.fail("a partial gradient meets an output that is not whole", NEEDS_SUM)
        return PARTIAL
    placement = broadcast(ctx, [gradient, output])
    if isinstance(placement, Shard) and placement.dim == ctx.dim(output):
        ctx.fail(f"it mixes elements along dimension {placement.dim}, which is cut", NEEDS_GATHER)
    return placement


@rule("aten.tril", "aten.triu")
def _triangle(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    ndim = value.tensor_type.ndim
    return along(ctx, value, (ndim - 2, ndim - 1))


@rule("aten.diff")
def _diff(ctx: RuleContext) -> Outcome:
    # Its boundary operands, if any, would have to be cut alike: only the plain form is placed.
    if len(ctx.tensors) > 1 and not all(whole(ctx.placement(v)) for v in ctx.tensors):
        ctx.fail("differences with a boundary operand keep no shard", NEEDS_GATHER)
    value = ctx.tensors[0]
    return along(ctx, value, ctx.dims(value))


@rule("aten.linalg_cross")
def _cross(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    return _off(ctx, broadcast(ctx, ctx.tensors), int(ctx.arg("dim")) % _rank(ctx))


@rule("aten.cosine_similarity")
def _cosine_similarity(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    reduced = int(ctx.arg("dim")) % _rank(ctx)
    placement = _off(ctx, broadcast(ctx, ctx.tensors), reduced)
    return (
        Shard(placement.dim - (placement.dim > reduced), placement.outer) if isinstance(placement, Shard) else placement
    )


@rule("aten.pairwise_distance")
def _pairwise_distance(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    return _off(ctx, broadcast(ctx, ctx.tensors), _rank(ctx) - 1)


def _rank(ctx: RuleContext) -> int:
    """The number of dimensions of the broadcast operands."""
    return max(v.tensor_type.ndim for v in ctx.tensors)


def _off(ctx: RuleContext, placement: Placement, dim: int) -> Placement:
    if isinstance(placement, Shard) and placement.dim == dim:
        ctx.fail(f"it mixes elements along dimension {dim}, which is cut", NEEDS_GATHER)
    return placement
