"""Matrix products that repeat their right operand over dimensions of the left one, as larger products that do not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autosp_ir.analysis.token_axis import token_count
from autosp_ir.ir.graph import Value
from autosp_ir.ir.types import Dim
from autosp_ir.rewrite.rules import Match, rule


@dataclass(frozen=True)
class Folded:
    """How a product is written without repetition: `left[K, R, M, D] @ right[K, 1, D, N]` with R and M as one.

    Attributes:
        order: The dimensions of the left operand, those that are joined beside each other.
        left: The shape of the left operand in that order, with R and M as one dimension.
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
def _(match: Match, left: Value, right: Value) -> Folded | None:
    return folded(left, right, token_count(match.program))


@folded_products.replacement
def _(op: Any, left: Value, right: Value, folded: Folded) -> Any:
    matrix = op.aten.reshape(right, folded.right)
    if len(folded.right) == 2:
        return op.aten.matmul(left, matrix)
    product = op.aten.matmul(op.aten.reshape(_permuted(op, left, folded.order), folded.left), matrix)
    back = tuple(folded.order.index(dim) for dim in range(len(folded.order)))
    return _permuted(op, op.aten.reshape(product, folded.out), back)


def folded(left: Value, right: Value, tokens: Dim | None) -> Folded | None:
    """How to write a product without repetition; None where nothing is repeated, or an extent is a symbol.

    Args:
        left: `[…, M, D]`.
        right: `[…, D, N]`; of two dimensions it is never repeated.
        tokens: The extent that goes last among joined dimensions, so that tokens still follow one another.
    """
    a, b = left.tensor_type.shape, right.tensor_type.shape
    if len(b) < 3 or len(a) < len(b) or not all(isinstance(extent, int) for extent in (*a, *b)):
        return None
    extents, inner, columns = [int(extent) for extent in a[:-1]], int(a[-1]), int(b[-1])
    rows = len(extents) - 1
    own = [1] * (len(a) - len(b)) + [int(extent) for extent in b[:-2]]
    repeats = [dim for dim in range(rows) if own[dim] == 1 != extents[dim]]
    kept = [dim for dim in range(rows) if dim not in repeats]
    if not repeats:
        return None
    joined = sorted((*repeats, rows), key=lambda dim: extents[dim] == tokens)
    return Folded(
        (*kept, *joined, rows + 1),
        (*(extents[dim] for dim in kept), math.prod(extents[dim] for dim in joined), inner),
        (*(own[dim] for dim in kept), inner, columns),
        (
            *(own[dim] if extents[dim] == 1 else extents[dim] for dim in kept),
            *(extents[dim] for dim in joined),
            columns,
        ),
    )


def _permuted(op: Any, value: Value, order: tuple[int, ...]) -> Any:
    return value if order == tuple(range(len(order))) else op.aten.permute(value, order)


__all__ = ["Folded", "folded", "folded_products"]
