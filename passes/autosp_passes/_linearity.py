"""Which operations are linear in some of their operands: twice the operands is twice the result."""

from __future__ import annotations

from collections.abc import Collection

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.types import TensorType

# The first operand alone may vary; every other argument is fixed.
_FIRST = frozenset(
    {
        "aten.alias",
        "aten.clone",
        "aten.detach",
        "aten.div.Scalar",
        "aten.div.Tensor",
        "aten.expand",
        "aten.mean",
        "aten.mean.dim",
        "aten.mul.Scalar",
        "aten.neg",
        "aten.permute",
        "aten.reshape",
        "aten.squeeze.dim",
        "aten.sum",
        "aten.sum.dim_IntList",
        "aten.t",
        "aten.transpose.int",
        "aten.unsqueeze",
        "aten.view",
        "aten._unsafe_view",
        "autosp.invariant_to_replicate",
        "autosp.unchunk",
        "operator.getitem",
        # Backwards of the losses: linear in the gradient that arrives.
        "aten._log_softmax_backward_data",
        "aten._softmax_backward_data",
        "aten.nll_loss_backward",
    }
)
_CASTS = frozenset({"aten._to_copy", "prims.convert_element_type"})
_PRODUCTS = frozenset({"aten.mul.Tensor", "aten.mm", "aten.bmm", "aten.matmul", "autosp.mm_float32"})
_SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
_CONSTANTS = frozenset({"aten.full", "aten.full_like", "aten.scalar_tensor"})
_ZEROS = frozenset({"aten.zeros", "aten.zeros_like"})


def is_linear(node: Node, varying: Collection[Value]) -> bool:
    """Whether the result is linear, without a constant part, in the operands in `varying`, taken together.

    Casts between floating types count as linear: they round each result by itself.

    Args:
        node: Any node; one of an operation that nothing is known of is not linear.
        varying: Values; at least one is an operand of the node.
    """
    name, operands = node.op.name, node.operands
    moving = [v in varying for v in operands]
    if name == "autosp.unchunk":
        return all(moving)
    if name in _SUMS:
        # Not `x + 1`, whose one operand moves.
        return moving == [True, True]
    if name in _PRODUCTS:
        return sum(moving) == 1
    if name == "autosp.addmm_float32":
        return moving[0] and sum(moving[1:]) == 1
    if name == "aten.where.self":
        return not moving[0] and all(m or _is_zero(v) for m, v in zip(moving[1:], operands[1:], strict=True))
    if name == "aten.masked_fill.Scalar":
        return moving == [True, False] and node.args[2] == 0
    if name in _CASTS:
        kind = node.result.type
        return isinstance(kind, TensorType) and kind.dtype.is_floating_point
    return name in _FIRST and moving[0] and not any(moving[1:])


def _is_zero(value: Value) -> bool:
    node = value.producer
    if node.op.has(Trait.VIEW) and node.operands:
        return _is_zero(node.operands[0])
    if node.is_op(*_ZEROS):
        return True
    fill = node.args[0] if node.is_op("aten.scalar_tensor") else node.args[1] if node.is_op(*_CONSTANTS) else None
    return isinstance(fill, int | float) and fill == 0


__all__ = ["is_linear"]
