"""Operators that change a layout, and the functional collectives that they are lowered to."""

from __future__ import annotations

from autosp_ir.comm.rules.base import Outcome, RuleContext, quotient, rule, whole
from autosp_ir.ir.program import Stage
from autosp_ir.ir.streams import mesh_axis
from autosp_ir.ir.types import INVARIANT, REPLICATE, Invariant, Partial, Placement, Shard

_STRICT_INPUT = "the operand must be Invariant: remove the operator, or read the value in front of the one above it"


def _own(ctx: RuleContext) -> bool:
    """Whether the operator acts along the axis being placed."""
    return bool(ctx.arg("axis") == ctx.axis)


def _other_axis(ctx: RuleContext, touched: set[int]) -> Placement:
    """Along another axis the operator is a local one that cuts or joins the `touched` dimensions."""
    placement = ctx.placement(ctx.tensors[0])
    if isinstance(placement, Shard) and placement.dim in touched:
        ctx.fail(f"dimension {placement.dim} is cut along two axes at once", "cut another dimension along one of them")
    return placement


def _require_invariant(ctx: RuleContext) -> None:
    placement = ctx.placement(ctx.tensors[0])
    strict = ctx.program.stage is Stage.FORWARD
    if not (isinstance(placement, Invariant) if strict else whole(placement)):
        ctx.fail(f"it takes an Invariant value and is given {placement}", _STRICT_INPUT)


def _require_partial(ctx: RuleContext) -> None:
    placement = ctx.placement(ctx.tensors[0])
    if not isinstance(placement, Partial):
        ctx.fail(f"it sums over the ranks a value that is {placement}, not a partial sum", "remove the reduction")


def _require_even(ctx: RuleContext, dim: int) -> None:
    shape = ctx.tensors[0].tensor_type.shape
    extent = shape[dim] if dim < len(shape) else 1
    if isinstance(extent, int) and extent % int(ctx.arg("size")):
        ctx.fail(f"dimension {dim} of length {extent} cannot be split over {ctx.arg('size')} ranks", "pad it first")


def _replicate(ctx: RuleContext) -> Placement:
    return REPLICATE if ctx.program.stage is Stage.FORWARD else INVARIANT


@rule("autosp.invariant_to_replicate", exact=True)
def _invariant_to_replicate(ctx: RuleContext) -> Outcome:
    if not _own(ctx):
        return _other_axis(ctx, set())
    _require_invariant(ctx)
    return _replicate(ctx)


@rule("autosp.shard", exact=True)
def _shard(ctx: RuleContext) -> Outcome:
    dim = ctx.dim(ctx.tensors[0])
    if not _own(ctx):
        return _other_axis(ctx, {dim})
    _require_invariant(ctx)
    _require_even(ctx, dim)
    return Shard(dim)


@rule("autosp.all_gather", exact=True)
def _all_gather(ctx: RuleContext) -> Outcome:
    dim = ctx.dim(ctx.tensors[0])
    if not _own(ctx):
        return _other_axis(ctx, {dim})
    placement = ctx.placement(ctx.tensors[0])
    if placement != Shard(dim):
        ctx.fail(f"it gathers dimension {dim} of a value that is {placement}", f"gather a value that is S({dim})")
    return _replicate(ctx) if ctx.arg("to") == "replicate" else INVARIANT


@rule("autosp.reduce_scatter", exact=True)
def _reduce_scatter(ctx: RuleContext) -> Outcome:
    dim = ctx.dim(ctx.tensors[0])
    if not _own(ctx):
        return _other_axis(ctx, {dim})
    _require_partial(ctx)
    _require_even(ctx, dim)
    return Shard(dim)


@rule("autosp.all_reduce", exact=True)
def _all_reduce(ctx: RuleContext) -> Outcome:
    if not _own(ctx):
        return _other_axis(ctx, set())
    _require_partial(ctx)
    return INVARIANT


