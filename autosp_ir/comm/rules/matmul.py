"""Contractions: a shard of both operands along the contracted dimension leaves a partial sum."""

from __future__ import annotations

from collections.abc import Sequence

from autosp_ir.comm.rules.base import (
    NEEDS_GATHER,
    NEEDS_SHARD,
    NEEDS_SUM,
    WHOLE,
    Outcome,
    RuleContext,
    refuse_partial,
    refuse_unless_whole,
    rule,
    whole,
)
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard

Labels = Sequence[str]
"""One label per dimension, as in an einsum."""


def contract(ctx: RuleContext, left: Value, right: Value, a: Labels, b: Labels, out: Labels) -> Placement:
    """The placement of an einsum of two operands.

    Args:
        ctx: The context.
        left: First operand.
        right: Second operand.
        a: Labels of its dimensions; a broadcast dimension of size 1 carries a label of its own.
        b: Labels of the second operand.
        out: Labels of the result; labels of neither are contracted.

    Returns:
        Partial when both are cut along one contracted label, a shard when a free or batch label is cut, or whole.
    """
    if any(isinstance(ctx.placement(v), Partial) for v in (left, right)):
        return _partial(ctx, left, right)
    sides = ((left, list(a)), (right, list(b)))
    found = next(((v, n, p) for v, n in sides if isinstance(p := ctx.placement(v), Shard)), None)
    if found is None:
        return WHOLE
    first, names, shard = found
    label, extent = names[shard.dim], first.tensor_type.shape[shard.dim]
    for value, labels in sides:
        placement = ctx.placement(value)
        if isinstance(placement, Shard):
            if labels[placement.dim] != label or placement.outer != shard.outer:
                ctx.fail("the operands are cut along two different dimensions", NEEDS_SHARD)
        elif label in labels:
            dim = labels.index(label)
            if value.tensor_type.shape[dim] != extent or not ctx.uniform_along(value, dim, shard.outer):
                ctx.fail(f"%{value.name} is whole along a dimension that the other operand is cut along", NEEDS_SHARD)
    return Shard(list(out).index(label), shard.outer) if label in out else PARTIAL


def _partial(ctx: RuleContext, left: Value, right: Value) -> Placement:
    if not any(whole(ctx.placement(v)) for v in (left, right)):
        ctx.fail("a partial sum may only be multiplied by a whole value", NEEDS_SUM)
    return PARTIAL


def matmul_labels(ctx: RuleContext, left: Value, right: Value) -> tuple[list[str], list[str], list[str]]:
    """Labels of `torch.matmul`: the last two dimensions contract, the ones in front broadcast."""
    rows, columns = left.tensor_type.ndim, right.tensor_type.ndim
    batch = [f"batch {i}" for i in range(max(rows, columns, 2) - 2)]
    a = _batch_labels(ctx, left, batch) + (["m", "k"] if rows > 1 else ["k"])
    b = _batch_labels(ctx, right, batch) + (["k", "n"] if columns > 1 else ["k"])
    return a, b, batch + (["m"] if rows > 1 else []) + (["n"] if columns > 1 else [])


def _batch_labels(ctx: RuleContext, value: Value, batch: list[str]) -> list[str]:
    leading = value.tensor_type.shape[:-2]
    names = batch[len(batch) - len(leading) :]
    placement = ctx.placement(value)
    cut = placement.dim if isinstance(placement, Shard) else None
    # A cut dimension of local length 1 does not broadcast: the whole one is longer.
    return [f"broadcast {n}" if leading[i] == 1 and i != cut else n for i, n in enumerate(names)]


def add_bias(ctx: RuleContext, bias: Value | None, product: Placement, rank: int) -> Placement:
    """The placement of `bias + product`, the bias broadcast to the product's rank."""
    if bias is None:
        return product
    placement = ctx.placement(bias)
    shift = rank - bias.tensor_type.ndim
    if isinstance(product, Partial):
        if not isinstance(placement, Partial) and not ctx.is_zero(bias):
            ctx.fail(f"%{bias.name} would be added to a partial sum once per rank", NEEDS_SUM)
        return product
    if isinstance(placement, Partial):
        ctx.fail(f"%{bias.name} is a partial sum, the product is not", NEEDS_SUM)
    if isinstance(placement, Shard):
        if product != Shard(placement.dim + shift, placement.outer):
            ctx.fail(f"%{bias.name} is cut along another dimension than the product", NEEDS_SHARD)
        return product
    if isinstance(product, Shard) and product.dim >= shift:
        dim = product.dim - shift
        if bias.tensor_type.shape[dim] != 1 and not ctx.uniform_along(bias, dim):
            ctx.fail(f"%{bias.name} is whole along the dimension that the product is cut along", NEEDS_SHARD)
    return product


@rule("aten.mm", "autosp.mm_float32")
def _mm(ctx: RuleContext) -> Outcome:
    left, right = ctx.tensors
    return contract(ctx, left, right, "mk", "kn", "mn")


@rule("aten.bmm")
def _bmm(ctx: RuleContext) -> Outcome:
    return contract(ctx, ctx.operand("self"), ctx.operand("mat2"), "bmk", "bkn", "bmn")


@rule("aten.addmm", "autosp.addmm_float32")
def _addmm(ctx: RuleContext) -> Outcome:
    total, left, right = ctx.tensors
    return add_bias(ctx, total, contract(ctx, left, right, "mk", "kn", "mn"), 2)


@rule("aten.baddbmm")
def _baddbmm(ctx: RuleContext) -> Outcome:
    made = contract(ctx, ctx.operand("batch1"), ctx.operand("batch2"), "bmk", "bkn", "bmn")
    return add_bias(ctx, ctx.operand("self"), made, 3)


