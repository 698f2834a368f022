"""Small questions that the rules ask of nodes and values."""

from __future__ import annotations

from typing import Any

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.types import TensorType

SAME_VALUES = frozenset({"clone", "contiguous", "alias", "lift_fresh_copy"})
"""Base names of operators whose result equals their operand, gradient included."""
CASTS = frozenset({"to", "_to_copy", "type_as"})
_DROPOUTS = frozenset({"dropout", "native_dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"})


def base(node: Node | None) -> str:
    """The ATen base name, `add` for every overload of `aten.add`; empty for other operations."""
    if node is None or not node.op.name.startswith("aten."):
        return ""
    return node.op.name.split(".")[1]


def tensor(value: Any) -> TensorType | None:
    """The type of a tensor value; None for anything else."""
    return value.type if isinstance(value, Value) and isinstance(value.type, TensorType) else None


def skip_same(value: Value) -> Value:
    """The value behind copies that change nothing."""
    while base(value.producer) in SAME_VALUES:
        value = value.producer.args[0]
    return value


def permutation(node: Node) -> list[int] | None:
    """For a reordering of dimensions, the operand's dimension at each dimension of the result; None for the rest."""
    if base(node) not in ("transpose", "permute", "t", "mT"):
        return None
    rank = node.result.tensor_type.ndim
    if base(node) == "permute":
        return [int(d) % rank for d in node.args[1]]
    dims = list(range(rank))
    if rank >= 2:
        one, two = (int(d) % rank for d in (node.args[1:3] if base(node) == "transpose" else (-2, -1)))
        dims[one], dims[two] = dims[two], dims[one]
    return dims


def inactive_dropout(node: Node) -> bool:
    """A dropout that returns its operand."""
    return base(node) in _DROPOUTS and (node.arg("p", 1.0) == 0 or node.arg("train", True) is False)


__all__ = ["CASTS", "SAME_VALUES", "base", "inactive_dropout", "permutation", "skip_same", "tensor"]
