"""Attention: cut along the batch or along the heads it is local; along the tokens it waits for a strategy pass.

A strategy may resolve it without moving the queries. Queries that are cut attend to keys and values that are whole, and
each rank adds a partial sum to their gradients; or `local_axis` says that every rank attends to its own keys, and `lse`
merges what ranks found. In both the positions of cut tokens are a value cut like them: nothing else knows the rank.
"""

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
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard, TensorType

RESOLVED = "attention-resolved"
"""The fact that a strategy pass establishes: no attention is cut along its tokens any more."""

_BATCH, _HEADS, _TOKENS = 0, 1, 2
_MASKS = ("bias", "segment_ids", "attn_mask", "keep")
_POSITIONS = ("q_positions", "kv_positions")
_GIVE_POSITIONS = "pass positions cut along the tokens, such as air.token_positions makes"
_USE_STRATEGY = "run a strategy pass such as `ulysses` behind token-partition"


def attention_operands(node: Node) -> tuple[list[Value], list[Value]]:
    """The [B, H, S, …] operands of an attention node, and the masks: bias, segment ids and dropout's."""
    masks = [v for name in _MASKS if isinstance(v := node.arg(name), Value)]
    apart = [*masks, *(node.arg(name) for name in _POSITIONS)]
    main = [v for v in node.operands if all(v is not other for other in apart)]
    return main, masks


def cut_along_tokens(placement: Placement) -> bool:
    """Whether an attention operand so placed is cut along its tokens."""
    return isinstance(placement, Shard) and placement.dim == _TOKENS


def unresolved_axes(node: Node) -> list[str]:
    """Mesh axes that cut the tokens of an attention which no strategy has resolved there."""
    main, _ = attention_operands(node)
    layouts = [v.type.layout for v in main if isinstance(v.type, TensorType)]
    keys = [v.tensor_type.layout for v in (node.arg("k"), node.arg("v")) if isinstance(v, Value)]
    axes = dict.fromkeys(
        axis for layout in layouts for axis, placement in layout.items() if cut_along_tokens(placement)
    )
    gathered = {axis for axis in axes if keys and all(whole(layout[axis]) for layout in keys)}
    return [axis for axis in axes if axis != node.arg("local_axis") and axis not in gathered]


@rule("autosp.attention")
def _attention(ctx: RuleContext) -> Outcome:
    placement = _common(ctx, unresolved=ctx.program.stage is Stage.FORWARD and RESOLVED not in ctx.program.facts)
    return placement, placement


@rule("autosp.attention_backward")
def _attention_backward(ctx: RuleContext) -> Outcome:
    if _sums_partial_gradients(ctx):
        return every(ctx, PARTIAL)
    return _gradients(ctx, _common(ctx, unresolved=False))


@rule("autosp.attention_bias_backward")
def _attention_bias_backward(ctx: RuleContext) -> Outcome:
    if _sums_partial_gradients(ctx):
        return every(ctx, PARTIAL)
    placement = _common(ctx, unresolved=False)
    return (*_gradients(ctx, placement), _bias_gradient(ctx, placement))


def _sums_partial_gradients(ctx: RuleContext) -> bool:
    """Whether the incoming gradient is a partial sum over ranks that otherwise do the same work."""
    gradients = [v for v in (ctx.arg("dout"), ctx.arg("dlse")) if isinstance(v, Value)]
    if not any(isinstance(ctx.placement(g), Partial) for g in gradients):
        return False
    for gradient in gradients:
        if not isinstance(ctx.placement(gradient), Partial) and not ctx.is_zero(gradient):
            ctx.fail(f"%{gradient.name} would be contributed once per rank", NEEDS_SUM)
    others = [v for v in ctx.tensors if all(v is not g for g in gradients)]
    if not all(whole(ctx.placement(v)) for v in others):
        ctx.fail("a partial gradient meets values that are not whole", NEEDS_SUM)
    return True