@rule("aten.mv")
def _mv(ctx: RuleContext) -> Outcome:
    return contract(ctx, ctx.operand("self"), ctx.operand("vec"), "mk", "k", "m")


@rule("aten.dot")
def _dot(ctx: RuleContext) -> Outcome:
    return contract(ctx, ctx.operand("self"), ctx.operand("tensor"), "k", "k", "")


@rule("aten.matmul")
def _matmul(ctx: RuleContext) -> Outcome:
    left, right = ctx.operand("self"), ctx.operand("other")
    return contract(ctx, left, right, *matmul_labels(ctx, left, right))


@rule("aten.linear")
def _linear(ctx: RuleContext) -> Outcome:
    x, weight = ctx.operand("input"), ctx.operand("weight")
    leading = [f"row {i}" for i in range(x.tensor_type.ndim - 1)]
    made = contract(ctx, x, weight, [*leading, "k"], ["n", "k"], [*leading, "n"])
    bias = ctx.arg("bias")
    return add_bias(ctx, bias if isinstance(bias, Value) else None, made, x.tensor_type.ndim)


@rule("aten.einsum")
def _einsum(ctx: RuleContext) -> Outcome:
    equation = str(ctx.arg("equation")).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    operands = inputs.split(",")
    if not arrow or "." in equation or len(operands) > 2 or any(len(set(o)) != len(o) for o in operands):
        return refuse_unless_whole(ctx, "only explicit einsums of one or two operands keep a shard")
    values = ctx.tensors
    if len(operands) == 2:
        return contract(ctx, values[0], values[1], operands[0], operands[1], out)
    placement = ctx.placement(values[0])
    if not isinstance(placement, Shard):
        return placement
    label = operands[0][placement.dim]
    return Shard(out.index(label), placement.outer) if label in out else PARTIAL


@rule("aten.inner")
def _inner(ctx: RuleContext) -> Outcome:
    left, right = ctx.operand("self"), ctx.operand("other")
    if 0 in (left.tensor_type.ndim, right.tensor_type.ndim):
        return refuse_unless_whole(ctx, "one of its operands is a number")
    a, b = (
        [*(f"{side} {i}" for i in range(value.tensor_type.ndim - 1)), "k"]
        for side, value in (("row", left), ("column", right))
    )
    return contract(ctx, left, right, a, b, [*a[:-1], *b[:-1]])


@rule("aten.tensordot")
def _tensordot(ctx: RuleContext) -> Outcome:
    left, right = ctx.operand("self"), ctx.operand("other")
    a, b = ([f"{side} {i}" for i in range(v.tensor_type.ndim)] for side, v in (("row", left), ("column", right)))
    joined = list(zip(ctx.dims(left, "dims_self"), ctx.dims(right, "dims_other"), strict=True))
    for number, (one, other) in enumerate(joined):
        a[one] = b[other] = f"k {number}"
    return contract(ctx, left, right, a, b, [n for n in (*a, *b) if not n.startswith("k")])


@rule("aten.outer", "aten.ger")
def _outer(ctx: RuleContext) -> Outcome:
    return contract(ctx, ctx.operand("self"), ctx.operand("vec2"), "m", "n", "mn")


# -- convolutions ------------------------------------------------------------------------------------------------------


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
def _convolution(ctx: RuleContext) -> Outcome:
    x = ctx.operand("input")
    return _off_windows(ctx, x, [v for v in ctx.tensors if v is not x])


@rule("aten.convolution_backward")
def _convolution_backward(ctx: RuleContext) -> Outcome:
    gradient, x = ctx.operand("grad_output"), ctx.operand("input")
    placement = _off_windows(ctx, x, [ctx.operand("weight")])
    if ctx.placement(gradient) != placement and not (whole(ctx.placement(gradient)) and whole(placement)):
        ctx.fail(f"%{gradient.name} and the input are cut in two ways", NEEDS_SHARD)
    return (placement, *(PARTIAL if isinstance(placement, Shard) else placement,) * 2)


def _off_windows(ctx: RuleContext, x: Value, parameters: Sequence[Value]) -> Placement:
    """The placement of a convolution's input: rows of the batch, or a dimension that its windows do not overlap in."""
    refuse_partial(ctx)
    if not all(whole(ctx.placement(v)) for v in parameters):
        ctx.fail("weight and bias must be whole", NEEDS_GATHER)
    placement = ctx.placement(x)
    if not isinstance(placement, Shard):
        return placement
    rank = ctx.operand("weight").tensor_type.ndim
    spatial = placement.dim - (x.tensor_type.ndim - (rank - 2))
    row_of_batch = placement.dim == 0 and x.tensor_type.ndim == rank
    if not row_of_batch and not (spatial >= 0 and _takes_each_place_alone(ctx, spatial)):
        ctx.fail(f"its windows reach over dimension {placement.dim}, which is cut", NEEDS_GATHER)
    return placement


def _takes_each_place_alone(ctx: RuleContext, spatial: int) -> bool:
    """Whether windows along a spatial dimension have length one, one behind the other from the first place on."""

    def setting(name: str, default: int) -> object:
        given = ctx.arg(name, default)
        return given[spatial % len(given)] if isinstance(given, tuple | list) else given

    alone = ctx.operand("weight").tensor_type.shape[2 + spatial] == 1
    return alone and setting("stride", 1) == 1 and setting("padding", 0) == 0 and not ctx.arg("transposed", False)


__all__ = ["add_bias", "contract", "matmul_labels"]
