"""Random operations: a shard would draw other numbers than the whole."""

from __future__ import annotations

from autosp_ir.comm.rules.base import Outcome, RuleContext, every, refuse_unless_whole, rule
from autosp_ir.comm.rules.views import same


@rule("aten.dropout", "aten.native_dropout", "aten.alpha_dropout", "aten.feature_dropout")
def _dropout(ctx: RuleContext) -> Outcome:
    probability = ctx.arg("p")
    if probability == 0 or ctx.arg("train") is False:
        return every(ctx, placement) if not isinstance(placement := same(ctx), tuple) else placement
    return refuse_unless_whole(ctx, "dropout draws other numbers on a shard than on the whole; set it to 0")
