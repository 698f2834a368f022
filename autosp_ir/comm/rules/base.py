"""What a layout rule sees of its node, and the helpers that all families share.

A rule maps the placements of a node's operands along one mesh axis to the placement of its result. Rules speak of
three cases only: whole (`WHOLE`, the same on every rank), `Shard` and `Partial`. Whether a whole value is Invariant
or Replicate is one law for all operations and is applied by `autosp_ir.comm.layout` around the rule; only the layout
operators, which convert between the two, decide it themselves (`exact=True`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

import sympy

from autosp_ir.comm.rules.constants import FILL_OPS, constant, uniform
from autosp_ir.errors import AutoSPError, LayoutError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import OpDef, op_by_name
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import (
    INVARIANT,
    Dim,
    Invariant,
    Partial,
    Placement,
    Replicate,
    ScalarType,
    Shard,
    TensorType,
    TupleType,
)

Outcome: TypeAlias = "Placement | tuple[Placement | None, ...]"
"""The placement of a result, or one per element of a tuple (None where an element is no tensor)."""

Rule: TypeAlias = "Callable[[RuleContext], Outcome]"

_MEASURES = ("aten.sym_size.int", "aten.sym_numel", "aten.sym_stride.int")

WHOLE = INVARIANT
"""What a rule answers for a value that is the same on every rank."""

NEEDS_SHARD = "cut it along the same tokens with autosp.shard before this operation, or gather the sharded operand"
NEEDS_SUM = "complete the sum with autosp.all_reduce (or autosp.reduce_scatter) before this operation"
NEEDS_GATHER = "gather the operand with autosp.all_gather first, or move its shard to another dimension"


def whole(placement: Placement) -> bool:
    """Whether a value so placed is the same on every rank."""
    return isinstance(placement, Invariant | Replicate)


def product(extents: Iterable[Dim]) -> Dim:
    """The product of extents, 1 for none."""
    total: Dim = 1
    for extent in extents:
        total = total * extent
    return total


def quotient(total: Dim, part: Dim) -> Dim | None:
    """`total / part` if it is a whole number for every value of the symbols, else None."""
    if part == 0:
        return None
    if isinstance(total, int) and isinstance(part, int):
        return total // part if total % part == 0 else None
    return 1 if part == total else _symbolic_quotient(total, part)


@functools.lru_cache(maxsize=4096)
def _symbolic_quotient(total: Dim, part: Dim) -> Dim | None:
    """Cancelling is slow, and a program asks for the same few ratios again and again."""
    ratio = sympy.cancel(sympy.sympify(total) / sympy.sympify(part))
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


class RuleContext:
    """One node seen along one mesh axis.

    Attributes:
        node: The node to place.
        program: Its program.
        axis: The mesh axis.
        hint: The wanted result where several are right; a rule may follow it but never bend to it.
        what_if: Whether placements are hypothetical, so that shapes may be global.
    """

    def __init__(
        self,
        node: Node,
        program: Program,
        axis: str,
        *,
        placements: Mapping[Value, Outcome] | None = None,
        hint: Outcome | None = None,
    ) -> None:
        self.node = node
        self.program = program
        self.axis = axis
        self.hint = hint
        self.what_if = placements is not None
        self._placements = placements or {}

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return self.program.mesh.get(self.axis, 1)

    @property
    def tensors(self) -> list[Value]:
        """The tensor operands, with multiplicity."""
        return [v for v in self.node.operands if isinstance(v.type, TensorType)]

    @property
    def result_type(self) -> TensorType | None:
        """The stored type of the (first) tensor result, None when it has none yet."""
        kind = self.node.result.type
        if isinstance(kind, TupleType) and kind.elements:
            kind = kind.elements[0]
        return kind if isinstance(kind, TensorType) else None

    def stored(self, value: Value) -> Outcome:
        """The placement of any operand; tuples give one placement per element."""
        if value in self._placements:
            return self._placements[value]
        return stored_placement(value, self.axis)

    def placement(self, value: Value) -> Placement:
        """The placement of a tensor operand; Invariant for scalars."""
        found = self.stored(value)
        return found if isinstance(found, Placement) else WHOLE

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name."""
        return self.node.arg(name, default)

    def operand(self, name: str) -> Value:
        """A required tensor argument by its schema name."""
        value = self.node.arg(name)
        if not isinstance(value, Value):
            self.fail(f"argument {name!r} is not a tensor")
        return value

    def dim(self, value: Value, name: str = "dim") -> int:
        """A dimension argument, counted from the front of `value`."""
        return int(self.node.arg(name)) % max(value.tensor_type.ndim, 1)

    def dims(self, value: Value, name: str = "dim") -> tuple[int, ...]:
        """A list of dimensions, counted from the front; all of them when the argument is None or empty."""
        given = self.node.arg(name)
        ndim = value.tensor_type.ndim
        if given is None or (isinstance(given, tuple | list) and not given):
            return tuple(range(ndim))
        listed = given if isinstance(given, tuple | list) else (given,)
        return tuple(int(d) % max(ndim, 1) for d in listed)

    def shard_hint(self) -> Shard | None:
        """The hint, if it is a shard."""
        return self.hint if isinstance(self.hint, Shard) else None

    def fail(self, reason: str, advice: str = "change the layout of an operand, or gather it first") -> NoReturn:
        """Refuse the node.

        Raises:
            LayoutError: Always.
        """
        seen = ", ".join(
            f"%{v.name}: {_shown(self.stored(v))}" for v in dict.fromkeys(self.node.operands) if _has_layout(v)
        )
        raise LayoutError(
            f"%{self.node.name} = {self.node.op.name} along axis {self.axis!r}: {reason} (operands: {seen or 'none'})",
            node=self.node,
            hint=advice,
        )

    # -- facts about whole values ------------------------------------------------------------------------------------

    def uniform_along(self, value: Value, dim: int, outer: Dim = 1) -> bool:
        """Whether a whole value is constant along `dim` (in each of its `outer` blocks): any slice is like any other.

        Such a value may stand where a shard is wanted. A hypothetical placement is taken at its word instead.
        """
        return not self.what_if and whole(self.placement(value)) and uniform(value, dim, outer)

    def is_zero(self, value: Value) -> bool:
        """Whether a value is zero everywhere, so that it is also its own partial sum."""
        return bool(constant(value) == 0)

    def local_extents(self) -> list[Value]:
        """Scalar operands that measure a sharded dimension: numbers that differ from the whole model's."""
        return [v for v in self.node.operands if isinstance(v.type, ScalarType) and self._measures_shard(v, set())]

    def is_local_length(self, value: Value) -> bool:
        """Whether a number is a whole model's length divided by the ranks: one rank's length, or a multiple of it.

        Of `own + 1` the ranks together would make as many more as there are ranks.
        """
        node = value.producer
        numbers = [v for v in node.operands if isinstance(v.type, ScalarType)]
        if node.is_op(*_MEASURES):
            return self._measures_shard(value, set())
        local = [v for v in numbers if self._measures_shard(v, set())]
        if not all(self.is_local_length(v) for v in local):
            return False
        if node.is_op("operator.mul"):
            return len(local) == 1
        if node.is_op("operator.add", "operator.sub"):
            return len(local) == 2
        return node.is_op("operator.floordiv") and node.operands[0] in local and _is_multiple(*node.args)

    def _measures_shard(self, value: Value, seen: set[Value]) -> bool:
        if value in seen:
            return False
        seen.add(value)
        node = value.producer
        if node.is_op(*_MEASURES):
            source = node.operands[0]
            placement = self.placement(source)
            if not isinstance(placement, Shard) or node.is_op("aten.sym_numel"):
                return isinstance(placement, Shard)
            dim = int(node.args[1]) % source.tensor_type.ndim
            return dim == placement.dim if node.is_op("aten.sym_size.int") else dim < placement.dim
        return any(self._measures_shard(v, seen) for v in node.operands if isinstance(v.type, ScalarType))


