"""Comparing patterns with programs, backtracking over alternatives and exchanged operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.printer import format_type
from autosp_ir.ir.types import Placement, TensorType
from autosp_ir.rewrite.arguments import Slot, accepts, exchanged, fetch, leaves_out_nothing, same
from autosp_ir.rewrite.pattern import (
    Either,
    Expression,
    Having,
    Operation,
    Pattern,
    Variable,
    children,
    options_of,
    show,
)


@dataclass(frozen=True)
class Mismatch:
    """A partial match and what ended it.

    Args:
        nodes: The operations of the pattern that matched, with their nodes.
        bindings: The variables bound so far.
        wanted: The part of the pattern that did not match; None when all of it did.
        found: What the program has in its place.
        reason: Why it does not match.
    """

    nodes: dict[Operation, Node]
    bindings: dict[str, Any]
    wanted: Expression
    found: Any
    reason: str


Watcher = Callable[[Mismatch], None]


class Matcher:
    """One attempt to match the roots of a rule.

    Args:
        watch: Called with each mismatch; None when nobody asks for reasons.
        writes: Whether the program may have nodes that write to their operands.

    Attributes:
        bindings: The variables bound so far.
        nodes: The operations of the pattern matched so far.
    """

    def __init__(self, watch: Watcher | None = None, writes: bool = True) -> None:
        self.bindings: dict[str, Any] = {}
        self.nodes: dict[Operation, Node] = {}
        self._watch = watch
        self._writes = writes
        self._argument = ""

    def roots(self, patterns: Sequence[Pattern], first: Value) -> Iterator[tuple[Node, ...]]:
        """The nodes of the roots, once for each way in which all of them match and nothing else reads their insides."""
        self._argument = ""
        for _ in self.match(patterns[0], first):
            for nodes in self._further(patterns[1:], (first.producer,)):
                if self._closed(nodes) and self._undisturbed(nodes):
                    yield nodes

    def match(self, pattern: Expression, subject: Any) -> Iterator[None]:
        """Bind variables so that `pattern` is `subject`, once for each way to do it."""
        if isinstance(pattern, Operation):
            yield from self._operation(pattern, subject)
        elif isinstance(pattern, Variable):
            yield from self._variable(pattern, subject)
        elif isinstance(pattern, Either):
            yield from self._either(pattern, subject)
        elif isinstance(pattern, list | tuple):
            yield from self._sequence(pattern, subject)
        elif pattern is ... or same(pattern, subject):
            yield
        elif self._watch:
            self.miss(pattern, subject, f"it is {show(subject)}, not {show(pattern)}")

    def miss(self, wanted: Expression, found: Any, reason: str) -> None:
        """Tell the watcher."""
        if self._watch:
            said = f"{self._argument}: {reason}" if self._argument and wanted is not None else reason
            self._watch(Mismatch(dict(self.nodes), dict(self.bindings), wanted, found, said))

    def _operation(self, pattern: Operation, subject: Any) -> Iterator[None]:
        if not isinstance(subject, Value):
            self.miss(pattern, subject, f"it is the attribute {show(subject)}, not a result")
            return
        node = subject.producer
        known = self.nodes.get(pattern)
        if known is not None:
            if known is node:
                yield
            else:
                self.miss(pattern, subject, f"it is %{node.name}, but the same result is %{known.name} elsewhere")
            return
        slots = pattern.slots.get(node.op)
        if slots is None:
            self.miss(pattern, subject, f"%{node.name} is {node.op.name}")
            return
        if pattern.closed and not leaves_out_nothing(node, slots):
            self.miss(pattern, subject, f"%{node.name} has further arguments")
            return
        for _ in self._described(pattern, subject):
            self.nodes[pattern] = node
            yield from self._arguments(slots, node)
            if pattern.commutes and len(slots) > 1:
                yield from self._arguments(exchanged(slots), node)
            del self.nodes[pattern]

    def _arguments(self, slots: Sequence[Slot], node: Node, start: int = 0) -> Iterator[None]:
        if start == len(slots):
            yield
            return
        slot = slots[start]
        found = fetch(node, slot)
        if not slot.given:
            # Defaults are plain attributes; comparing them here spares a generator each.
            if same(slot.default, found):
                yield from self._arguments(slots, node, start + 1)
            elif self._watch:
                left = f"the pattern leaves it at {show(slot.default)}"
                self._argument = f"argument {slot.name!r} of %{node.name}"
                self.miss(slot.pattern, node.result, f"it is {show(found)}; {left}")
            return
        if self._watch:
            name = repr(slot.name) if slot.name else str(slot.position)
            self._argument = f"argument {name} of %{node.name}"
        for _ in self.match(slot.pattern, found):
            yield from self._arguments(slots, node, start + 1)

    def _variable(self, variable: Variable, subject: Any) -> Iterator[None]:
        if variable.accepts and not accepts(variable.accepts, subject):
            if self._watch:
                kinds = " or ".join(t.__name__ for t in variable.accepts)
                self.miss(variable, subject, f"{variable.name} must be {kinds}, but it is {show(subject)}")
            return
        yield from self._described(variable, subject)

    def _either(self, pattern: Either, subject: Any) -> Iterator[None]:
        for _ in self._described(pattern, subject):
            for option in pattern.options:
                yield from self.match(option, subject)

    def _sequence(self, pattern: Sequence[Expression], subject: Any) -> Iterator[None]:
        open_ended = bool(pattern) and pattern[-1] is ...
        wanted = pattern[:-1] if open_ended else pattern
        if not isinstance(subject, list | tuple):
            self.miss(pattern, subject, f"it is {show(subject)}, not a list")
        elif len(subject) < len(wanted) or (len(subject) > len(wanted) and not open_ended):
            self.miss(pattern, subject, f"it has {len(subject)} elements, not {len(wanted)}")
        else:
            yield from self._each(wanted, subject)

    def _each(self, patterns: Sequence[Expression], subjects: Sequence[Any], start: int = 0) -> Iterator[None]:
        if start == len(patterns):
            yield
            return
        for _ in self.match(patterns[start], subjects[start]):
            yield from self._each(patterns, subjects, start + 1)

    def _described(self, pattern: Pattern, subject: Any) -> Iterator[None]:
        """Bind the pattern's name and check what its value has to be."""
        for _ in self._bound(pattern.name, pattern, subject) if pattern.name else (None,):
            if pattern.wanted is None:
                yield
            else:
                yield from self._having(pattern, pattern.wanted, subject)

    def _bound(self, name: str, pattern: Pattern, subject: Any) -> Iterator[None]:
        if name not in self.bindings:
            self.bindings[name] = subject
            yield
            del self.bindings[name]
        elif same(self.bindings[name], subject):
            yield
        elif self._watch:
            self.miss(pattern, subject, f"it is {show(subject)}, but {name} is {show(self.bindings[name])} elsewhere")

    def _having(self, pattern: Pattern, wanted: Having, subject: Any) -> Iterator[None]:
        kind = subject.type if isinstance(subject, Value) else None
        if not isinstance(kind, TensorType):
            self.miss(pattern, subject, f"{show(subject)} is no tensor")
        elif wanted.dtype not in (None, kind.dtype):
            self.miss(pattern, subject, f"its dtype is {kind.dtype}, not {wanted.dtype}")
        elif wanted.rank not in (None, kind.ndim):
            self.miss(pattern, subject, f"it has {kind.ndim} dimensions, not {wanted.rank}: {format_type(kind)}")
        elif wanted.uses not in (None, len(subject.uses)):
            self.miss(pattern, subject, f"it is read {len(subject.uses)} times, not {wanted.uses}")
        else:
            shape = ... if wanted.shape is None else wanted.shape
            for _ in self.match(shape, kind.shape):
                yield from self._placed(pattern, list((wanted.layout or {}).items()), subject, kind)

    def _placed(
        self, pattern: Pattern, wanted: list[tuple[str, Any]], subject: Value, kind: TensorType
    ) -> Iterator[None]:
        if not wanted:
            yield
            return
        (axis, placement), rest = wanted[0], wanted[1:]
        found = kind.layout[axis]
        if isinstance(placement, type) and issubclass(placement, Placement):
            placement = ... if isinstance(found, placement) else placement
        if isinstance(placement, type | Placement) and placement != found:
            name = placement.__name__ if isinstance(placement, type) else placement
            self.miss(pattern, subject, f"its layout along {axis} is {found}, not {name}")
            return
        for _ in self.match(placement, found):
            yield from self._placed(pattern, rest, subject, kind)

    def _further(self, patterns: Sequence[Pattern], found: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
        """The other roots: nodes that read, at the right distance, something that is bound already."""
        if not patterns:
            yield found
            return
        self._argument = ""
        near = self._nearest(patterns[0])
        nodes = list(dict.fromkeys(near[0].users)) if near is not None else []
        for _ in range(near[1] - 1 if near is not None else 0):
            nodes = list(dict.fromkeys(user for node in nodes for user in node.users))
        for node in nodes:
            if node in found or not node.results:
                continue
            self._argument = f"root {len(found) + 1}"
            for _ in self.match(patterns[0], node.result):
                yield from self._further(patterns[1:], (*found, node))

    def _nearest(self, pattern: Pattern) -> tuple[Value, int] | None:
        """The least nested part of a pattern that is bound, and how many operations are above it."""
        level, depth = [pattern], 0
        while level:
            parts = [option for part in level for option in options_of(part)]
            for part in parts if depth else ():
                value = self._value(part)
                if value is not None:
                    return value, depth
            level, depth = [child for part in parts for child in children(part)], depth + 1
        return None

    def _value(self, part: Expression) -> Value | None:
        if isinstance(part, Operation) and part in self.nodes:
            return self.nodes[part].result
        bound = self.bindings.get(part.name) if isinstance(part, Pattern) and part.name else None
        return bound if isinstance(bound, Value) else None

    def _closed(self, roots: tuple[Node, ...]) -> bool:
        """Whether no node outside the match reads what is inside it."""
        inside = set(self.nodes.values())
        for pattern, node in self.nodes.items():
            if pattern.reused or node in roots:
                continue
            outside = next((user for user in node.users if user not in inside), None)
            if outside is not None:
                self.miss(None, node.result, f"%{outside.name} reads %{node.name} too, which is inside the match")
                return False
        return True

    def _undisturbed(self, roots: tuple[Node, ...]) -> bool:
        """Whether nothing is written between the first and the last node: the replacement reads at one place."""
        if not self._writes or len(self.nodes) == 1:
            return True
        ordered = roots[0].graph.ordered(self.nodes.values())
        node: Node | None = ordered[0]
        while node is not None and node is not ordered[-1]:
            if node.op.has(Trait.MUTATES):
                self.miss(None, node.result, f"%{node.name} writes to an operand in between")
                return False
            node = node.next
        return True


__all__ = ["Matcher", "Mismatch", "Watcher"]
