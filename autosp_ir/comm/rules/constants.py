"""Values that are one number everywhere, or constant along a dimension: any slice of them is like any other."""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.types import Dim, TensorType

_FILLS: Mapping[str, float | str | EllipsisType] = {
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
    "aten.empty.memory_format": ...,
    "aten.empty_like": ...,
    "aten.new_empty": ...,
}
FILL_OPS = frozenset(_FILLS)
"""Operations whose result is one number everywhere; memory that nobody has written may hold any."""

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
_RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze"})
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


def uniform(value: Value, dim: int, outer: Dim = 1) -> bool:
    """Whether a value is constant along `dim`, or within each of the `outer` blocks of equal length that `dim` is."""
    kind = value.type
    if not isinstance(kind, TensorType):
        return True
    if constant(value) is not None or kind.numel == 1:
        return True
    node = value.producer
    tensors = [v for v in node.operands if isinstance(v.type, TensorType)]
    if node.is_op("aten.expand") or node.op.name in _ELEMENTWISE_COPIES or node.op.has(Trait.POINTWISE):
        return bool(tensors) and all(_uniform_operand(v, dim - kind.ndim, outer) for v in tensors)
    if node.op.name in _RESHAPES:
        source = _kept(tensors[0].tensor_type.shape, kind.shape, dim, outer)
        return source is not None and uniform(tensors[0], source)
    moved = _source_dim(node, dim, kind.ndim)
    return moved is not None and uniform(tensors[0], moved, outer)


def _source_dim(node: Node, dim: int, rank: int) -> int | None:
    """The dimension of a permutation's operand that became dimension `dim`, None for other operations."""
    if node.is_op("aten.permute"):
        return int(node.arg("dims")[dim]) % rank
    if node.is_op("aten.transpose.int", "aten.t"):
        pair = (0, rank - 1) if node.is_op("aten.t") else (int(node.arg("dim0")) % rank, int(node.arg("dim1")) % rank)
        return {pair[0]: pair[1], pair[1]: pair[0]}.get(dim, dim)
    return None


def _kept(before: tuple[Dim, ...], after: tuple[Dim, ...], dim: int, outer: Dim) -> int | None:
    """The dimension of a reshape's operand that is one block of dimension `dim` of its result, None if there is none.

    Its elements are as far apart and as many as those of a block.
    """
    front = _extent(after[:dim]) * outer
    found = [d for d, extent in enumerate(before) if extent * outer == after[dim] and _extent(before[:d]) == front]
    return found[0] if len(found) == 1 else None


def _extent(shape: tuple[Dim, ...]) -> Dim:
    total: Dim = 1
    for extent in shape:
        total = total * extent
    return total


def _uniform_operand(value: Value, from_end: int, outer: Dim) -> bool:
    shape = value.tensor_type.shape
    dim = len(shape) + from_end
    return dim < 0 or shape[dim] == 1 or uniform(value, dim, outer)