def _is_multiple(number: Value, of: object) -> bool:
    expr = number.type.expr if isinstance(number.type, ScalarType) else None
    return isinstance(of, int) and of != 0 and expr is not None and bool((expr / of).is_integer)


def stored_placement(value: Value, axis: str) -> Outcome:
    """The placement stored in a value's type."""
    kind = value.type
    if isinstance(kind, TensorType):
        return kind.layout[axis]
    if isinstance(kind, TupleType):
        return tuple(e.layout[axis] if isinstance(e, TensorType) else None for e in kind.elements)
    return WHOLE


def _has_layout(value: Value) -> bool:
    return isinstance(value.type, TensorType | TupleType)


def _shown(outcome: Outcome) -> str:
    if isinstance(outcome, tuple):
        return "(" + ", ".join("-" if p is None else str(p) for p in outcome) + ")"
    return str(outcome)


def refuse_unless_whole(ctx: RuleContext, reason: str, advice: str = NEEDS_GATHER) -> Placement:
    """Whole if every tensor operand is, else refuse with a reason."""
    if not all(whole(ctx.placement(v)) for v in ctx.tensors):
        ctx.fail(reason, advice)
    return WHOLE


def refuse_partial(ctx: RuleContext) -> None:
    """Refuse partial sums, for operations that are not linear."""
    for value in ctx.tensors:
        if isinstance(ctx.placement(value), Partial):
            ctx.fail(f"%{value.name} is a partial sum and the operation is not linear", NEEDS_SUM)


