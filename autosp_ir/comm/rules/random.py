"""Random operations: a shard would draw other numbers than the whole, unless its mask is a value of its own."""

from __future__ import annotations

from autosp_ir.comm.random_masks import GLOBAL
from autosp_ir.comm.rules.base import WHOLE, Outcome, RuleContext, every, refuse_unless_whole, rule, whole
from autosp_ir.comm.rules.views import same
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import Shard


@rule("aten.dropout", "aten.native_dropout", "aten.alpha_dropout", "aten.feature_dropout")
def _dropout(ctx: RuleContext) -> Outcome:
    probability = ctx.arg("p")
    if probability == 0 or ctx.arg("train") is False:
        return every(ctx, placement) if not isinstance(placement := same(ctx), tuple) else placement
    if ctx.size > 1:
        ctx.fail("each rank would draw a mask of its own", "run canonicalize: it makes the mask a value with a layout")
    return refuse_unless_whole(ctx, "dropout draws other numbers on a shard than on the whole")


@rule("autosp.random_state")
def _state(ctx: RuleContext) -> Outcome:
    """Ranks whose generators agree draw the same state; the first step compares them where it matters."""
    del ctx
    return WHOLE


@rule("autosp.keep_mask")
def _mask(ctx: RuleContext) -> Outcome:
    """The same everywhere, or, with a rank's index, that rank's part of a mask that nobody holds."""
    index = ctx.arg("index")
    # `lower-comm` forgets where one rank alone stands.
    alone = ctx.size == 1 and isinstance(index, Value) and whole(ctx.placement(index))
    if ctx.arg("axis") != ctx.axis or not isinstance(index, Value) or alone:
        return refuse_unless_whole(ctx, "a mask is drawn from what all ranks know")
    if ctx.arg("rng") == GLOBAL:
        ctx.fail("a mask of the dense model has no part of a rank's own", "cut the whole mask with autosp.shard")
    if ctx.placement(index) != Shard(0) or index.tensor_type.shape != (1,):
        ctx.fail(
            f"%{index.name} does not say which rank this is", "cut arange(size) with autosp.shard: one number a rank"
        )
    return Shard(int(ctx.arg("dim")), ctx.arg("outer"))
