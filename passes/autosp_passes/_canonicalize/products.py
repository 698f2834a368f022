"""Matrix products that repeat their right operand over dimensions of the left one, as larger products that do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autosp_ir.ir.graph import Value
from autosp_ir.rewrite.rules import rule


@dataclass(frozen=True)
class Folded:
    """How a product is written without repetition: `left[K, R, M, D] @ right[K, 1, D, N]` with M and R as one.

    Attributes:
        order: The dimensions of the left operand with those that repeat the right one behind the rows. If they are
            tokens, they stay beside each other.
        left: The shape of the left operand in that order, those dimensions joined to the rows.
        right: The shape of the right operand, without them.
        out: The shape of the result in that order.
    """

    order: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    out: tuple[int, ...]


@rule("products-folded")
def folded_products(op: Any, left: Any, right: Any) -> Any:
    """A product whose right operand is repeated over batch dimensions of the left one is a product of more rows.

    `torch.matmul` writes the repeated operand out: as often as there are tokens where they are such a dimension.
    """
    return op.aten.matmul(left, right)


@folded_products.let("folded", "its right operand is not repeated, or an extent is a symbol")
def _(left: Value, right: Value) -> Folded | None:
    return folded(left, right)


@folded_products.replacement
def _(op: Any, left: Value, right: Value, folded: Folded) -> Any:
    matrix = op.aten.reshape(right, folded.right)
    if len(folded.right) == 2:
        return op.aten.matmul(left, matrix)
    product = op.aten.matmul(op.aten.reshape(_permuted(op, left, folded.order), folded.left), matrix)
    back = tuple(folded.order.index(dim) for dim in range(len(folded.order)))
    return _permuted(op, op.aten.reshape(product, folded.out), back)


def folded(left: Value, right: Value) -> Folded | None:
    """How to write a product without repetition; None where nothing is repeated, or an extent is a symbol.

    A right operand of two dimensions is never repeated.
    """
    a, b = left.tensor_type.shape, right.tensor_type.shape
    if len(b) < 3 or len(a) < len(b) or not all(isinstance(extent, int) for extent in (*a, *b)):
        return None
    rows, inner, columns = int(a[-2]), int(a[-1]), int(b[-1])
    batch = [int(extent) for extent in a[:-2]]
    own = [1] * (len(a) - len(b)) + [int(extent) for extent in b[:-2]]
    repeats = [dim for dim in range(len(batch)) if own[dim] == 1 != batch[dim]]
    kept = [dim for dim in range(len(batch)) if dim not in repeats]
    if not repeats:
        return None
    front, back = [batch[dim] for dim in kept], [batch[dim] for dim in repeats]
    return Folded(
        (*kept, len(batch), *repeats, len(batch) + 1),
        (*front, rows * math.prod(back), inner),
        (*(own[dim] for dim in kept), inner, columns),
        (*(own[dim] if batch[dim] == 1 else batch[dim] for dim in kept), rows, *back, columns),
    )


def _permuted(op: Any, value: Value, order: tuple[int, ...]) -> Any:
    return value if order == tuple(range(len(order))) else op.aten.permute(value, order)


__all__ = ["Folded", "folded", "folded_products"]
