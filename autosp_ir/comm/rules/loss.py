"""Losses: summed over a shard of tokens they are partial sums; a mean over a shard must be split first."""

from __future__ import annotations

from autosp_ir.comm.rules.base import NEEDS_GATHER, NEEDS_SHARD, NEEDS_SUM, WHOLE, Outcome, RuleContext, rule, whole
from autosp_ir.comm.rules.pointwise import broadcast
from autosp_ir.comm.rules.reductions import SPLIT_MEAN
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard

_NONE, _MEAN, _SUM = 0, 1, 2
_REDUCTION_NAMES = {"none": _NONE, "mean": _MEAN, "sum": _SUM}


def _reduction(ctx: RuleContext) -> int:
    given = ctx.arg("reduction", _MEAN)
    return _REDUCTION_NAMES[given] if isinstance(given, str) else int(given)


def _class_dim(scores: Value) -> int:
    return 1 if scores.tensor_type.ndim > 1 else 0


def _tokens(ctx: RuleContext, scores: Value, target: Value) -> Placement:
    """The shard of the scores, in their own dimensions, with the target cut to match."""
    for value in (scores, target):
        if isinstance(ctx.placement(value), Partial):
            ctx.fail(f"%{value.name} is a partial sum and the loss is not linear", NEEDS_SUM)
    weight = ctx.arg("weight")
    if isinstance(weight, Value) and not whole(ctx.placement(weight)):
        ctx.fail("the class weights must be whole", NEEDS_GATHER)
    logits, labels = ctx.placement(scores), ctx.placement(target)
    by_class = _class_dim(scores)
    probabilities = target.tensor_type.ndim == scores.tensor_type.ndim and target.tensor_type.dtype.is_floating_point
    if isinstance(logits, Shard):
        if logits.dim == by_class:
            ctx.fail("the classes are cut, but each token needs all of them", NEEDS_GATHER)
        drop = not probabilities and logits.dim > by_class
        if labels != Shard(logits.dim - drop, logits.outer):
            ctx.fail("the target must be cut along the same tokens as the scores", NEEDS_SHARD)
        return logits
    if isinstance(labels, Shard):
        ctx.fail("the scores must be cut along the same tokens as the target", NEEDS_SHARD)
    return WHOLE


def _reduced(ctx: RuleContext, tokens: Placement, by_class: int | None) -> Placement:
    if not isinstance(tokens, Shard):
        return WHOLE
    reduction = _reduction(ctx)
    if reduction == _MEAN:
        ctx.fail("it takes the mean over tokens that are cut", SPLIT_MEAN)
    if reduction == _SUM:
        return PARTIAL
    return tokens if by_class is None or tokens.dim < by_class else Shard(tokens.dim - 1, tokens.outer)


@rule("aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss_nd", "aten.nll_loss2d")
def _token_loss(ctx: RuleContext) -> Outcome:
    scores = ctx.operand("self")
    return _reduced(ctx, _tokens(ctx, scores, ctx.operand("target")), _class_dim(scores))


@rule("aten.nll_loss_forward", "aten.nll_loss2d_forward")
def _nll_forward(ctx: RuleContext) -> Outcome:
    scores = ctx.operand("self")
    loss = _reduced(ctx, _tokens(ctx, scores, ctx.operand("target")), _class_dim(scores))
    # Without a reduction the second result, the total weight, is not computed and is zero.
    return loss, loss if isinstance(loss, Partial) else WHOLE


@rule("aten.nll_loss_backward", "aten.nll_loss2d_backward")
def _nll_backward(ctx: RuleContext) -> Outcome:
    gradient, scores, target = ctx.operand("grad_output"), ctx.operand("self"), ctx.operand("target")
    total = ctx.operand("total_weight")
    flow = ctx.placement(gradient)
    if isinstance(flow, Partial):
        others = [v for v in (scores, target, ctx.arg("weight"), total) if isinstance(v, Value)]
        if not all(whole(ctx.placement(v)) for v in others):
            ctx.fail("a partial gradient meets values that are not whole", NEEDS_SUM)
        return PARTIAL
    tokens = _tokens(ctx, scores, target)
    reduction = _reduction(ctx)
    if reduction == _MEAN and (isinstance(tokens, Shard) or not whole(ctx.placement(total))):
        ctx.fail("it is the gradient of a mean over tokens that are cut", SPLIT_MEAN)
    if reduction == _NONE:
        by_class = _class_dim(scores)
        expected = tokens
        if isinstance(tokens, Shard) and tokens.dim > by_class:
            expected = Shard(tokens.dim - 1, tokens.outer)
        matches = flow == expected or (whole(flow) and whole(expected))
        if not matches and not (isinstance(expected, Shard) and ctx.uniform_along(gradient, expected.dim)):
            ctx.fail("the gradient must be cut along the same tokens as the scores", NEEDS_SHARD)
    elif not whole(flow):
        ctx.fail("the gradient of a sum is one number, which must be whole", NEEDS_GATHER)
    return tokens


@rule(
    "aten.mse_loss",
    "aten.l1_loss",
    "aten.smooth_l1_loss",
    "aten.huber_loss",
    "aten.binary_cross_entropy",
    "aten.binary_cross_entropy_with_logits",
    "aten.kl_div",
    "aten.soft_margin_loss",
)
def _elementwise_loss(ctx: RuleContext) -> Outcome:
    return _reduced(ctx, broadcast(ctx, ctx.tensors), None)


@rule(
    "aten.mse_loss_backward",
    "aten.smooth_l1_loss_backward",
    "aten.huber_loss_backward",
    "aten.soft_margin_loss_backward",
    "aten.binary_cross_entropy_backward",
)
def _elementwise_loss_backward(ctx: RuleContext) -> Outcome:
    gradient = ctx.operand("grad_output")
    others = [v for v in ctx.tensors if v is not gradient]
    if isinstance(ctx.placement(gradient), Partial):
        if not all(whole(ctx.placement(v)) for v in others):
            ctx.fail("a partial gradient meets values that are not whole", NEEDS_SUM)
        return PARTIAL
    placement = broadcast(ctx, ctx.tensors)
    if isinstance(placement, Shard) and _reduction(ctx) == _MEAN:
        ctx.fail("it is the gradient of a mean over tokens that are cut", SPLIT_MEAN)
    return placement
