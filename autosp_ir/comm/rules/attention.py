"""Attention: cut along the batch or along the heads it is local; along the tokens it waits for a strategy pass."""

from __future__ import annotations

from collections.abc import Sequence

from autosp_ir.comm.rules.base import (
    NEEDS_GATHER,
    NEEDS_SUM,
    WHOLE,
    Outcome,
    RuleContext,
    every,
    refuse_partial,
    rule,
    whole,
)
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard

RESOLVED = "attention-resolved"
"""The fact that a strategy pass establishes: no attention is cut along its tokens any more."""

_BATCH, _HEADS, _TOKENS = 0, 1, 2
_USE_STRATEGY = "run a strategy pass such as `ulysses` behind token-partition"


def attention_operands(node: Node) -> tuple[list[Value], list[Value]]:
    """The [B, H, S, …] operands of an attention node, and the masks: bias and segment ids."""
    masks = [v for v in (node.arg("bias"), node.arg("segment_ids"), node.arg("attn_mask")) if isinstance(v, Value)]
    main = [v for v in node.operands if all(v is not m for m in masks)]
    return main, masks


def cut_along_tokens(placement: Placement) -> bool:
    """Whether an attention operand so placed is cut along its tokens."""
    return isinstance(placement, Shard) and placement.dim == _TOKENS


@rule("autosp.attention")
def _attention(ctx: RuleContext) -> Outcome:
    placement = _common(ctx, unresolved=ctx.program.stage is Stage.FORWARD and RESOLVED not in ctx.program.facts)
    return placement, placement


@rule("autosp.attention_backward")
def _attention_backward(ctx: RuleContext) -> Outcome:
    gradients = [v for v in (ctx.arg("dout"), ctx.arg("dlse")) if isinstance(v, Value)]
    if any(isinstance(ctx.placement(g), Partial) for g in gradients):
        for gradient in gradients:
            if not isinstance(ctx.placement(gradient), Partial) and not ctx.is_zero(gradient):
                ctx.fail(f"%{gradient.name} would be contributed once per rank", NEEDS_SUM)
        others = [v for v in ctx.tensors if all(v is not g for g in gradients)]
        if not all(whole(ctx.placement(v)) for v in others):
            ctx.fail("a partial gradient meets values that are not whole", NEEDS_SUM)
        return every(ctx, PARTIAL)
    return every(ctx, _common(ctx, unresolved=False))


@rule("aten.scaled_dot_product_attention")
def _scaled_dot_product_attention(ctx: RuleContext) -> Outcome:
    if ctx.arg("dropout_p") and not all(whole(ctx.placement(v)) for v in ctx.tensors):
        ctx.fail("dropout draws other masks on a shard than on the whole", "set the attention dropout to 0")
    if ctx.tensors[0].tensor_type.ndim != 4:
        if not all(whole(ctx.placement(v)) for v in ctx.tensors):
            ctx.fail("only [B, H, S, D] attention keeps a shard", "run canonicalize first")
        return WHOLE
    return _common(ctx, unresolved=False)


def _common(ctx: RuleContext, *, unresolved: bool) -> Placement:
    """The shard that every main operand has, checked against the masks."""
    refuse_partial(ctx)
    main, masks = attention_operands(ctx.node)
    placements = [ctx.placement(v) for v in main]
    shard = next((p for p in placements if isinstance(p, Shard)), None)
    if shard is None:
        if not all(whole(ctx.placement(m)) for m in masks):
            ctx.fail("a mask is cut but the queries, keys and values are not", NEEDS_GATHER)
        return WHOLE
    if shard.outer != 1 or shard.dim not in (_BATCH, _HEADS, _TOKENS):
        ctx.fail(f"attention cannot run cut along {shard}", "cut the batch, the heads or the tokens")
    for value, placement in zip(main, placements, strict=True):
        if placement != shard and not (whole(placement) and _constant_gradient(ctx, value, main, shard)):
            ctx.fail(f"%{value.name} is {placement}, other operands are {shard}", NEEDS_GATHER)
    if shard.dim == _TOKENS:
        if not unresolved:
            ctx.fail("its queries, keys and values are still cut along the tokens", _USE_STRATEGY)
        _check_whole_masks(ctx, masks)
    else:
        _check_masks(ctx, masks, shard.dim)
    return shard


def _constant_gradient(ctx: RuleContext, value: Value, main: Sequence[Value], shard: Shard) -> bool:
    """A constant (an all-zero gradient of one result) stands for its own shard if its local length fits."""
    lengths = {v.tensor_type.shape[shard.dim] for v in main if ctx.placement(v) == shard}
    return value.tensor_type.shape[shard.dim] in lengths and ctx.uniform_along(value, shard.dim)


def _check_whole_masks(ctx: RuleContext, masks: Sequence[Value]) -> None:
    for mask in masks:
        if not whole(ctx.placement(mask)):
            ctx.fail(f"the mask %{mask.name} stays whole until a strategy pass places it", NEEDS_GATHER)


def _check_masks(ctx: RuleContext, masks: Sequence[Value], dim: int) -> None:
    for mask in masks:
        # A bias broadcasts to [B, H, Sq, Sk]; segment ids are [B, S] and know nothing of heads.
        is_ids = mask is ctx.arg("segment_ids")
        own = dim if is_ids else dim - (4 - mask.tensor_type.ndim)
        absent = own < 0 or (is_ids and dim == _HEADS)
        placement = ctx.placement(mask)
        if absent or (whole(placement) and mask.tensor_type.shape[own] == 1):
            if not whole(placement):
                ctx.fail(f"the mask %{mask.name} must be whole", NEEDS_GATHER)
        elif placement != Shard(own) and not ctx.uniform_along(mask, own):
            ctx.fail(f"the mask %{mask.name} must be cut like the queries", "cut it with autosp.shard")
