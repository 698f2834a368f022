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
    every,
    product,
    quotient,
    rule,
    whole,
)
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import Dim, Partial, Placement, Shard

AMBIGUOUS = "give the value its layout when it is created, or keep the cut dimension apart from dimensions of length 1"


@rule(
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh_copy",
    "aten.lift_fresh",
    "aten.detach_copy",
    "aten.alias_copy",
    "aten.view_as_real",
    "aten.view_as_complex",
    "aten.real",
    "aten.imag",
    "aten._conj",
    "aten.conj",
)
def same(ctx: RuleContext) -> Outcome:
    """The placement of the first operand."""
    return ctx.placement(ctx.tensors[0])


@rule("aten._to_copy", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.type_as", "aten.to.other")
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
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.view_copy",
    "aten.reshape_as",
    "aten.view_as",
)
def _reshape(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    placement = ctx.placement(value)
    if not isinstance(placement, Shard):
        return placement
    made = ctx.result_type
    if made is None:
        return ctx.fail("its result has no type yet", "infer the type before the layout")
    return _insertion(ctx, value.tensor_type.shape, placement, made.shape)


def _insertion(ctx: RuleContext, before: Sequence[Dim], shard: Shard, after: Sequence[Dim]) -> Shard:
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
    if ctx.hint in admissible or len(admissible) == 1:
        return ctx.hint if isinstance(ctx.hint, Shard) and ctx.hint in admissible else admissible[0]
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
    if tuple(after[len(after) - len(rest) :]) == rest:
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
    if wanted is None or made is None or not whole(placement) or not cuttable(made, wanted):
        return placement
    source = wanted.dim - added
    return wanted if source < 0 or shape[source] == 1 or ctx.uniform_along(value, source) else placement


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
    if not isinstance(other, Shard) or not whole(placement):
        return placement
    source = other.dim - added
    if source >= 0 and value.tensor_type.shape[source] != 1 and not ctx.uniform_along(value, source):
        ctx.fail("it is whole along the dimension that the other value is cut along", NEEDS_GATHER)
    return other


# -- parts and repetitions -------------------------------------------------------------------------------------------


def off_dimension(ctx: RuleContext, value: Value, dim: int, what: str) -> Placement:
    """The placement of `value`, refused when it is cut along `dim`."""
    placement = ctx.placement(value)
    if isinstance(placement, Shard) and placement.dim == dim:
        ctx.fail(f"{what} along dimension {dim}, which is cut", NEEDS_GATHER)
    return placement


def full_range(start: object, end: object, step: object, extent: Dim) -> bool:
    """Whether a slice keeps a whole dimension."""
    if step not in (None, 1) or start not in (None, 0):
        return False
    if end is None:
        return True
    if isinstance(end, Value):
        return getattr(end.type, "expr", None) == extent
    return isinstance(end, int) and (end >= 2**62 or (isinstance(extent, int) and end >= extent))


@rule("aten.slice.Tensor", "aten.slice_copy.Tensor")
def _slice(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    dim = ctx.dim(value)
    if full_range(ctx.arg("start"), ctx.arg("end"), ctx.arg("step"), value.tensor_type.shape[dim]):
        return ctx.placement(value)
    return off_dimension(ctx, value, dim, "a slice")


@rule("aten.narrow", "aten.narrow_copy")
def _narrow(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    return off_dimension(ctx, value, ctx.dim(value), "a slice")


@rule("aten.flip", "aten.roll")
def _reorder(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    for dim in ctx.dims(value, "dims"):
        off_dimension(ctx, value, dim, "tokens move between ranks")
    return ctx.placement(value)


@rule("aten.constant_pad_nd", "aten.pad")
def _pad(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    pads = list(ctx.arg("pad"))
    fill = ctx.arg("value")
    mode = ctx.arg("mode", "constant")
    if isinstance(ctx.placement(value), Partial) and (mode != "constant" or (fill is not None and fill != 0)):
        ctx.fail("a partial sum is padded with a number, once per rank", NEEDS_SUM)
    for pair in range(len(pads) // 2):
        if pads[2 * pair] != 0 or pads[2 * pair + 1] != 0:
            off_dimension(ctx, value, value.tensor_type.ndim - 1 - pair, "padding")
    return ctx.placement(value)


@rule("aten.repeat", "aten.tile")
def _repeat(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    repeats = list(ctx.arg("repeats") if ctx.node.is_op("aten.repeat") else ctx.arg("dims"))
    added = len(repeats) - value.tensor_type.ndim
    placement = ctx.placement(value)
    if not isinstance(placement, Shard):
        return placement
    dim = placement.dim + added
    if dim >= 0 and repeats[dim] != 1:
        ctx.fail(f"dimension {placement.dim}, which is cut, is repeated", NEEDS_GATHER)
    return Shard(placement.dim + max(added, 0), placement.outer)


@rule("aten.repeat_interleave.self_int")
def _repeat_interleave(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    placement = ctx.placement(value)
    if ctx.arg("dim") is None and isinstance(placement, Shard):
        ctx.fail("the value is flattened while it is cut", NEEDS_GATHER)
    return placement


# -- several values --------------------------------------------------------------------------------------------------


@rule("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", "aten.split.sizes", "aten.tensor_split.sections")
def _split(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    return every(ctx, off_dimension(ctx, value, ctx.dim(value), "a split"))


@rule("aten.unbind.int")
def _unbind(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    removed = ctx.dim(value)
    return every(ctx, move(ctx, value, lambda d: None if d == removed else d - (d > removed)))


@rule("aten.cat", "aten.concat", "aten.concatenate")
def _cat(ctx: RuleContext) -> Outcome:
    # A legacy empty operand of shape [0] has no dimension to join and adds nothing.
    values = [v for v in ctx.tensors if v.tensor_type.shape != (0,)]
    if not values:
        return WHOLE
    return _join(ctx, values, ctx.dim(values[0]))


@rule("aten.stack")
def _stack(ctx: RuleContext) -> Outcome:
    values = ctx.tensors
    new = int(ctx.arg("dim")) % (values[0].tensor_type.ndim + 1)
    placement = _join(ctx, values, None)
    return Shard(placement.dim + (placement.dim >= new), placement.outer) if isinstance(placement, Shard) else placement


def _join(ctx: RuleContext, values: Sequence[Value], along: int | None) -> Placement:
    """The common placement of joined values: all cut alike off the joined dimension, all sums, or all whole."""
    placements = [ctx.placement(v) for v in values]
    moved = next((p for p in placements if not whole(p)), None)
    if moved is None:
        return WHOLE
    if isinstance(moved, Shard) and moved.dim == along:
        ctx.fail(f"values are joined along dimension {along}, which is cut", NEEDS_GATHER)
    for value, placement in zip(values, placements, strict=True):
        if placement == moved:
            continue
        coerced = isinstance(moved, Partial) and ctx.is_zero(value)
        if isinstance(moved, Shard) and not coerced:
            same_extent = any(
                v.tensor_type.shape[moved.dim] == value.tensor_type.shape[moved.dim]
                for v, p in zip(values, placements, strict=True)
                if p == moved
            )
            coerced = whole(placement) and same_extent and ctx.uniform_along(value, moved.dim)
        if not coerced:
            ctx.fail(f"%{value.name} is {placement} where the values joined to it are {moved}", NEEDS_GATHER)
    return moved


@rule("aten.sym_size.int", "aten.sym_numel", "aten.sym_stride.int", "aten.sym_storage_offset")
def _size(ctx: RuleContext) -> Outcome:
    # A number, the same on every rank; where it measures a cut dimension, arithmetic on it is refused.
    del ctx
    return WHOLE
