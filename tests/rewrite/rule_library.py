"""Exact rules that several tests apply."""

from __future__ import annotations

from typing import Any

import autosp_ir as air


@air.rule("drop-double-transpose")
def double_transpose(op: Any, x: air.Value, a: int, b: int) -> Any:
    """Two exchanges of the same dimensions are none."""
    return op.aten.transpose.int(op.aten.transpose.int(x, a, b), a, b)


@double_transpose.replacement
def _(x: air.Value) -> air.Value:
    return x


@air.rule("drop-unit-factor")
def unit_factor(op: Any, x: air.Value) -> Any:
    return op.aten.mul.Tensor(x, 1).commuted()


@unit_factor.where("the product has the type of its operand")
def _(x: air.Value, match: air.Match) -> bool:
    return x.type == match.root.result.type


@unit_factor.replacement
def _(x: air.Value) -> air.Value:
    return x


@air.rule("drop-double-negation")
def double_negation(op: Any, x: air.Value) -> Any:
    return op.aten.neg(op.aten.neg(x).shared())


@double_negation.replacement
def _(x: air.Value) -> air.Value:
    return x


@air.rule("factor-out")
def factor_out(op: Any, x: air.Value, y: air.Value, z: air.Value) -> Any:
    """`x * z + y * z` is `(x + y) * z`."""
    return op.aten.add.Tensor(op.aten.mul.Tensor(x, z), op.aten.mul.Tensor(y, z))


@factor_out.where("the terms are alike")
def _(x: air.Value, y: air.Value, match: air.Match) -> bool:
    return x.type == y.type == match.root.result.type


@factor_out.replacement
def _(op: Any, x: air.Value, y: air.Value, z: air.Value) -> Any:
    return op.aten.mul.Tensor(op.aten.add.Tensor(x, y), z)


@air.rule("subtract")
def subtract(op: Any, x: air.Value, y: air.Value) -> Any:
    """`x + (-y)` is `x - y`."""
    return op.aten.add.Tensor(x, op.aten.neg(y).shared()).commuted()


@subtract.replacement
def _(op: Any, x: air.Value, y: air.Value) -> Any:
    return op.aten.sub.Tensor(x, y)


EXACT = [double_transpose, unit_factor, double_negation, factor_out, subtract]
