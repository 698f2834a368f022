"""Copies to host memory and back: every rank copies what it holds, so every placement stays."""

from __future__ import annotations

from autosp_ir.comm.rules.base import Outcome, RuleContext, rule


@rule("autosp.offload", "autosp.reload")
def _copied(ctx: RuleContext) -> Outcome:
    return ctx.placement(ctx.tensors[0])


@rule("autosp.wait_copy")
def _awaited(ctx: RuleContext) -> Outcome:
    copy, source = (ctx.placement(v) for v in ctx.tensors)
    if copy != source:
        ctx.fail(f"a copy placed {copy} waits for a source placed {source}", "wait for a copy with what it was made of")
    return copy
