"""Slices, repetitions, splits and joins: local off the cut dimension."""

from __future__ import annotations

from collections.abc import Sequence

from autosp_ir.comm.rules.base import (
    NEEDS_GATHER,
    NEEDS_SUM,
    WHOLE,
    Outcome,
    RuleContext,
    every,
    off_dimension,
    rule,
    whole,
)
from autosp_ir.comm.rules.views import move
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Dim, Partial, Placement, ScalarType, Shard


def full_range(ctx: RuleContext, placement: Placement, dim: int, size: Dim | Value) -> bool:
    """Whether the node's slice keeps all of a dimension, of the whole model's length where it is cut.

    `size` is the local extent, or the scalar that holds it. An end equal to it would keep a rank's part, but not all
    of the whole model's dimension.
    """
    start, end, step = ctx.arg("start"), ctx.arg("end"), ctx.arg("step")
    if step not in (None, 1) or start not in (None, 0):
        return False
    if end is None:
        return True
    extent = _extent(size)
    if extent is None:
        return False
    cut = isinstance(placement, Shard) and placement.dim == dim
    length = extent * ctx.size if cut and not ctx.what_if else extent
    if isinstance(end, Value):
        return _extent(end) == length
    return isinstance(end, int) and (end >= 2**62 or (isinstance(length, int) and end >= length))


def _extent(size: Dim | Value) -> Dim | None:
    if not isinstance(size, Value):
        return size
    return size.type.expr if isinstance(size.type, ScalarType) else None


@rule("aten.slice.Tensor", "aten.slice_copy.Tensor")
def _slice(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    dim = ctx.dim(value)
    if full_range(ctx, ctx.placement(value), dim, value.tensor_type.shape[dim]):
        return ctx.placement(value)
    return _part(ctx, value, dim)


@rule("aten.narrow", "aten.narrow_copy")
def _narrow(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    return _part(ctx, value, ctx.dim(value))


def _part(ctx: RuleContext, value: Value, dim: int) -> Placement:
    _refuse_measured_bounds(ctx)
    return off_dimension(ctx, value, dim, "a slice")


def _refuse_measured_bounds(ctx: RuleContext) -> None:
    measured = ctx.local_extents()
    if measured:
        # Every rank would take as much as one rank has, and the same part: no slice of what the whole model takes.
        ctx.fail(f"%{measured[0].name} measures a sharded dimension and bounds a slice", "measure it before it is cut")


@rule("aten.flip", "aten.roll", "prims.rev")
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


@rule(
    "aten.split.Tensor",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.split.sizes",
    "aten.tensor_split.sections",
    "aten.tensor_split.indices",
)
def _split(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    return every(ctx, off_dimension(ctx, value, ctx.dim(value), "a split"))


@rule("aten.unbind.int")
def _unbind(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    removed = ctx.dim(value)
    return every(ctx, move(ctx, value, lambda d: None if d == removed else d - (d > removed)))


@rule("aten.glu_backward")
def _glu_backward(ctx: RuleContext) -> Outcome:
    gradient, x = ctx.operand("grad_output"), ctx.operand("self")
    flow, placement = ctx.placement(gradient), ctx.placement(x)
    if isinstance(placement, Partial):
        ctx.fail(f"%{x.name} is a partial sum and the operation is not linear in it", NEEDS_SUM)
    if isinstance(flow, Partial):
        return PARTIAL if whole(placement) else ctx.fail("a partial gradient meets a value that is cut", NEEDS_SUM)
    if whole(flow) and whole(placement):
        return WHOLE
    if flow != placement:
        ctx.fail(f"%{gradient.name} is {flow} where the value that it differentiates is {placement}", NEEDS_GATHER)
    return off_dimension(ctx, x, ctx.dim(x), "halves are taken")


@rule("aten.cat", "aten.concat", "aten.concatenate")
def _cat(ctx: RuleContext) -> Outcome:
    # A legacy empty operand of shape [0] has no dimension to join and adds nothing.
    values = [v for v in ctx.tensors if v.tensor_type.shape != (0,)]
    if not values:
        return WHOLE
    return join(ctx, values, ctx.dim(values[0]))


@rule("aten.stack")
def _stack(ctx: RuleContext) -> Outcome:
    values = ctx.tensors
    return join(ctx, values, int(ctx.arg("dim")) % (values[0].tensor_type.ndim + 1), without=values)


@rule("aten.slice_scatter")
def _slice_scatter(ctx: RuleContext) -> Outcome:
    _refuse_measured_bounds(ctx)
    base = ctx.operand("self")
    return join(ctx, [base, ctx.operand("src")], ctx.dim(base))


@rule("aten.select_scatter")
def _select_scatter(ctx: RuleContext) -> Outcome:
    _refuse_measured_bounds(ctx)
    base, written = ctx.operand("self"), ctx.operand("src")
    return join(ctx, [base, written], ctx.dim(base), without=[written])


def join(ctx: RuleContext, values: Sequence[Value], along: int, without: Sequence[Value] = ()) -> Placement:
    """The common placement of joined values: all cut alike off the joined dimension, all sums, or all whole.

    Args:
        ctx: The node.
        values: What is joined.
        along: The dimension of the result along which they are joined.
        without: The values that have no such dimension yet.
    """

    def counted_in(value: Value, dim: int) -> int:
        return dim - (value in without and dim > along)

    def joined(value: Value) -> Placement:
        own = ctx.placement(value)
        behind = isinstance(own, Shard) and value in without and own.dim >= along
        return Shard(own.dim + 1, own.outer) if isinstance(own, Shard) and behind else own

    placements = [joined(v) for v in values]
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
                v.tensor_type.shape[counted_in(v, moved.dim)] == value.tensor_type.shape[counted_in(value, moved.dim)]
                for v, p in zip(values, placements, strict=True)
                if p == moved
            )
            coerced = whole(placement) and same_extent and ctx.uniform_along(value, counted_in(value, moved.dim))
        if not coerced:
            ctx.fail(f"%{value.name} is {placement} where the values joined to it are {moved}", NEEDS_GATHER)
    return moved
