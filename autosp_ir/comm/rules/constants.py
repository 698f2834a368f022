"""Values that are one number everywhere, or constant along a dimension: any slice of them is like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autosp_ir.ir.graph import Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.types import TensorType

_FILLS: Mapping[str, float | str] = {
    "aten.zeros": 0,
    "aten.zeros_like": 0,
    "aten.new_zeros": 0,
    "aten.ones": 1,
    "aten.ones_like": 1,
    "aten.new_ones": 1,
    "aten.full": "fill_value",
    "aten.full_like": "fill_value",
    "aten.new_full": "fill_value",
    "aten.scalar_tensor": "s",
    "aten._efficientzerotensor": 0,
}
FILL_OPS = frozenset(_FILLS)
"""Operations whose result is one number everywhere."""

_SAME_VALUE = frozenset(
    {
        "aten.expand",
        "aten.view",
        "aten.reshape",
        "aten._unsafe_view",
        "aten.clone",
        "aten.contiguous",
        "aten.detach",
        "aten.alias",
        "aten._to_copy",
        "aten.to.dtype",
        "aten.unsqueeze",
        "aten.permute",
        "aten.transpose.int",
        "aten.t",
        "aten.slice.Tensor",
        "aten.select.int",
    }
)
_ELEMENTWISE_COPIES = frozenset(
    {"aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten._to_copy", "aten.to.dtype"}
)


def constant(value: Value) -> Any:
    """The number that fills a value, `...` for an unknown one that is the same everywhere, None if not constant."""
    node = value.producer
    while node.op.name in _SAME_VALUE and node.operands:
        node = node.operands[0].producer
    if node.op.name not in _FILLS:
        return None
    fill = _FILLS[node.op.name]
    number = node.arg(fill) if isinstance(fill, str) else fill
    return number if isinstance(number, int | float) else ...


def uniform(value: Value, dim: int) -> bool:
    """Whether a value is constant along `dim`."""
    kind = value.type
    if not isinstance(kind, TensorType):
        return True
    if constant(value) is not None or kind.numel == 1:
        return True
    node = value.producer
    tensors = [v for v in node.operands if isinstance(v.type, TensorType)]
    if node.is_op("aten.expand") or node.op.name in _ELEMENTWISE_COPIES or node.op.has(Trait.POINTWISE):
        return bool(tensors) and all(_uniform_operand(v, dim - kind.ndim) for v in tensors)
    return False


def _uniform_operand(value: Value, from_end: int) -> bool:
    shape = value.tensor_type.shape
    dim = len(shape) + from_end
    return dim < 0 or shape[dim] == 1 or uniform(value, dim)
