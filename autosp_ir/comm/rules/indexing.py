"""Lookups by index: tables are whole, indices carry the shard."""

from __future__ import annotations

import torch

from autosp_ir.comm.rules.base import (
    NEEDS_GATHER,
    NEEDS_SHARD,
    NEEDS_SUM,
    WHOLE,
    Outcome,
    RuleContext,
    off_dimension,
    refuse_partial,
    refuse_unless_whole,
    rule,
    whole,
)
from autosp_ir.comm.rules.parts import full_range, join
from autosp_ir.comm.rules.pointwise import broadcast
from autosp_ir.comm.rules.reductions import along
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard


def _aligned(ctx: RuleContext, value: Value, shard: Shard, extent: object) -> None:
    """Refuse `value` unless it is cut along `shard`, or constant along it with the same local length."""
    placement = ctx.placement(value)
    if placement == shard:
        return
    fits = value.tensor_type.ndim > shard.dim and value.tensor_type.shape[shard.dim] == extent
    if not fits or not (whole(placement) and ctx.uniform_along(value, shard.dim)):
        ctx.fail(f"%{value.name} is {placement} where {shard} is needed", NEEDS_SHARD)


# -- embedding ---------------------------------------------------------------------------------------------------------


@rule("aten.embedding")
def _embedding(ctx: RuleContext) -> Outcome:
    table, indices = ctx.operand("weight"), ctx.operand("indices")
    rows, ids = ctx.placement(table), ctx.placement(indices)
    if isinstance(ids, Partial):
        ctx.fail("the ids are a partial sum", NEEDS_SUM)
    if whole(ids) and isinstance(rows, Shard) and rows.dim == 1:
        return Shard(indices.tensor_type.ndim, rows.outer)
    if whole(ids) and isinstance(rows, Partial):
        return PARTIAL
    if not whole(rows):
        ctx.fail("the table is cut over its rows, so an id may not find its row", NEEDS_GATHER)
    return ids


@rule("aten.embedding_dense_backward")
def _embedding_backward(ctx: RuleContext) -> Outcome:
    gradient, indices = ctx.operand("grad_output"), ctx.operand("indices")
    flow, ids = ctx.placement(gradient), ctx.placement(indices)
    if ctx.arg("scale_grad_by_freq") and not whole(ids):
        ctx.fail("frequencies of ids are counted over all tokens", NEEDS_GATHER)
    if isinstance(flow, Partial) and whole(ids):
        return PARTIAL
    if isinstance(flow, Shard) and flow.dim == indices.tensor_type.ndim and whole(ids):
        return Shard(1, flow.outer)
    if isinstance(ids, Shard):
        _aligned(ctx, gradient, ids, indices.tensor_type.shape[ids.dim])
        return PARTIAL
    if not (whole(flow) and whole(ids)):
        ctx.fail("the gradient is cut but the ids are not", NEEDS_SHARD)
    return WHOLE


@rule("aten.one_hot")
def _one_hot(ctx: RuleContext) -> Outcome:
    placement = ctx.placement(ctx.tensors[0])
    if not whole(placement) and (isinstance(placement, Partial) or int(ctx.arg("num_classes")) < 0):
        ctx.fail("the number of classes must be given when the ids are cut", "pass num_classes")
    return placement


# -- gather and scatter ------------------------------------------------------------------------------------------------


@rule("aten.gather", "aten.take_along_dim")
def _gather(ctx: RuleContext) -> Outcome:
    data = ctx.operand("self")
    index = ctx.operand("indices" if ctx.node.is_op("aten.take_along_dim") else "index")
    dim = ctx.dim(data)
    source, chosen = ctx.placement(data), ctx.placement(index)
    if isinstance(chosen, Partial):
        ctx.fail("the index is a partial sum", NEEDS_SUM)
    if isinstance(source, Partial):
        if not whole(chosen):
            ctx.fail("a partial sum is read by an index that is cut", NEEDS_SUM)
        return PARTIAL
    if whole(source) and isinstance(chosen, Shard) and chosen.dim == dim:
        return chosen
    shard = source if isinstance(source, Shard) else chosen
    if not isinstance(shard, Shard):
        return WHOLE
    if shard.dim == dim:
        ctx.fail(f"it looks up along dimension {dim}, which is cut", NEEDS_GATHER)
    cut = data if isinstance(source, Shard) else index
    extent = cut.tensor_type.shape[shard.dim]
    for value in (data, index):
        if value.tensor_type.shape[shard.dim] != extent:
            ctx.fail("the index covers only part of the cut dimension", NEEDS_GATHER)
        _aligned(ctx, value, shard, extent)
    return shard


