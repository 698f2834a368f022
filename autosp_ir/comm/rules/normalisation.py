"""Normalisation over trailing dimensions, with its backward."""

from __future__ import annotations

from collections.abc import Iterable

from autosp_ir.comm.rules.base import NEEDS_GATHER, NEEDS_SUM, Outcome, RuleContext, every, refuse_partial, rule, whole
from autosp_ir.comm.rules.pointwise import broadcast
from autosp_ir.comm.rules.reductions import along
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard, TupleType


def _leading(ctx: RuleContext, value: Value) -> int:
    """Number of dimensions that a layer norm does not normalise over."""
    return value.tensor_type.ndim - len(ctx.arg("normalized_shape"))


def _normalised(ctx: RuleContext, value: Value, affine: Iterable[Value | None]) -> Placement:
    refuse_partial(ctx)
    for weight in affine:
        if isinstance(weight, Value) and not whole(ctx.placement(weight)):
            ctx.fail(f"%{weight.name} must be whole", NEEDS_GATHER)
    return along(ctx, value, range(_leading(ctx, value), value.tensor_type.ndim))


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def _norm(ctx: RuleContext) -> Outcome:
    return every(ctx, _normalised(ctx, ctx.operand("input"), (ctx.arg("weight"), ctx.arg("bias"))))


@rule("aten.native_layer_norm_backward", "aten._fused_rms_norm_backward")
def _norm_backward(ctx: RuleContext) -> Outcome:
    gradient, x = ctx.operand("grad_out"), ctx.operand("input")
    weights = [ctx.arg("weight"), ctx.arg("bias")]
    statistics = [v for v in (ctx.arg("mean"), ctx.arg("rstd")) if isinstance(v, Value)]
    kind = ctx.node.result.type
    count = len(kind.elements) if isinstance(kind, TupleType) else 3
    if isinstance(ctx.placement(gradient), Partial):
        if not all(whole(ctx.placement(v)) for v in ctx.tensors if v is not gradient):
            ctx.fail("a partial gradient meets values that are not whole", NEEDS_SUM)
        return (PARTIAL,) * count
    if any(isinstance(w, Value) and not whole(ctx.placement(w)) for w in weights):
        ctx.fail("the affine parameters must be whole", NEEDS_GATHER)
    shard = broadcast(ctx, [gradient, x, *statistics])
    if not isinstance(shard, Shard):
        return (shard,) * count
    if shard.dim >= _leading(ctx, x):
        ctx.fail(f"it normalises over dimension {shard.dim}, which is cut", NEEDS_GATHER)
    return (shard, *(PARTIAL,) * (count - 1))


@rule("aten.group_norm", "aten.native_group_norm")
def _group_norm(ctx: RuleContext) -> Outcome:
    """Rows of the first dimension are normalised each on its own."""
    refuse_partial(ctx)
    x = ctx.operand("input")
    return every(ctx, _rows(ctx, x, [v for v in ctx.tensors if v is not x]))


@rule("aten.native_group_norm_backward")
def _group_norm_backward(ctx: RuleContext) -> Outcome:
    gradient, x = ctx.operand("grad_out"), ctx.operand("input")
    others = [v for v in ctx.tensors if v is not gradient]
    if isinstance(ctx.placement(gradient), Partial):
        if not all(whole(ctx.placement(v)) for v in others):
            ctx.fail("a partial gradient meets values that are not whole", NEEDS_SUM)
        return (PARTIAL,) * 3
    refuse_partial(ctx)
    weight = ctx.arg("weight")
    placement = _rows(ctx, x, [weight] if isinstance(weight, Value) else [])
    alike = (gradient, ctx.operand("mean"), ctx.operand("rstd"))
    if any(ctx.placement(v) != placement and not (whole(ctx.placement(v)) and whole(placement)) for v in alike):
        ctx.fail("the gradient and the value that was normalised are cut in two ways", NEEDS_GATHER)
    return (placement, *(PARTIAL if isinstance(placement, Shard) else placement,) * 2)


def _rows(ctx: RuleContext, x: Value, affine: Iterable[Value]) -> Placement:
    if not all(whole(ctx.placement(v)) for v in affine):
        ctx.fail("the affine parameters must be whole", NEEDS_GATHER)
    placement = along(ctx, x, range(1, x.tensor_type.ndim))
    told = ctx.node.is_op("aten.native_group_norm", "aten.native_group_norm_backward")
    if isinstance(placement, Shard) and told and (ctx.what_if or ctx.arg("N") != x.tensor_type.shape[0]):
        ctx.fail("it is told the number of rows, which is another one on a rank", "use aten.group_norm")
    return placement
