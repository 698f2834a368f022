"""Chunks of a rank's own part: every placement stays."""

from __future__ import annotations

from autosp_ir.comm.rules.base import NEEDS_SHARD, WHOLE, Outcome, RuleContext, every, rule, whole
from autosp_ir.ir.types import Placement, Shard

_BLOCKED = "reshape the value so that the cut dimension holds one block of tokens"


def _refuse_blocks(ctx: RuleContext, placement: Placement, dim: int) -> None:
    if isinstance(placement, Shard) and placement.dim == dim and placement.outer != 1:
        ctx.fail("a chunk would take whole blocks in place of a part of each", _BLOCKED)


@rule("autosp.chunk")
def _chunk(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    placement = ctx.placement(value)
    _refuse_blocks(ctx, placement, ctx.dim(value))
    return every(ctx, placement)


@rule("autosp.unchunk")
def _unchunk(ctx: RuleContext) -> Outcome:
    placements = [ctx.placement(v) for v in ctx.tensors]
    first = next((p for p in placements if not whole(p)), None)
    if first is None:
        return WHOLE
    if any(p != first for p in placements):
        ctx.fail(f"chunks placed differently are joined: {', '.join(map(str, placements))}", NEEDS_SHARD)
    _refuse_blocks(ctx, first, ctx.dim(ctx.tensors[0]))
    return first
