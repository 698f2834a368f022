"""Patterns: expressions over IR operations with variables in them, as plain data.

A variable stands for a value or for an attribute; where it occurs twice, both must be the same. An argument that is
left out must have its schema default, `...` stands for anything, and a trailing `...` for all further arguments.
`tracing` makes patterns from functions, `matching` compares them with programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from autosp_ir.errors import AutoSPError, RuleError
from autosp_ir.ir.literals import format_argument
from autosp_ir.ir.ops import OpDef, op_by_name
from autosp_ir.ir.types import Placement
from autosp_ir.rewrite.arguments import Slot, slots_of

Expression: TypeAlias = "Any"
"""What may stand in a pattern: a `Pattern`, a list or tuple of expressions, `...`, or a literal attribute."""


@dataclass(frozen=True)
class Having:
    """What a value has to be, besides having the right expression.

    Args:
        dtype: Its dtype.
        rank: Its number of dimensions.
        shape: Its extents; a variable binds one, `...` accepts any.
        layout: Placements by mesh axis: `Shard(1)` for this one, `Shard` for any of its kind, a variable to bind it.
        uses: How many times it is read.
    """

    dtype: torch.dtype | None = None
    rank: int | None = None
    shape: tuple[Expression, ...] | None = None
    layout: Mapping[str, Expression | Placement | type[Placement]] | None = None
    uses: int | None = None


@dataclass(frozen=True, eq=False)
class Pattern:
    """What a rule looks for. Patterns are told apart by identity: one that is used twice matches one value.

    Attributes:
        name: The variable that its value is bound to; None binds nothing.
        wanted: What its value has to be.
    """

    name: str | None = None
    wanted: Having | None = None

    def named(self, name: str) -> Pattern:
        """This pattern, its value bound to a variable of its own."""
        return replace(self, name=name)

    def having(
        self,
        *,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        shape: tuple[Expression, ...] | None = None,
        layout: Mapping[str, Expression] | None = None,
        uses: int | None = None,
    ) -> Pattern:
        """This pattern, for values of this type, layout and number of uses only; see `Having`."""
        return replace(self, wanted=Having(dtype, rank, shape, layout, uses))

    def __or__(self, other: Pattern) -> Either:
        return Either(options=(*options_of(self), *options_of(other)))


@dataclass(frozen=True, eq=False)
class Variable(Pattern):
    """A value or an attribute of any kind; of one of the `accepts` types if there are any."""

    accepts: tuple[type, ...] = ()

    def __str__(self) -> str:
        return str(self.name)


@dataclass(frozen=True, eq=False)
class Either(Pattern):
    """The first of several patterns that fits."""

    options: tuple[Pattern, ...] = ()

    def __str__(self) -> str:
        return f"({' | '.join(map(str, self.options))})"


@dataclass(frozen=True, eq=False)
class Operation(Pattern):
    """The result of one of several operations.

    Attributes:
        slots: For each operation, its arguments.
        text: The call as it was written.
        closed: Whether arguments beyond the slots are refused; only operations without a schema have any.
        reused: Whether nodes outside the match may read its result too.
        commutes: Whether the first two arguments may be exchanged.
    """

    slots: Mapping[OpDef, tuple[Slot, ...]] = field(default_factory=dict)
    text: str = ""
    closed: bool = True
    reused: bool = False
    commutes: bool = False

    def shared(self) -> Operation:
        """This pattern, though nodes outside the match read its result too; it then stays for them."""
        return replace(self, reused=True)

    def commuted(self) -> Operation:
        """This pattern, with its first two arguments in either order."""
        return replace(self, commutes=True)

    def __getitem__(self, index: int) -> Operation:
        """Result `index` of an operation with several."""
        return operation(("operator.getitem",), (self, index), {})

    def __iter__(self) -> Iterator[Operation]:
        schemas = [op.schema for op in self.slots]
        counts = {len(schema.returns) if schema is not None else 1 for schema in schemas}
        if counts == {1} or len(counts) > 1:
            raise RuleError(f"{self.text} has one result", hint="do not unpack it; write [i] for an element of a list")
        return iter([self[i] for i in range(counts.pop())])

    def __str__(self) -> str:
        return self.text


def options_of(pattern: Any) -> tuple[Any, ...]:
    """The alternatives of a pattern; itself when there is one."""
    return pattern.options if isinstance(pattern, Either) and pattern.wanted is None else (pattern,)


def operations_of(expression: Expression) -> Iterator[Operation]:
    """Every operation in an expression, outermost first."""
    if isinstance(expression, Operation):
        yield expression
    for child in children(expression):
        yield from operations_of(child)


def children(expression: Expression) -> list[Expression]:
    """The expressions directly inside one."""
    if isinstance(expression, Operation):
        return list(dict.fromkeys(p for slots in expression.slots.values() for p in _patterns(slots)))
    if isinstance(expression, Either):
        return list(expression.options)
    return list(expression) if isinstance(expression, list | tuple) else []


def depth_of(expression: Expression) -> int:
    """How many operations are nested in each other."""
    inner = max(map(depth_of, children(expression)), default=0)
    return inner + 1 if isinstance(expression, Operation) else inner


def variables_of(expression: Expression) -> set[str]:
    """The names that an expression binds."""
    found = {name for child in children(expression) for name in variables_of(child)}
    if isinstance(expression, Pattern):
        found |= {expression.name} if expression.name else set()
        wanted = expression.wanted
        bound = (*(wanted.shape or ()), *(wanted.layout or {}).values()) if wanted is not None else ()
        found |= {item.name for item in bound if isinstance(item, Variable) and item.name}
    return found


def _patterns(slots: tuple[Slot, ...]) -> Iterator[Expression]:
    for slot in slots:
        if isinstance(slot.pattern, Pattern):
            yield slot.pattern
        elif isinstance(slot.pattern, list | tuple):
            yield from (item for item in slot.pattern if isinstance(item, Pattern))


def operation(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    """A pattern for one of several operations, by IR name.

    Raises:
        RuleError: An operation is unknown, with a suggestion, or does not take these arguments.
    """
    text = f"{names[0] if len(names) == 1 else '{' + ', '.join(names) + '}'}({_arguments(args, kwargs)})"
    open_ended = bool(args) and args[-1] is ...
    given = args[:-1] if open_ended else args
    try:
        slots = {op: slots_of(op, given, kwargs, open_ended) for op in map(op_by_name, names)}
    except RuleError:
        raise
    except AutoSPError as error:
        raise RuleError(error.reason, hint=error.hint) from None
    return Operation(slots=slots, text=text, closed=not open_ended)


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(show, args), *(f"{name}={show(value)}" for name, value in kwargs.items())])


def show(expression: Expression) -> str:
    """An expression, or what a program has in its place, as text."""
    if isinstance(expression, Pattern):
        return str(expression)
    if expression is ...:
        return "..."
    if isinstance(expression, list | tuple):
        inside = ", ".join(map(show, expression))
        return f"[{inside}]" if isinstance(expression, list) else f"({inside})"
    try:
        return format_argument(expression)
    except AutoSPError:
        return repr(expression)


__all__ = [
    "Either",
    "Expression",
    "Having",
    "Operation",
    "Pattern",
    "Variable",
    "children",
    "depth_of",
    "operation",
    "operations_of",
    "options_of",
    "show",
    "variables_of",
]
