"""The arguments of operations: by name in the torch schema, however a node or a pattern passes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autosp_ir.errors import RuleError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import OpDef


@dataclass(frozen=True)
class Slot:
    """One argument of an operation: how it is called, where it stands, and what it has to be.

    Args:
        name: In the schema; empty where there is none.
        position: None for a keyword argument.
        default: Its value when a node leaves it out; `...` when it is required.
        pattern: What it has to be.
        given: Whether the pattern wrote it, rather than leaving it at its default.
    """

    name: str
    position: int | None
    default: Any
    pattern: Any
    given: bool = True


@dataclass(frozen=True)
class Parameter:
    """An argument that an operation takes; `default` is `...` when it is required."""

    name: str
    keyword_only: bool
    default: Any


_parameters: dict[OpDef, tuple[Parameter, ...]] = {}


def parameters_of(op: OpDef) -> tuple[Parameter, ...] | None:
    """The parameters of an operation with a torch schema, None for any other. Schemas are slow to read."""
    if op.schema is None:
        return None
    if op not in _parameters:
        _parameters[op] = tuple(
            Parameter(a.name, a.kwarg_only, a.default_value if a.has_default_value() else ...)
            for a in op.schema.arguments
        )
    return _parameters[op]


def slots_of(op: OpDef, args: tuple[Any, ...], kwargs: Mapping[str, Any], open_ended: bool) -> tuple[Slot, ...]:
    """The slots of an operation for the arguments that a pattern wrote.

    Args:
        op: The operation.
        args: What the pattern says of the positional arguments.
        kwargs: What it says of keyword arguments.
        open_ended: Whether the arguments left out may be anything, rather than their defaults.

    Raises:
        RuleError: The operation has no such argument, or needs one that is left out.
    """
    parameters = parameters_of(op)
    if parameters is None:
        named = [Slot(name, None, ..., pattern) for name, pattern in kwargs.items()]
        return (*(Slot("", i, ..., pattern) for i, pattern in enumerate(args)), *named)
    positional = [p.name for p in parameters if not p.keyword_only]
    unknown = [name for name in kwargs if name not in {p.name for p in parameters}]
    if unknown or len(args) > len(positional):
        what = f"no argument {unknown[0]!r}" if unknown else f"{len(positional)} positional arguments, not {len(args)}"
        raise RuleError(f"{op.name} has {what}", hint=f"it takes {op.schema}")
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    slots = []
    for position, parameter in enumerate(parameters):
        if parameter.name not in given and (open_ended or parameter.default is ...):
            if open_ended:
                continue
            raise RuleError(
                f"{op.name} needs the argument {parameter.name!r}", hint="give it, or end the arguments with ..."
            )
        place = None if parameter.keyword_only else position
        pattern = given.get(parameter.name, parameter.default)
        slots.append(Slot(parameter.name, place, parameter.default, pattern, parameter.name in given))
    return tuple(slots)


def fetch(node: Node, slot: Slot) -> Any:
    """A node's argument, however it was passed."""
    if node.kwargs and slot.name in node.kwargs:
        return node.kwargs[slot.name]
    if slot.position is not None and slot.position < len(node.args):
        return node.args[slot.position]
    return slot.default


def leaves_out_nothing(node: Node, slots: Sequence[Slot]) -> bool:
    """Whether the slots are all of a node's arguments; those of an operation with a schema always are."""
    return node.op.schema is not None or len(node.args) + len(node.kwargs) == len(slots)


def exchanged(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """The slots with the patterns of the first two exchanged."""
    first, second = slots[0], slots[1]
    return (
        replace(first, pattern=second.pattern, given=second.given),
        replace(second, pattern=first.pattern, given=first.given),
        *slots[2:],
    )


def same(wanted: Any, found: Any) -> bool:
    """Whether two arguments are the same: values by identity, numbers by value, lists and tuples by their elements."""
    if wanted is found:
        return True
    if isinstance(wanted, Value) or isinstance(found, Value):
        return False
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return len(wanted) == len(found) and all(map(same, wanted, found))
    if isinstance(wanted, bool) is not isinstance(found, bool):
        return False
    return bool(wanted == found)


def accepts(types: tuple[type, ...], subject: Any) -> bool:
    """Whether a variable of these types may stand for `subject`; integers are numbers, booleans are not."""
    if isinstance(subject, bool):
        return bool in types
    return isinstance(subject, (*types, int) if float in types else types)


__all__ = [
    "Parameter",
    "Slot",
    "accepts",
    "exchanged",
    "fetch",
    "leaves_out_nothing",
    "parameters_of",
    "same",
    "slots_of",
]
