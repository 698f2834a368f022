"""Which values of a program are known functions of their index: one forward walk over the graph.

Positions, ranges, constants and what masks compute from them are tracked through views, arithmetic, comparisons and
indexing, for static and symbolic extents alike. Facts about the batch (`program.info["example_facts"]`) make inputs
known too; every result remembers which of them it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from autosp_ir._torch_compat import is_fake
from autosp_ir.analysis.index_domain import (
    ALWAYS,
    NEVER,
    Affine,
    Choice,
    Condition,
    IndexValue,
    Number,
    aligned,
    rearranged,
)
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import InputKind, OutputKind, Program
from autosp_ir.ir.types import ScalarType, TensorType

Rule = Callable[["IndexValues", Node], IndexValue | None]
RULES: dict[str, Rule] = {}
"""Transfer functions by ATen base name (`add` for every overload of `aten.add`)."""

_LARGEST_CONSTANT = 2**24
_HOLDS_POSITIONS = (torch.int64, torch.int32, torch.float32, torch.float64)


@dataclass
class IndexValues:
    """The result of the walk.

    Attributes:
        program: What was walked.
        known: Value to what it is as a function of its index.
        facts: Value to the inputs whose facts it rests on.
    """

    program: Program
    known: dict[Value, IndexValue] = field(default_factory=dict)
    facts: dict[Value, frozenset[str]] = field(default_factory=dict)

    def of(self, argument: Any, rank: int = 0) -> IndexValue | None:
        """What is known of an operand or a number, broadcast to at least `rank` dimensions."""
        if isinstance(argument, bool):
            return ALWAYS if argument else NEVER
        if isinstance(argument, int | float):
            return Affine((0,) * rank, argument)
        if not isinstance(argument, Value):
            return None
        if isinstance(argument.type, ScalarType):
            number = self.number(argument)
            return None if number is None else Affine((0,) * rank, number)
        found = self.known.get(argument)
        return None if found is None else rearranged(found, lambda a: aligned(a, max(rank, len(a.coefficients))))

    def number(self, argument: Any) -> Number | None:
        """A Python number, or the expression of a symbolic size."""
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            return argument
        if isinstance(argument, Value) and isinstance(argument.type, ScalarType):
            expr = argument.type.expr
            return int(expr) if isinstance(expr, sympy.Integer) else expr
        return None


def index_values(program: Program) -> IndexValues:
    """Walk `program` and say which values are known functions of their index.

    Args:
        program: A forward-stage program for one device.

    Returns:
        What is known, with the batch facts that each result rests on.
    """
    from autosp_ir.analysis import index_rules  # noqa: F401 - fills RULES

    result = IndexValues(program)
    _inputs(program, result)
    for node in program.graph.nodes:
        if not node.op.name.startswith("aten.") or not node.results:
            continue
        rule = RULES.get(node.op.name.split(".")[1])
        found = rule(result, node) if rule is not None and isinstance(node.result.type, TensorType) else None
        if found is not None and _is_exact(found, node.result.tensor_type.dtype):
            result.known[node.result] = found
            result.facts[node.result] = frozenset().union(*(result.facts.get(v, frozenset()) for v in node.operands))
    return result


def _is_exact(found: IndexValue, dtype: torch.dtype) -> bool:
    """Positions in a narrow dtype are rounded or wrap around, so nothing is known of them."""
    return not isinstance(found, Affine) or found.is_constant or dtype in _HOLDS_POSITIONS


def _inputs(program: Program, result: IndexValues) -> None:
    facts: dict[str, str] = program.info.get("example_facts", {})
    mutated = {s.target for s in program.signature.outputs if s.kind is OutputKind.BUFFER_MUTATION}
    for spec in program.signature.inputs:
        value = program.graph.value(spec.name)
        if not isinstance(value.type, TensorType):
            continue
        found: IndexValue | None = None
        if spec.kind is InputKind.USER_INPUT and spec.target in facts:
            found = _from_fact(facts[spec.target], value.type)
            result.facts[value] = frozenset({spec.target})
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT) and spec.target not in mutated:
            tensor = program.tensors.get(spec.target)
            found = from_concrete(tensor) if tensor is not None else None
        if found is not None:
            result.known[value] = found


def _from_fact(fact: str, kind: TensorType) -> IndexValue | None:
    if fact == "ones":
        return constant(1, kind)
    if fact == "arange":
        return Affine((0,) * (kind.ndim - 1) + (0 if kind.shape[-1] == 1 else 1,))
    return None


def constant(number: Number, kind: TensorType) -> IndexValue:
    """A tensor that is `number` everywhere, or its truth value for bool tensors."""
    if kind.dtype == torch.bool:
        return ALWAYS if number else NEVER
    return Affine((0,) * kind.ndim, number)


def from_concrete(tensor: Tensor) -> IndexValue | None:
    """Recognise a buffer's values: uniform, counting up along the last dimension, or lower triangular."""
    if is_fake(tensor) or tensor.device.type == "meta" or not 0 < tensor.numel() <= _LARGEST_CONSTANT:
        return None
    flat = tensor.detach().to("cpu")
    first = flat.flatten()[0]
    if bool((flat == first).all()):
        return constant(first.item(), TensorType(tuple(tensor.shape), tensor.dtype))
    if tensor.ndim >= 1 and not flat.is_floating_point() and flat.dtype != torch.bool:
        counting = torch.arange(flat.shape[-1], dtype=flat.dtype)
        if bool((flat == counting).all()):
            return Affine((0,) * (tensor.ndim - 1) + (1,))
    return _triangular(flat)


def _triangular(tensor: Tensor) -> IndexValue | None:
    if tensor.ndim < 2 or min(tensor.shape[-2:]) < 2:
        return None
    below, above = tensor[..., 0, 0].flatten()[0], tensor[..., 0, -1].flatten()[0]
    lower = torch.ones(tensor.shape[-2:], dtype=torch.bool).tril()
    if not bool((tensor == torch.where(lower, below, above)).all()):
        return None
    causal = Condition(frozenset({Affine((0,) * (tensor.ndim - 2) + (1, -1))}))
    return choice(causal, below.item(), above.item(), tensor.dtype)


def choice(condition: Condition, then: Number, otherwise: Number, dtype: torch.dtype) -> IndexValue | None:
    """A choice between two numbers, simplified; a condition again for bool tensors."""
    if dtype == torch.bool:
        if bool(then) == bool(otherwise):
            return ALWAYS if then else NEVER
        return condition if then else condition.negated()
    return Choice(condition, then, otherwise)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a transfer function under ATen base names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def used_facts(values: IndexValues, rests_on: Iterable[Value]) -> dict[str, str]:
    """The batch facts that conclusions about `rests_on` rest on, as `{input: fact}`."""
    facts: dict[str, str] = values.program.info.get("example_facts", {})
    names = sorted(frozenset().union(*(values.facts.get(v, frozenset()) for v in rests_on)))
    return {name: facts[name] for name in names}


__all__ = ["RULES", "IndexValues", "choice", "constant", "from_concrete", "index_values", "rule", "used_facts"]