@rule("aten.scatter_add", "aten.scatter.src", "aten.scatter.value")
def _scatter(ctx: RuleContext) -> Outcome:
    base, index = ctx.operand("self"), ctx.operand("index")
    source = ctx.arg("src")
    values = [base, index, *([source] if isinstance(source, Value) else [])]
    dim = ctx.dim(base)
    adds = ctx.node.is_op("aten.scatter_add")
    if any(isinstance(ctx.placement(v), Partial) for v in values):
        return _scatter_partial(ctx, base, index, source)
    shard = next((p for p in map(ctx.placement, values) if isinstance(p, Shard)), None)
    if shard is None:
        return WHOLE
    # Each rank adds at its own indices into its own copy of zeros.
    own_copy = adds and whole(ctx.placement(base)) and ctx.is_zero(base)
    if shard.dim == dim and own_copy and all(ctx.placement(v) == shard for v in values[1:]):
        return PARTIAL
    if shard.dim == dim:
        ctx.fail(f"it writes along dimension {dim}, which is cut", NEEDS_GATHER)
    extent = base.tensor_type.shape[shard.dim]
    for value in values:
        if value.tensor_type.shape[shard.dim] != extent:
            ctx.fail("the index covers only part of the cut dimension", NEEDS_GATHER)
        _aligned(ctx, value, shard, extent)
    return shard


def _scatter_partial(ctx: RuleContext, base: Value, index: Value, source: object) -> Placement:
    """Writing partial sums into partial sums (or zeros) at whole indices."""
    written = source if isinstance(source, Value) else None
    number_is_zero = written is None and ctx.arg("value") == 0
    if not whole(ctx.placement(index)):
        ctx.fail("partial sums are written at indices that are not whole", NEEDS_SUM)
    for value in (base, written):
        if value is None:
            continue
        if not isinstance(ctx.placement(value), Partial) and not ctx.is_zero(value):
            ctx.fail(f"%{value.name} would be contributed once per rank", NEEDS_SUM)
    if written is None and not number_is_zero:
        ctx.fail("a number would be contributed once per rank", NEEDS_SUM)
    return PARTIAL


# -- advanced indexing -------------------------------------------------------------------------------------------------


