"""Einsums of two operands as permutes around one `matmul`, so that later rules see one form of contraction."""

from __future__ import annotations

from dataclasses import dataclass

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.rewriter import Rewriter


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


def rewrite_einsums(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Replace `einsum` by permutes and `matmul` where it is a batched matrix product."""
    for node in program.find("aten.einsum"):
        operands = node.args[1]
        parsed = parse_contraction(str(node.args[0]))
        if parsed is None or len(operands) != 2 or node.arg("path") is not None:
            continue
        with rewriter.rewrite():
            rewriter.replace(node, _product(rewriter, node, parsed, operands[0], operands[1]))
        ctx.count("einsums")


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


def _product(rewriter: Rewriter, node: Node, parsed: Contraction, left: Value, right: Value) -> Value:
    with rewriter.before(node):
        a = _permuted(rewriter, left, parsed.left, parsed.batch + parsed.row + parsed.inner)
        b = _permuted(rewriter, right, parsed.right, parsed.batch + parsed.inner + parsed.column)
        product = rewriter.create("aten.matmul", (a, b))
        return _permuted(rewriter, product, parsed.batch + parsed.row + parsed.column, parsed.out)


def _permuted(rewriter: Rewriter, value: Value, have: str, want: str) -> Value:
    if have == want:
        return value
    return rewriter.create("aten.permute", (value, [have.index(c) for c in want]))


__all__ = ["Contraction", "parse_contraction", "rewrite_einsums"]
