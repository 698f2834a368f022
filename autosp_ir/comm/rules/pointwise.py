"""Element-by-element operations: shards must line up under broadcasting, partial sums only pass linear operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autosp_ir.comm.rules.base import NEEDS_SHARD, NEEDS_SUM, WHOLE, Outcome, RuleContext, refuse_partial, rule, whole
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import PARTIAL, Partial, Placement, Shard, TensorType, TupleType, Type

# Untagged by torch, or composite, but elementwise all the same.
POINTWISE_EXTRAS = (
    "aten.__and__.Scalar",
    "aten.__and__.Tensor",
    "aten.__or__.Scalar",
    "aten.__or__.Tensor",
    "aten.__xor__.Scalar",
    "aten.__xor__.Tensor",
    "aten.complex",
    "aten.copy",
    "aten.divide.Tensor",
    "aten.divide.Scalar",
    "aten.elu_backward",
    "aten.floor_divide",
    "aten.floor_divide.Scalar",
    "aten.hardsigmoid_backward",
    "aten.hardswish",
    "aten.hardswish_backward",
    "aten.hardtanh_backward",
    "aten.leaky_relu_backward",
    "aten.log_sigmoid",
    "aten.masked_fill.Tensor",
    "aten.mish_backward",
    "aten.multiply.Tensor",
    "aten.multiply.Scalar",
    "aten.polar",
    "aten.rsub.Tensor",
    "aten.softplus_backward",
    "aten.special_ndtr",
    "aten.subtract.Tensor",
    "aten.subtract.Scalar",
    "aten.where.ScalarSelf",
    "aten.where.ScalarOther",
    "aten.where.Scalar",
)

_SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor", "aten.subtract.Tensor"})
_PRODUCTS = frozenset({"aten.mul.Tensor", "aten.multiply.Tensor"})
_QUOTIENTS = frozenset({"aten.div.Tensor", "aten.true_divide.Tensor", "aten.divide.Tensor"})
_SCALINGS = frozenset(
    {
        "aten.neg",
        "aten.positive",
        "aten.mul.Scalar",
        "aten.multiply.Scalar",
        "aten.div.Scalar",
        "aten.divide.Scalar",
        "aten.conj_physical",
        "aten.deg2rad",
        "aten.rad2deg",
    }
)
_SELECTIONS: Mapping[str, tuple[str, ...]] = {
    "aten.where.self": ("self", "other"),
    "aten.where.ScalarOther": ("self", "other"),
    "aten.where.ScalarSelf": ("self", "other"),
    "aten.masked_fill.Scalar": ("self", "value"),
    "aten.masked_fill.Tensor": ("self", "value"),
}
_GRADIENT_ARGUMENTS = ("grad_output", "grad")


def pointwise(ctx: RuleContext) -> Outcome:
    """The rule of every elementwise operation."""
    if ctx.tensors:
        # Where every tensor is whole too: the result would be one rank's number and pass for the whole model's.
        _refuse_local_extents(ctx)
    if any(isinstance(ctx.placement(v), Partial) for v in ctx.tensors):
        return _partial(ctx)
    return broadcast(ctx, ctx.tensors)


rule(*POINTWISE_EXTRAS)(pointwise)


@rule("aten.log_sigmoid_forward")
def _log_sigmoid(ctx: RuleContext) -> Outcome:
    refuse_partial(ctx)
    placement, made = broadcast(ctx, ctx.tensors), ctx.node.result.type
    parts = made.elements if isinstance(made, TupleType) else ()
    return tuple(WHOLE if _is_no_buffer(part) else placement for part in parts)


@rule("aten.log_sigmoid_backward")
def _log_sigmoid_backward(ctx: RuleContext) -> Outcome:
    gradient = ctx.operand("grad_output")
    if isinstance(ctx.placement(gradient), Partial):
        return _only_in(ctx, (gradient,))
    return broadcast(ctx, [v for v in ctx.tensors if not _is_no_buffer(v.type)])


def _is_no_buffer(kind: Type) -> bool:
    """Whether this is what kernels for a GPU return where those for a CPU keep a buffer: an empty tensor."""
    return isinstance(kind, TensorType) and kind.shape == (0,)


def _refuse_local_extents(ctx: RuleContext) -> None:
    measured = ctx.local_extents()
    if measured:
        ctx.fail(
            f"%{measured[0].name} measures a sharded dimension, so it is one rank's number in whole-model arithmetic",
            "multiply it by the axis size, or measure the value before it is cut",
        )


def broadcast(ctx: RuleContext, values: Sequence[Value]) -> Placement:
    """The common placement of broadcast operands: all shards equal after alignment, the rest absent or of size 1.

    Args:
        ctx: The context, for errors.
        values: Tensor operands, none of them Partial.

    Returns:
        The shard in the dimensions of the broadcast result, or whole.
    """
    rank = max((v.tensor_type.ndim for v in values), default=0)
    target: Shard | None = None
    for value in values:
        placement = ctx.placement(value)
        if isinstance(placement, Partial):
            ctx.fail(f"%{value.name} is a partial sum", NEEDS_SUM)
        if not isinstance(placement, Shard):
            continue
        aligned = Shard(placement.dim + rank - value.tensor_type.ndim, placement.outer)
        if target is not None and aligned != target:
            ctx.fail(f"%{value.name} is cut along {aligned} of the result, another operand along {target}", NEEDS_SHARD)
        target = aligned
    if target is None:
        return WHOLE
    _check_extents(ctx, values, rank, target)
    return target


def _check_extents(ctx: RuleContext, values: Sequence[Value], rank: int, target: Shard) -> None:
    extents = []
    for value in values:
        dim = target.dim - (rank - value.tensor_type.ndim)
        cut = isinstance(ctx.placement(value), Shard)
        if dim < 0 or (value.tensor_type.shape[dim] == 1 and not cut):
            continue
        if not cut and not ctx.uniform_along(value, dim):
            ctx.fail(
                f"%{value.name} is whole but must be cut like the other operands, along its dimension {dim}",
                NEEDS_SHARD,
            )
        extents.append(value.tensor_type.shape[dim])
    if any((e == 1) != (extents[0] == 1) for e in extents):
        ctx.fail(f"a shard of local length 1 would be broadcast along dimension {target.dim}", NEEDS_SHARD)


def _partial(ctx: RuleContext) -> Outcome:
    name = ctx.node.op.name
    if name in _SUMS:
        return _sum(ctx)
    if name in _PRODUCTS or name in _SCALINGS:
        return _linear_in_one(ctx)
    if name in _QUOTIENTS:
        return _only_in(ctx, (ctx.operand("self"),))
    if name in _SELECTIONS:
        return _selection(ctx, _SELECTIONS[name])
    gradient = next((g for g in map(ctx.arg, _GRADIENT_ARGUMENTS) if isinstance(g, Value)), None)
    if gradient is not None and "backward" in name:
        return _only_in(ctx, (gradient,))
    return ctx.fail("a partial sum reaches an operation that is not linear in it", NEEDS_SUM)


def _sum(ctx: RuleContext) -> Outcome:
    for value in ctx.tensors:
        if not isinstance(ctx.placement(value), Partial) and not ctx.is_zero(value):
            ctx.fail(f"a partial sum is added to %{value.name}, which every rank would add again", NEEDS_SUM)
    if len(ctx.tensors) < 2 and ctx.arg("other") != 0:
        ctx.fail("a number is added to a partial sum, once per rank", NEEDS_SUM)
    return PARTIAL


def _linear_in_one(ctx: RuleContext) -> Outcome:
    partial = [v for v in ctx.tensors if isinstance(ctx.placement(v), Partial)]
    if len(partial) > 1:
        ctx.fail("a product of partial sums is not the sum of products", NEEDS_SUM)
    return _only_in(ctx, tuple(partial))


def _only_in(ctx: RuleContext, linear: Sequence[Value]) -> Outcome:
    """Partial if `linear` are the only partial operands (each read once) and every other operand is whole."""
    reads = [v for v in ctx.tensors if v not in linear]
    if len(reads) + len(linear) != len(ctx.tensors):
        ctx.fail("a partial sum is read twice by an operation that is linear in one operand only", NEEDS_SUM)
    for value in linear:
        if not isinstance(ctx.placement(value), Partial):
            ctx.fail(f"it is linear in %{value.name} only, which is not the partial sum", NEEDS_SUM)
    for value in reads:
        if not whole(ctx.placement(value)):
            ctx.fail(f"a partial sum meets %{value.name}, which is not whole", NEEDS_SUM)
    return PARTIAL


def _selection(ctx: RuleContext, names: Sequence[str]) -> Outcome:
    """Partial if every selectable operand is a partial sum or zero and the mask is whole."""
    chosen = [ctx.arg(name) for name in names]
    for value in ctx.tensors:
        if not any(value is c for c in chosen) and not whole(ctx.placement(value)):
            ctx.fail(f"the mask %{value.name} must be whole where partial sums are selected", NEEDS_SUM)
    for item in chosen:
        zero = ctx.is_zero(item) if isinstance(item, Value) else item == 0
        if not zero and not (isinstance(item, Value) and isinstance(ctx.placement(item), Partial)):
            ctx.fail("a partial sum is mixed with a value that every rank would contribute again", NEEDS_SUM)
    return PARTIAL