def every(ctx: RuleContext, placement: Placement) -> Outcome:
    """One placement for each element of the node's result."""
    kind = ctx.node.result.type
    return (placement,) * len(kind.elements) if isinstance(kind, TupleType) else placement


def off_dimension(ctx: RuleContext, value: Value, dim: int, what: str) -> Placement:
    """The placement of `value`, refused when it is cut along `dim`."""
    placement = ctx.placement(value)
    if isinstance(placement, Shard) and placement.dim == dim:
        ctx.fail(f"{what} along dimension {dim}, which is cut", NEEDS_GATHER)
    return placement


def cuttable(kind: TensorType, shard: Shard) -> bool:
    """Whether a tensor of this local type can hold `shard`."""
    return 0 <= shard.dim < kind.ndim and quotient(kind.shape[shard.dim], shard.outer) is not None


# -- registration ----------------------------------------------------------------------------------------------------

_TORCH_NAMESPACES = ("aten", "prims", "_c10d_functional")

RULES: dict[str, Rule] = {}
"""Every operation that a family gave a rule, by IR name."""

EXACT: set[str] = set()
"""Operations whose rule itself decides between Invariant and Replicate."""


def rule(*names: str, exact: bool = False) -> Callable[[Rule], Rule]:
    """Attach a layout rule to operations, by IR name.

    Args:
        names: IR names of existing operations; an operator of torch that this release does not have is skipped,
            since no program can hold it.
        exact: Whether the rule itself decides between Invariant and Replicate.

    Returns:
        A decorator for a function from a `RuleContext` to a placement, or to one per element of a tuple result. It
        sees whole values, shards and partial sums (`ctx.placement(value)`), and refuses with `ctx.fail(reason)`.

    Raises:
        AutoSPError: An operation that is not torch's own does not exist (yet): register it first.
    """

    def attach(function: Rule) -> Rule:
        for name in names:
            op = _find(name)
            RULES[name] = function
            if exact:
                EXACT.add(name)
            if op is not None:
                op.layout_rule = function
        return function

    return attach


def _find(name: str) -> OpDef | None:
    try:
        return op_by_name(name)
    except AutoSPError:
        if name.partition(".")[0] not in _TORCH_NAMESPACES:
            raise
        return None


__all__ = [
    "EXACT",
    "FILL_OPS",
    "NEEDS_GATHER",
    "NEEDS_SHARD",
    "NEEDS_SUM",
    "RULES",
    "WHOLE",
    "Outcome",
    "Partial",
    "Rule",
    "RuleContext",
    "cuttable",
    "every",
    "off_dimension",
    "product",
    "quotient",
    "refuse_partial",
    "refuse_unless_whole",
    "rule",
    "stored_placement",
    "whole",
]