@rule("autosp.all_to_all", exact=True)
def _all_to_all(ctx: RuleContext) -> Outcome:
    value = ctx.tensors[0]
    split, concat = ctx.dim(value, "split_dim"), ctx.dim(value, "concat_dim")
    if not _own(ctx):
        return _other_axis(ctx, {split, concat})
    if ctx.placement(value) != Shard(concat):
        ctx.fail(
            f"it completes dimension {concat} of a value that is {ctx.placement(value)}",
            f"give it a value that is S({concat})",
        )
    _require_even(ctx, split)
    return Shard(split)


@rule("autosp.permute", exact=True)
def _permute(ctx: RuleContext) -> Outcome:
    return ctx.placement(ctx.tensors[0])


@rule("autosp.axis_index", exact=True)
def _axis_index(ctx: RuleContext) -> Outcome:
    if not _own(ctx) or ctx.size == 1:
        return INVARIANT
    return ctx.fail("a rank's own index has no layout: it is neither whole, nor a slice, nor a sum")


# -- functional collectives ------------------------------------------------------------------------------------------


def _own_group(ctx: RuleContext) -> bool:
    return mesh_axis(str(ctx.arg("group_name"))) == ctx.axis


def _check_sum(ctx: RuleContext) -> None:
    if ctx.arg("reduce_op") != "sum":
        ctx.fail(f"a reduction by {ctx.arg('reduce_op')!r} has no layout rule", "reduce with 'sum'")


@rule("_c10d_functional.wait_tensor", exact=True)
def _wait(ctx: RuleContext) -> Outcome:
    return ctx.placement(ctx.tensors[0])


@rule("_c10d_functional.all_reduce", exact=True)
def _start_all_reduce(ctx: RuleContext) -> Outcome:
    if not _own_group(ctx):
        return _other_axis(ctx, set())
    _check_sum(ctx)
    _require_partial(ctx)
    return INVARIANT


@rule("_c10d_functional.all_gather_into_tensor", exact=True)
def _start_all_gather(ctx: RuleContext) -> Outcome:
    if not _own_group(ctx):
        return _other_axis(ctx, {0})
    if not isinstance(ctx.placement(ctx.tensors[0]), Shard):
        ctx.fail(f"it gathers a value that is {ctx.placement(ctx.tensors[0])}", "gather a shard")
    return INVARIANT


@rule("_c10d_functional.reduce_scatter_tensor", exact=True)
def _start_reduce_scatter(ctx: RuleContext) -> Outcome:
    if not _own_group(ctx):
        return _other_axis(ctx, {0})
    _check_sum(ctx)
    _require_partial(ctx)
    return Shard(0)


@rule("_c10d_functional.all_to_all_single", exact=True)
def _start_all_to_all(ctx: RuleContext) -> Outcome:
    """Blocks [P, …] cut behind the block index: the block index becomes the old rank, the rank the old block index.

    Where the rank then stands behind the P blocks is a matter of which dimension was split, so the stored layout
    decides; without one it stands right behind them.
    """
    if not _own_group(ctx):
        return _other_axis(ctx, {0})
    value = ctx.tensors[0]
    shape, placement = value.tensor_type.shape, ctx.placement(value)
    if not isinstance(placement, Shard) or not _behind_blocks(placement, ctx.size):
        ctx.fail(f"it exchanges blocks of a value that is {placement}", "exchange a shard behind the block dimension")
    if quotient(shape[0], ctx.size) is None:
        ctx.fail(f"its first dimension {shape[0]} does not hold {ctx.size} blocks", "lay the blocks out as [P, …]")
    _check_even(ctx)
    wanted = ctx.shard_hint()
    if wanted is not None and wanted.dim < len(shape) and _behind_blocks(wanted, ctx.size):
        return wanted
    return Shard(1) if shape[0] == ctx.size and len(shape) > 1 else Shard(0, ctx.size)


def _behind_blocks(shard: Shard, size: int) -> bool:
    return shard.dim > 0 or quotient(shard.outer, size) is not None


def _check_even(ctx: RuleContext) -> None:
    for name in ("output_split_sizes", "input_split_sizes"):
        sizes = ctx.arg(name)
        if sizes is not None and len(set(sizes)) > 1:
            ctx.fail("it exchanges blocks of different lengths", "exchange equal blocks")