@rule("aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(ctx: RuleContext) -> Outcome:
    data = ctx.operand("self")
    entries = list(ctx.arg("indices"))
    indices = [e for e in entries if isinstance(e, Value)]
    source, chosen = ctx.placement(data), broadcast(ctx, indices)
    if whole(source) and whole(chosen):
        return WHOLE
    indexed = [i for i, e in enumerate(entries) if isinstance(e, Value)]
    contiguous = indexed == list(range(indexed[0], indexed[-1] + 1))
    if not contiguous or any(i.tensor_type.dtype == torch.bool for i in indices):
        ctx.fail("only adjacent integer indices keep a shard", NEEDS_GATHER)
    if isinstance(source, Partial):
        if not whole(chosen):
            ctx.fail("a partial sum is read by indices that are cut", NEEDS_SUM)
        return PARTIAL
    if isinstance(source, Shard):
        return _index_shard(ctx, source, indexed, indices, whole(chosen))
    shard = chosen if isinstance(chosen, Shard) else Shard(0)
    return Shard(indexed[0] + shard.dim, shard.outer)


def _index_shard(
    ctx: RuleContext, source: Shard, indexed: list[int], indices: list[Value], chosen_whole: bool
) -> Placement:
    if source.dim in indexed or not chosen_whole:
        ctx.fail("it looks up along a dimension that is cut", NEEDS_GATHER)
    rank = max(i.tensor_type.ndim for i in indices)
    return source if source.dim < indexed[0] else Shard(source.dim - len(indexed) + rank, source.outer)


@rule("aten.index_select")
def _index_select(ctx: RuleContext) -> Outcome:
    data, index = ctx.operand("self"), ctx.operand("index")
    dim = ctx.dim(data)
    chosen = ctx.placement(index)
    if whole(chosen):
        return along(ctx, data, (dim,))
    if isinstance(chosen, Partial) or not whole(ctx.placement(data)):
        ctx.fail("it looks up in a value that is not whole, by an index that is not whole", NEEDS_GATHER)
    return Shard(dim, chosen.outer) if isinstance(chosen, Shard) else chosen


@rule("aten.index_add")
def _index_add(ctx: RuleContext) -> Outcome:
    base, added = ctx.operand("self"), ctx.operand("source")
    dim = ctx.dim(base)
    target, source = ctx.placement(base), ctx.placement(added)
    chosen = ctx.placement(ctx.operand("index"))
    if isinstance(chosen, Shard) and source == Shard(dim, chosen.outer) and whole(target) and ctx.is_zero(base):
        return PARTIAL
    if not whole(chosen):
        ctx.fail("each rank would add at its own places", NEEDS_GATHER)
    if isinstance(target, Partial) or isinstance(source, Partial):
        for value in (base, added):
            if not isinstance(ctx.placement(value), Partial) and not ctx.is_zero(value):
                ctx.fail(f"%{value.name} would be contributed once per rank", NEEDS_SUM)
        return PARTIAL
    shard = source if isinstance(source, Shard) else target
    if not isinstance(shard, Shard):
        return WHOLE
    if shard.dim == dim:
        ctx.fail(f"it adds along dimension {dim}, which is cut", NEEDS_GATHER)
    extent = (added if isinstance(source, Shard) else base).tensor_type.shape[shard.dim]
    for value in (base, added):
        _aligned(ctx, value, shard, extent)
    return shard


@rule("aten.index_put", "aten._unsafe_index_put")
def _index_put(ctx: RuleContext) -> Outcome:
    base, written = ctx.operand("self"), ctx.operand("values")
    entries = list(ctx.arg("indices"))
    indices = [e for e in entries if isinstance(e, Value)]
    chosen = broadcast(ctx, indices)
    target, source = ctx.placement(base), ctx.placement(written)
    if whole(target) and whole(source) and whole(chosen):
        return WHOLE
    adds = bool(ctx.arg("accumulate"))
    if adds and whole(chosen) and isinstance(source, Partial) and (isinstance(target, Partial) or ctx.is_zero(base)):
        return PARTIAL
    indexed = [i for i, e in enumerate(entries) if isinstance(e, Value)]
    contiguous = indexed == list(range(indexed[0], indexed[-1] + 1))
    integers = all(i.tensor_type.dtype != torch.bool for i in indices)
    rank = max(i.tensor_type.ndim for i in indices)
    if adds and contiguous and integers and isinstance(chosen, Shard) and whole(target) and ctx.is_zero(base):
        # Each rank adds the rows of its own indices into its own copy of zeros.
        expected = Shard(indexed[0] + chosen.dim, chosen.outer)
        if written.tensor_type.ndim == base.tensor_type.ndim - len(indexed) + rank and source == expected:
            return PARTIAL
    if contiguous and integers and whole(chosen) and isinstance(target, Shard) and target.dim not in indexed:
        # Every rank writes its part of the rows, at the same places.
        shift = rank - len(indexed) if target.dim > indexed[-1] else 0
        own = Shard(target.dim + shift, target.outer)
        aligned = written.tensor_type.ndim == base.tensor_type.ndim - len(indexed) + rank
        if aligned and source == own and written.tensor_type.shape[own.dim] == base.tensor_type.shape[target.dim]:
            return target
    return ctx.fail("rows are written into, or taken from, a value that is cut in another way", NEEDS_GATHER)


@rule("aten.scatter_reduce.two")
def _scatter_reduce(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    return _scatter(ctx)


@rule("aten.index_copy")
def _index_copy(ctx: RuleContext) -> Outcome:
    base, index, source = ctx.operand("self"), ctx.operand("index"), ctx.operand("source")
    if not whole(ctx.placement(index)):
        ctx.fail("the index is cut", NEEDS_GATHER)
    return join(ctx, [base, source], ctx.dim(base))


@rule("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def _index_fill(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    base = ctx.operand("self")
    if not all(whole(ctx.placement(v)) for v in ctx.tensors if v is not base):
        ctx.fail("the index or the number is cut", NEEDS_GATHER)
    return off_dimension(ctx, base, ctx.dim(base), "rows are filled")


@rule("aten.bucketize.Tensor", "aten.searchsorted.Tensor")
def _bucketize(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    value = ctx.operand("self")
    others = [v for v in ctx.tensors if v is not value]
    if any(v.tensor_type.ndim != 1 or not whole(ctx.placement(v)) for v in others):
        return refuse_unless_whole(ctx, "every row has bounds of its own")
    return ctx.placement(value)


# -- backwards of slices -----------------------------------------------------------------------------------------------


@rule("aten.slice_backward")
def _slice_backward(ctx: RuleContext) -> Outcome:
    gradient = ctx.operand("grad_output")
    dim = ctx.dim(gradient)
    sizes = list(ctx.arg("input_sizes"))
    start, end, step = ctx.arg("start"), ctx.arg("end"), ctx.arg("step")
    expected = list(sizes)
    if all(isinstance(b, int) for b in (sizes[dim], start, end, step)):
        expected[dim] = len(range(*slice(start, end, step).indices(sizes[dim])))
    _check_sizes(ctx, gradient, expected)
    if full_range(ctx, ctx.placement(gradient), dim, sizes[dim]):
        return ctx.placement(gradient)
    return off_dimension(ctx, gradient, dim, "a slice was taken")


@rule("aten.select_backward")
def _select_backward(ctx: RuleContext) -> Outcome:
    gradient = ctx.operand("grad_output")
    new = int(ctx.arg("dim")) % (gradient.tensor_type.ndim + 1)
    _check_sizes(ctx, gradient, [s for d, s in enumerate(ctx.arg("input_sizes")) if d != new])
    placement = ctx.placement(gradient)
    return Shard(placement.dim + (placement.dim >= new), placement.outer) if isinstance(placement, Shard) else placement


def _check_sizes(ctx: RuleContext, gradient: Value, expected: list[object]) -> None:
    """The kernel trusts its size arguments, so a size of the whole where a shard's is meant must not pass."""
    pairs = zip(gradient.tensor_type.shape, expected, strict=True)
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        ctx.fail(f"input sizes {list(ctx.arg('input_sizes'))} do not fit the local gradient", "use the local sizes")
