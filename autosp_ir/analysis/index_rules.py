"""Transfer functions of `index_values`: how ATen operators act on values known as functions of their index."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from autosp_ir.analysis.index_domain import (
    ALWAYS,
    NEVER,
    Affine,
    Choice,
    Condition,
    IndexValue,
    Number,
    aligned,
    all_hold,
    rearranged,
    sign,
)
from autosp_ir.analysis.index_values import IndexValues, choice, constant, rule
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.types import TensorType

_FILLS = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}


def _kind(node: Node) -> TensorType:
    return node.result.tensor_type


def _source(values: IndexValues, node: Node) -> IndexValue | None:
    return values.of(node.args[0]) if node.args else None


# Creation ------------------------------------------------------------------------------------------------------------


@rule("arange")
def _arange(values: IndexValues, node: Node) -> IndexValue | None:
    start, step = values.number(node.arg("start", 0)), values.number(node.arg("step", 1))
    if start is None or not isinstance(step, int):
        return None
    return Affine((step if _kind(node).shape[0] != 1 else 0,), start)


@rule(*_FILLS)
def _filled(values: IndexValues, node: Node) -> IndexValue | None:
    return constant(_FILLS[node.op.name.split(".")[1]], _kind(node))


@rule("full", "new_full", "full_like", "scalar_tensor", "fill")
def _full(values: IndexValues, node: Node) -> IndexValue | None:
    given = node.arg("fill_value", node.arg("s", node.arg("value")))
    number = int(given) if isinstance(given, bool) else values.number(given)
    return None if number is None else constant(number, _kind(node))


# Same values, other dtype or shape -----------------------------------------------------------------------------------


@rule("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "view_as")
def _converted(values: IndexValues, node: Node) -> IndexValue | None:
    found, dtype = _source(values, node), _kind(node).dtype
    if isinstance(found, Condition) and dtype != torch.bool:
        return Choice(found, 1, 0)
    if dtype != torch.bool or found is None or isinstance(found, Condition):
        return found
    if isinstance(found, Choice):
        return choice(found.condition, found.then, found.otherwise, dtype)
    return _constant_truth(found)


def _constant_truth(value: Affine) -> Condition | None:
    if not value.is_constant or isinstance(value.constant, sympy.Expr):
        return None
    return ALWAYS if value.constant else NEVER


def _moved(dims: list[int | None]) -> Callable[[Affine], Affine]:
    """New dimension i reads old dimension dims[i]; None is a new dimension."""
    return lambda a: Affine(tuple(0 if d is None else a.coefficients[d] for d in dims), a.constant)


@rule("unsqueeze")
def _unsqueeze(values: IndexValues, node: Node) -> IndexValue | None:
    found, rank = _source(values, node), _kind(node).ndim
    at = int(node.args[1]) % rank
    dims: list[int | None] = list(range(rank - 1))
    dims.insert(at, None)
    return None if found is None else rearranged(found, _moved(dims))


@rule("view", "reshape", "_unsafe_view", "squeeze", "flatten", "expand", "expand_as", "broadcast_to")
def _reshaped(values: IndexValues, node: Node) -> IndexValue | None:
    """Extents of 1 may come, go or grow; anything else would mix dimensions."""
    found, operand = _source(values, node), node.args[0]
    if found is None or not isinstance(operand, Value) or not isinstance(operand.type, TensorType):
        return None
    before, after = operand.type.shape, _kind(node).shape
    if node.op.name.split(".")[1] in ("expand", "expand_as", "broadcast_to"):
        return rearranged(found, lambda a: aligned(a, len(after)))
    old = [d for d, extent in enumerate(before) if extent != 1]
    new = [d for d, extent in enumerate(after) if extent != 1]
    if [before[d] for d in old] != [after[d] for d in new]:
        return None
    dims: list[int | None] = [None] * len(after)
    for source, target in zip(old, new, strict=True):
        dims[target] = source
    return rearranged(found, _moved(dims))


@rule("transpose", "permute", "t", "mT")
def _permuted(values: IndexValues, node: Node) -> IndexValue | None:
    found, rank = _source(values, node), _kind(node).ndim
    dims = list(range(rank))
    if node.op.name.startswith("aten.permute"):
        dims = [int(d) % rank for d in node.args[1]]
    elif rank >= 2:
        one, two = (int(d) % rank for d in (node.args[1:3] if len(node.args) > 2 else (-2, -1)))
        dims[one], dims[two] = two, one
    return None if found is None else rearranged(found, _moved(list(dims)))


@rule("slice")
def _sliced(values: IndexValues, node: Node) -> IndexValue | None:
    found = _source(values, node)
    dim, start, step = node.arg("dim", 0), node.arg("start"), node.arg("step", 1)
    offset = _position(values, node, dim, 0 if start is None else start)
    if found is None or offset is None or not isinstance(step, int):
        return None
    narrowed = _kind(node).shape[dim] == 1
    return rearranged(found, lambda a: _at(a, dim, offset, 0 if narrowed else step))


@rule("select")
def _selected(values: IndexValues, node: Node) -> IndexValue | None:
    found, dim = _source(values, node), node.arg("dim")
    offset = _position(values, node, dim, node.arg("index"))
    if found is None or offset is None:
        return None
    rank = _kind(node).ndim + 1
    kept: list[int | None] = [d for d in range(rank) if d != int(dim) % rank]
    return rearranged(found, lambda a: _moved(kept)(_at(a, dim, offset, 0)))


def _position(values: IndexValues, node: Node, dim: int, index: Any) -> Number | None:
    """A start index as a non-negative number."""
    number, operand = values.number(index), node.args[0]
    if number is None or not isinstance(operand, Value):
        return None
    extent = operand.tensor_type.shape[dim]
    known = sign(number)
    if known == 1:
        return number
    return number + extent if known == -1 and sign(number + extent) == 1 else None


def _at(value: Affine, dim: int, offset: Number, step: int) -> Affine:
    """The value with index variable `dim` replaced by `offset + step * index`."""
    coefficients = list(value.coefficients)
    coefficient = coefficients[dim]
    coefficients[dim] = coefficient * step
    return Affine(tuple(coefficients), value.constant + coefficient * offset)


# Arithmetic ----------------------------------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def _sum(values: IndexValues, node: Node) -> IndexValue | None:
    left, right = (values.of(a, _kind(node).ndim) for a in _two(node))
    if node.arg("alpha", 1) != 1 or left is None or right is None:
        return None
    name = node.op.name.split(".")[1]
    if name == "rsub":
        left, right = right, left
    if isinstance(left, Affine) and isinstance(right, Affine):
        return left + right if name == "add" else left - right
    return _on_numbers(left, right, operator.add if name == "add" else operator.sub)


@rule("mul", "div")
def _product(values: IndexValues, node: Node) -> IndexValue | None:
    left, right = (values.of(a, _kind(node).ndim) for a in _two(node))
    division = node.op.name.startswith("aten.div")
    if left is None or right is None or (division and node.arg("rounding_mode") is not None):
        return None
    if isinstance(left, Condition) and isinstance(right, Condition):
        return left.both(right)
    if isinstance(left, Affine) and isinstance(right, Affine) and not division:
        factor, value = (left.constant, right) if left.is_constant else (right.constant, left)
        one_is_constant = left.is_constant or right.is_constant
        return value.scaled(factor) if one_is_constant and isinstance(factor, int) else None
    return _on_numbers(left, right, operator.truediv if division else operator.mul)


@rule("neg")
def _negative(values: IndexValues, node: Node) -> IndexValue | None:
    found = _source(values, node)
    if isinstance(found, Affine):
        return found.scaled(-1)
    return found.map(operator.neg) if isinstance(found, Choice) else None


def _two(node: Node) -> tuple[Any, Any]:
    return node.args[0], node.args[1] if len(node.args) > 1 else node.arg("other")


def _on_numbers(left: IndexValue, right: IndexValue, fn: Callable[[Any, Any], Any]) -> IndexValue | None:
    """A choice combined with one number; a product with 0 at infinity is not a number, so nothing is said."""
    combined: Choice | None = None
    if isinstance(left, Choice) and isinstance(right, Affine) and right.is_constant:
        number = right.constant
        combined = _guarded(left, lambda n: fn(n, number))
    elif isinstance(right, Choice) and isinstance(left, Affine) and left.is_constant:
        number = left.constant
        combined = _guarded(right, lambda n: fn(number, n))
    return combined


def _guarded(value: Choice, fn: Callable[[Number], Any]) -> Choice | None:
    try:
        mapped = value.map(fn)
    except ZeroDivisionError:
        return None
    bad = any(isinstance(n, float) and math.isnan(n) for n in (mapped.then, mapped.otherwise))
    return None if bad else mapped


@rule("cumsum")
def _running_sum(values: IndexValues, node: Node) -> IndexValue | None:
    found, dim = _source(values, node), int(node.arg("dim"))
    if isinstance(found, Condition):
        number = 1 if found.always else 0 if found.never else None
        found = None if number is None else Affine((0,) * _kind(node).ndim, number)
    if not isinstance(found, Affine) or not found.is_constant or not isinstance(found.constant, int):
        return None
    return _at(Affine(_unit(_kind(node).ndim, dim, found.constant), found.constant), dim, 0, 1)


def _unit(rank: int, dim: int, coefficient: int) -> tuple[int, ...]:
    return tuple(coefficient if d == dim % rank else 0 for d in range(rank))


@rule("diff")
def _difference(values: IndexValues, node: Node) -> IndexValue | None:
    found, dim, front = _source(values, node), int(node.arg("dim", -1)), node.arg("prepend")
    if not isinstance(found, Affine) or node.arg("n", 1) != 1 or node.arg("append") is not None:
        return None
    step = Affine((0,) * len(found.coefficients), found.coefficients[dim])
    if front is None:
        return step
    before = values.of(front)
    return step if isinstance(front, Value) and before == _at(found, dim, -1, 0) and _one(front, dim) else None


def _one(value: Value, dim: int) -> bool:
    return bool(value.tensor_type.shape[dim] == 1)


@rule("cat")
def _concatenated(values: IndexValues, node: Node) -> IndexValue | None:
    """A part in front that continues the range behind it."""
    parts, dim = node.args[0], int(node.arg("dim", 0))
    # An empty vector joins tensors of any rank, as torch has it.
    if len(parts) != 2 or parts[0].tensor_type.ndim != parts[1].tensor_type.ndim:
        return None
    front, behind = values.of(parts[0]), values.of(parts[1])
    length = parts[0].tensor_type.shape[dim]
    if not isinstance(front, Affine) or not isinstance(behind, Affine):
        return None
    whole = _at(behind, dim, -length, 1)
    expected = _at(whole, dim, 0, 0) if length == 1 else whole
    return whole if front == expected else None


# Comparison and logic ------------------------------------------------------------------------------------------------

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


@rule(*_COMPARE)
def _compared(values: IndexValues, node: Node) -> IndexValue | None:
    name, kind = node.op.name.split(".")[1], _kind(node)
    left, right = (values.of(a, kind.ndim) for a in _two(node))
    if isinstance(left, Condition):
        left = Choice(left, 1, 0)
    if isinstance(left, Choice) and isinstance(right, Affine) and right.is_constant:
        return _choice_compared(left, right.constant, _COMPARE[name])
    if not isinstance(left, Affine) or not isinstance(right, Affine):
        return None
    return _affine_compared(name, left - right, kind)


def _choice_compared(left: Choice, number: Number, fn: Callable[[Any, Any], bool]) -> IndexValue | None:
    if any(isinstance(n, sympy.Expr) for n in (left.then, left.otherwise, number)):
        return None
    return choice(left.condition, fn(left.then, number), fn(left.otherwise, number), torch.bool)


def _affine_compared(name: str, difference: Affine, kind: TensorType) -> IndexValue | None:
    """`difference <op> 0` between integers, as inequalities `>= 0`."""
    if isinstance(difference.constant, float):
        return None
    minus_one = Affine((0,) * len(difference.coefficients), -1)
    opposite = difference.scaled(-1)
    constraints = {
        "ge": [difference],
        "gt": [difference + minus_one],
        "le": [opposite],
        "lt": [opposite + minus_one],
        "eq": [difference, opposite],
        "ne": [difference, opposite],
    }[name]
    result = all_hold(constraints, kind.shape)
    if name != "ne":
        return result
    return NEVER if result.always else ALWAYS if result.never else None


@rule("__and__", "bitwise_and", "logical_and", "__or__", "bitwise_or", "logical_or")
def _joined(values: IndexValues, node: Node) -> IndexValue | None:
    left, right = (values.of(a, _kind(node).ndim) for a in _two(node))
    disjunction = "or" in node.op.name.split(".")[1]
    decides = ALWAYS if disjunction else NEVER
    if decides in (left, right):
        return decides
    if not isinstance(left, Condition) or not isinstance(right, Condition):
        return None
    return left.either(right) if disjunction else left.both(right)


@rule("bitwise_not", "logical_not")
def _inverted(values: IndexValues, node: Node) -> IndexValue | None:
    found = _source(values, node)
    if isinstance(found, Affine):
        found = _constant_truth(found)
    if isinstance(found, Choice):
        found = choice(found.condition, found.then, found.otherwise, torch.bool)
    return found.negated() if isinstance(found, Condition) and _kind(node).dtype == torch.bool else None


@rule("where")
def _where(values: IndexValues, node: Node) -> IndexValue | None:
    rank = _kind(node).ndim
    return _picked(values.of(node.args[0], rank), values.of(node.args[1], rank), values.of(node.args[2], rank), node)


@rule("masked_fill")
def _masked_fill(values: IndexValues, node: Node) -> IndexValue | None:
    rank = _kind(node).ndim
    return _picked(values.of(node.args[1], rank), values.of(node.args[2], rank), values.of(node.args[0], rank), node)


def _picked(
    condition: IndexValue | None, then: IndexValue | None, otherwise: IndexValue | None, node: Node
) -> IndexValue | None:
    if not isinstance(condition, Condition):
        return None
    if condition.always or condition.never:
        return then if condition.always else otherwise
    numbers = (_same_everywhere(then), _same_everywhere(otherwise))
    if numbers[0] is None or numbers[1] is None:
        return None
    return choice(condition, numbers[0], numbers[1], _kind(node).dtype)


def _same_everywhere(value: IndexValue | None) -> Number | None:
    if isinstance(value, Condition):
        return 1 if value.always else 0 if value.never else None
    return value.constant if isinstance(value, Affine) and value.is_constant else None


@rule("tril", "triu")
def _triangle(values: IndexValues, node: Node) -> IndexValue | None:
    """Keeps one triangle and zeroes the other."""
    found, kind, diagonal = _source(values, node), _kind(node), node.arg("diagonal", 0)
    number = _same_everywhere(found)
    if number is None or not isinstance(diagonal, int):
        return None
    lower = Affine((0,) * (kind.ndim - 2) + (1, -1), diagonal)
    upper = Affine((0,) * (kind.ndim - 2) + (-1, 1), -diagonal)
    kept = all_hold([lower if node.op.name.startswith("aten.tril") else upper], kind.shape)
    return choice(kept, number, 0, kind.dtype)


@rule("index")
def _indexed(values: IndexValues, node: Node) -> IndexValue | None:
    """Advanced indexing of every dimension by known indices that stay inside the tensor."""
    found, operand, kind = _source(values, node), node.args[0], _kind(node)
    if found is None or not isinstance(operand, Value):
        return None
    number = _same_everywhere(found)
    if number is not None:
        return constant(number, kind)
    indices = [values.of(i, kind.ndim) for i in node.args[1]]
    if len(indices) != operand.tensor_type.ndim:
        return None
    inside: list[Affine] = []
    for index, extent in zip(indices, operand.tensor_type.shape, strict=True):
        if not isinstance(index, Affine):
            return None
        low, high = index.bounds(kind.shape)
        if sign(low) != 1 or sign(extent - 1 - high) != 1:
            return None
        inside.append(index)
    return rearranged(found, lambda a: a.substitute(inside))
