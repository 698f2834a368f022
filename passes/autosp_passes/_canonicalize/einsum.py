"""Einsums of two operands as permutes around one `matmul`, so that later rules see one form of contraction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autosp_ir.ir.graph import Value
from autosp_ir.rewrite.rules import rule


@dataclass(frozen=True)
class Contraction:
    """The letters of an einsum that is a batched matrix product.

    Attributes:
        left: Letters of the first operand.
        right: Letters of the second operand.
        out: Letters of the result.
        batch: Letters in all three, in the result's order.
        row: The letter of the first operand alone.
        column: The letter of the second operand alone.
        inner: The contracted letter.
    """

    left: str
    right: str
    out: str
    batch: str
    row: str
    column: str
    inner: str


def parse_contraction(equation: str) -> Contraction | None:
    """Read an equation such as `bqhd,bkhd->bhqk`; None when it is no batched matrix product of plain letters."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    plain = all(s.isalpha() and len(set(s)) == len(s) for s in (left, right, out))
    if not arrow or not comma or not plain:
        return None
    batch = "".join(c for c in out if c in left and c in right)
    row = [c for c in left if c not in right and c in out]
    column = [c for c in right if c not in left and c in out]
    inner = [c for c in left if c in right and c not in out]
    if (len(row), len(column), len(inner)) != (1, 1, 1) or set(out) != {*batch, *row, *column}:
        return None
    if set(left) != {*batch, *row, *inner} or set(right) != {*batch, *column, *inner}:
        return None
    return Contraction(left, right, out, batch, row[0], column[0], inner[0])


@rule("einsums")
def einsums(op: Any, equation: str, left: Any, right: Any) -> Any:
    """An einsum that is a batched matrix product becomes permutes around one `matmul`."""
    return op.aten.einsum(equation, [left, right])


einsums.let("letters", "it is no batched matrix product of plain letters")(parse_contraction)


@einsums.replacement
def _(op: Any, left: Value, right: Value, letters: Contraction) -> Any:
    a = _permuted(op, left, letters.left, letters.batch + letters.row + letters.inner)
    b = _permuted(op, right, letters.right, letters.batch + letters.inner + letters.column)
    product = op.aten.matmul(a, b)
    return _permuted(op, product, letters.batch + letters.row + letters.column, letters.out)


def _permuted(op: Any, value: Value, have: str, want: str) -> Any:
    return value if have == want else op.aten.permute(value, [have.index(c) for c in want])


__all__ = ["Contraction", "einsums", "parse_contraction"]