def _gradients(ctx: RuleContext, placement: Placement) -> tuple[Placement, Placement, Placement]:
    keys = PARTIAL if cut_along_tokens(placement) and _keys_are_whole(ctx) else placement
    return placement, keys, keys


def _bias_gradient(ctx: RuleContext, placement: Placement) -> Placement:
    """A bias that is cut has a gradient cut like it; to one that is whole every rank contributes its part."""
    bias = ctx.operand("bias")
    if not isinstance(placement, Shard):
        return placement
    here = ctx.placement(bias)
    own = placement.dim - (4 - bias.tensor_type.ndim)
    if whole(here) and own >= 0 and bias.tensor_type.shape[own] != 1:
        ctx.fail(f"the learned bias %{bias.name} must be cut like the queries", "cut it with autosp.shard")
    return PARTIAL if whole(here) else here


@rule("aten.scaled_dot_product_attention")
def _scaled_dot_product_attention(ctx: RuleContext) -> Outcome:
    if ctx.arg("dropout_p") and ctx.size > 1:
        ctx.fail("each rank would draw a dropout mask of its own", "set the attention dropout to 0")
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
    whole_keys = [ctx.operand("k"), ctx.operand("v")] if shard.dim == _TOKENS and _keys_are_whole(ctx) else []
    for value, placement in zip(main, placements, strict=True):
        if any(value is k for k in whole_keys):
            continue
        if placement != shard and not (whole(placement) and _constant_gradient(ctx, value, main, shard)):
            ctx.fail(f"%{value.name} is {placement}, other operands are {shard}", NEEDS_GATHER)
    if shard.dim == _TOKENS and (whole_keys or ctx.arg("local_axis") == ctx.axis):
        _check_resolved(ctx)
    elif shard.dim == _TOKENS:
        if not unresolved:
            ctx.fail("its queries, keys and values are still cut along the tokens", _USE_STRATEGY)
        _check_whole_masks(ctx, masks)
    else:
        _check_masks(ctx, masks, shard.dim)
    return shard


def _keys_are_whole(ctx: RuleContext) -> bool:
    keys = [v for v in (ctx.arg("k"), ctx.arg("v")) if isinstance(v, Value)]
    return len(keys) == 2 and all(whole(ctx.placement(v)) for v in keys)


def _check_resolved(ctx: RuleContext) -> None:
    """Queries cut along the tokens that attend to whole keys, or to the keys of their own rank."""
    ids, bias, keep = ctx.arg("segment_ids"), ctx.arg("bias"), ctx.arg("keep")
    looks = ctx.arg("causal") or ctx.arg("window") is not None or ids is not None
    for name, tokens in zip(_POSITIONS, ("q", "k"), strict=True):
        positions, cut = ctx.arg(name), cut_along_tokens(ctx.placement(ctx.operand(tokens)))
        if positions is None:
            if cut and looks and ctx.size > 1:
                ctx.fail(f"its mask looks at positions, and no {name} say where a rank's tokens stand", _GIVE_POSITIONS)
        elif ctx.placement(positions) != Shard(0) if cut else not whole(ctx.placement(positions)):
            ctx.fail(f"{name} must be cut like the tokens whose positions they are", _GIVE_POSITIONS)
    if ids is not None:
        _check_whole_masks(ctx, [ids])
    if isinstance(keep, Value):
        _check_masks(ctx, [keep], _TOKENS)
        if not _keys_are_whole(ctx):
            ctx.fail("a dropout mask of all keys meets the keys of one rank", "resolve it by another strategy")
    if isinstance(bias, Value):
        _check_masks(ctx, [bias], _TOKENS)
        if not _keys_are_whole(ctx) and bias.tensor_type.ndim and bias.tensor_type.shape[-1] != 1:
            ctx.fail("a bias over all keys meets the keys of one rank", "resolve this attention by another strategy")


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
