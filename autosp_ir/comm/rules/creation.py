"""Values made from nothing: constants fit any shard, counters and random numbers do not."""

from __future__ import annotations

from autosp_ir.comm.rules.base import FILL_OPS, NEEDS_SUM, WHOLE, Outcome, RuleContext, cuttable, rule, whole
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import Shard, TensorType

_LIKE = ("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like")


@rule(*_LIKE)
def _like(ctx: RuleContext) -> Outcome:
    """The shape comes from the operand, so its shard does too; the value is no sum."""
    placement = ctx.placement(ctx.tensors[0])
    return placement if isinstance(placement, Shard) else _constant(ctx)


@rule(*sorted(FILL_OPS - set(_LIKE)))
def _constant(ctx: RuleContext) -> Outcome:
    number = ctx.arg("fill_value")
    if any(number is measured for measured in ctx.local_extents()):
        ctx.fail("the fill value measures a sharded dimension", "multiply it by the axis size")
    made = ctx.node.result.type
    wanted = ctx.shard_hint()
    return wanted if wanted is not None and isinstance(made, TensorType) and cuttable(made, wanted) else WHOLE


@rule("aten.fill.Scalar", "aten.fill.Tensor")
def _fill(ctx: RuleContext) -> Outcome:
    """Only the shape comes from the first operand."""
    number = ctx.arg("value")
    if isinstance(number, Value) and not whole(ctx.placement(number)):
        ctx.fail(f"%{number.name}, the number that fills it, is a partial sum", NEEDS_SUM)
    placement = ctx.placement(ctx.operand("self"))
    return placement if isinstance(placement, Shard) else WHOLE


@rule("aten.arange", "aten.arange.start", "aten.arange.start_step", "aten.eye", "aten.linspace")
def _counter(ctx: RuleContext) -> Outcome:
    if ctx.local_extents():
        ctx.fail("it counts up to one rank's length", "count over the whole length, then cut with autosp.shard")
    return WHOLE
