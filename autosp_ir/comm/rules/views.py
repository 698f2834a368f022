"""Views and copies: where the shard goes when dimensions are split, merged, moved, added or removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from autosp_ir.comm.rules.base import (
    NEEDS_GATHER,
    NEEDS_SUM,
    WHOLE,
    Outcome,
    RuleContext,
    cuttable,
    off_dimension,
    product,
    quotient,
    refuse_partial,
    rule,
    whole,
)
from autosp_ir.ir.graph import Phase, Value
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import Dim, Partial, Placement, Shard

AMBIGUOUS = "give the value its layout when it is created, or keep the cut dimension apart from dimensions of length 1"


@rule(
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh_copy",
    "aten._conj",
    "aten.conj",
    "aten.resolve_conj",
    "aten.real",
    "aten.imag",
    "aten._neg_view",
    "aten.resolve_neg",
    "aten.lift_fresh",
    "aten.detach_copy",
    "aten.alias_copy",
)
def same(ctx: RuleContext) -> Outcome:
    """The placement of the first operand."""
    return ctx.placement(ctx.tensors[0])


@rule("aten.view_as_real", "aten.view_as_complex")
def _complex(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    if ctx.node.is_op("aten.view_as_complex"):
        return off_dimension(ctx, value, value.tensor_type.ndim - 1, "real and imaginary part are joined")
    return ctx.placement(value)


@rule("aten.view.dtype")
def _view_dtype(ctx: RuleContext) -> Outcome:
    """Complex numbers as pairs, for one: the last dimension holds elements of another size."""
    refuse_partial(ctx)
    value = ctx.tensors[0]
    return off_dimension(ctx, value, value.tensor_type.ndim - 1, "elements are split or joined")


@rule(
    "aten._to_copy",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten.type_as",
    "aten.to.other",
    "prims.convert_element_type",
)
def _cast(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    placement = ctx.placement(value)
    made = ctx.result_type
    if isinstance(placement, Partial) and made is not None:
        source, target = value.tensor_type.dtype, made.dtype
        inexact = target.is_floating_point or target.is_complex
        if not inexact and (source.is_floating_point or source.is_complex or target == torch.bool):
            ctx.fail(f"a cast of a partial sum to {target} is not linear", NEEDS_SUM)
    return placement


# -- split and merge -------------------------------------------------------------------------------------------------


@rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.view_copy",
)
def _reshape(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    placement = ctx.placement(value)
    if not isinstance(placement, Shard):
        return placement
    made = ctx.result_type
    if made is None:
        return ctx.fail("its result has no type yet", "infer the type before the layout")
    return _insertion(ctx, value.tensor_type.shape, placement, made.shape, ctx.shard_hint())


@rule("aten.view_as", "aten.reshape_as")
def _reshape_as(ctx: RuleContext) -> Outcome:
    value, like = ctx.tensors[0], ctx.tensors[1]
    placement, wanted = ctx.placement(value), ctx.placement(like)
    hint = wanted if isinstance(wanted, Shard) else None
    if isinstance(placement, Shard):
        made = _insertion(ctx, value.tensor_type.shape, placement, like.tensor_type.shape, hint)
        if made != wanted:
            ctx.fail("it takes the shape of a value that is cut in another way", NEEDS_GATHER)
        return made
    if hint is not None:
        ctx.fail("it is whole and takes the shape of a value that is cut", NEEDS_GATHER)
    return placement


@rule("aten.flatten.using_ints")
def _flatten(ctx: RuleContext) -> Outcome:
    """The merged dimensions are named, so there is nothing to guess."""
    value = ctx.tensors[0]
    first, last = ctx.dim(value, "start_dim"), ctx.dim(value, "end_dim")
    placement = ctx.placement(value)
    if not isinstance(placement, Shard) or placement.dim < first:
        return placement
    if placement.dim > last:
        return Shard(placement.dim - (last - first), placement.outer)
    return Shard(first, product(value.tensor_type.shape[first : placement.dim]) * placement.outer)


@rule("aten.unflatten.int")
def _unflatten(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    split, made = ctx.dim(value), ctx.result_type
    placement = ctx.placement(value)
    if not isinstance(placement, Shard) or placement.dim < split or made is None:
        return placement
    added = made.ndim - value.tensor_type.ndim
    if placement.dim > split:
        return Shard(placement.dim + added, placement.outer)
    hint = ctx.shard_hint()
    inner = _insertion(
        ctx,
        value.tensor_type.shape[split : split + 1],
        Shard(0, placement.outer),
        made.shape[split : split + added + 1],
        Shard(hint.dim - split, hint.outer) if hint is not None else None,
    )
    return Shard(inner.dim + split, inner.outer)


def _insertion(
    ctx: RuleContext, before: Sequence[Dim], shard: Shard, after: Sequence[Dim], hint: Shard | None
) -> Shard:
    """Where the ranks are inserted among the dimensions of the result.

    A shard says that the ranks stand behind `product(before[:dim]) * outer` elements of the flattened index; a
    reshape does not move them.
    """
    total = product(before[: shard.dim]) * shard.outer
    found: list[tuple[Shard, Dim]] = []
    for dim, extent in enumerate(after):
        outer = quotient(total, product(after[:dim]))
        inner = quotient(extent, outer) if outer is not None else None
        if outer is not None and inner is not None:
            found.append((Shard(dim, outer), inner))
    if not found:
        ctx.fail(f"the cut dimension {shard.dim} is not a factor of the new shape {list(after)}", NEEDS_GATHER)
    admissible = [s for s, _ in found]
    if hint is not None and hint in admissible:
        return hint
    if len(admissible) == 1:
        return admissible[0]
    kept = _kept_dimension(before, shard, after)
    if kept in admissible:
        return kept
    wide = [s for s, inner in found if inner != 1]
    if quotient(before[shard.dim], shard.outer) != 1 and wide:
        return wide[0]
    return ctx.fail(
        f"the shard may stand in several dimensions of {list(after)}: {', '.join(map(str, admissible))}", AMBIGUOUS
    )


def _kept_dimension(before: Sequence[Dim], shard: Shard, after: Sequence[Dim]) -> Shard:
    """The same dimension, counted from whichever end is untouched up to and including it."""
    if tuple(after[: shard.dim + 1]) == tuple(before[: shard.dim + 1]):
        return shard
    rest = tuple(before[shard.dim :])
    # Where all dimensions in front vanish they have length 1, and so may be what is left of the cut one.
    vanished = len(after) == len(rest) != len(before)
    if tuple(after[len(after) - len(rest) :]) == rest and not vanished:
        return Shard(len(after) - len(rest), shard.outer)
    return Shard(-1)


# -- dimensions moved, added, removed --------------------------------------------------------------------------------


def move(ctx: RuleContext, value: Value, where: Callable[[int], int | None]) -> Placement:
    """Map the dimension of a shard; `where` returns None when the cut dimension is not kept."""
    placement = ctx.placement(value)
    if not isinstance(placement, Shard):
        return placement
    target = where(placement.dim)
    if target is None:
        return ctx.fail(f"dimension {placement.dim}, which is cut, is removed", NEEDS_GATHER)
    return Shard(target, placement.outer)


@rule("aten.transpose.int", "aten.transpose_copy.int", "aten.swapaxes")
def _transpose(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    names = ("axis0", "axis1") if ctx.node.is_op("aten.swapaxes") else ("dim0", "dim1")
    a, b = (ctx.dim(value, n) for n in names)
    return move(ctx, value, lambda d: {a: b, b: a}.get(d, d))


@rule("aten.t", "aten.numpy_T", "aten.mT", "aten.t_copy")
def _t(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    ndim = value.tensor_type.ndim
    if ctx.node.is_op("aten.mT"):
        return move(ctx, value, lambda d: {ndim - 1: ndim - 2, ndim - 2: ndim - 1}.get(d, d))
    return move(ctx, value, lambda d: ndim - 1 - d)


@rule("aten.permute", "aten.permute_copy")
def _permute(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    order = [int(d) % value.tensor_type.ndim for d in ctx.arg("dims")]
    return move(ctx, value, order.index)


@rule("aten.movedim.int", "aten.moveaxis.int")
def _movedim(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    source, destination = ctx.dim(value, "source"), ctx.dim(value, "destination")
    order = [d for d in range(value.tensor_type.ndim) if d != source]
    order.insert(destination, source)
    return move(ctx, value, order.index)


@rule("aten.unsqueeze", "aten.unsqueeze_copy")
def _unsqueeze(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    new = int(ctx.arg("dim")) % (value.tensor_type.ndim + 1)
    return move(ctx, value, lambda d: d + (d >= new))


@rule("aten.squeeze", "aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    shape = value.tensor_type.shape
    listed = range(len(shape)) if ctx.node.is_op("aten.squeeze") else ctx.dims(value)
    removed = {d for d in listed if shape[d] == 1}
    return move(ctx, value, lambda d: None if d in removed else d - sum(r < d for r in removed))


@rule("aten.select.int", "aten.select_copy.int")
def _select(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    removed = ctx.dim(value)
    return move(ctx, value, lambda d: None if d == removed else d - (d > removed))


@rule("aten.expand", "aten.expand_copy")
def _expand(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    made = ctx.result_type
    shape = value.tensor_type.shape
    placement = ctx.placement(value)
    added = (made.ndim if made is not None else len(ctx.arg("size"))) - len(shape)
    if isinstance(placement, Shard):
        if made is not None and made.shape[placement.dim + added] != shape[placement.dim]:
            ctx.fail(f"dimension {placement.dim}, which is cut, would be expanded", NEEDS_GATHER)
        return Shard(placement.dim + added, placement.outer)
    wanted = ctx.shard_hint()
    if ctx.hint is None and made is not None and _unmatched_gradient(ctx):
        ctx.fail(
            "an expanded gradient may have one rank's length or the whole model's, and nothing says which", AMBIGUOUS
        )
    if wanted is None or made is None or not cuttable(made, wanted):
        return placement
    source = wanted.dim - added
    if source >= 0 and shape[source] != 1 and not ctx.uniform_along(value, source):
        return placement
    if not whole(placement):
        ctx.fail("a partial sum is expanded along a dimension that is cut", NEEDS_SUM)
    return wanted


def _unmatched_gradient(ctx: RuleContext) -> bool:
    """Whether an expansion stems from differentiation, so that no layout rule chose its sizes."""
    return ctx.program.stage is not Stage.FORWARD and ctx.node.phase is Phase.BACKWARD and not ctx.what_if


@rule("aten.expand_as")
def _expand_as(ctx: RuleContext) -> Outcome:
    value, like = ctx.tensors[0], ctx.tensors[1]
    placement = ctx.placement(value)
    added = like.tensor_type.ndim - value.tensor_type.ndim
    other = ctx.placement(like)
    if isinstance(placement, Shard):
        moved = Shard(placement.dim + added, placement.outer)
        if other != moved:
            ctx.fail("it is expanded to the shape of a value that is cut in another way", NEEDS_GATHER)
        return moved
    if not isinstance(other, Shard):
        return placement
    if not whole(placement):
        ctx.fail("a partial sum is expanded along a dimension that is cut", NEEDS_SUM)
    source = other.dim - added
    if source >= 0 and value.tensor_type.shape[source] != 1 and not ctx.uniform_along(value, source):
        ctx.fail("it is whole along the dimension that the other value is cut along", NEEDS_GATHER)
    return other


@rule("aten.sym_size.int", "aten.sym_numel", "aten.sym_stride.int", "aten.sym_storage_offset")
def _size(ctx: RuleContext) -> Outcome:
    # A number, the same on every rank; where it measures a cut dimension, arithmetic on it is refused.
    del ctx
    return WHOLE
