"""Rewriting rules: a pattern, what has to hold of its variables, and what replaces it.

```python
@air.rule("drop-double-transpose")
def double_transpose(op, x, a, b):
    return op.aten.transpose.int(op.aten.transpose.int(x, a, b), a, b)


@double_transpose.replacement
def _(x):
    return x
```
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import autosp_ir.comm.attention
import autosp_ir.comm.chunks
import autosp_ir.comm.ops  # noqa: F401  # all register the autosp operators
from autosp_ir.errors import RuleError, UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import OpDef
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.matching import Matcher, Watcher
from autosp_ir.rewrite.pattern import Operation, Pattern, depth_of, operations_of, options_of, variables_of
from autosp_ir.rewrite.tracing import trace

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Match:
    """Where a rule matches, and what its variables stand for.

    Args:
        program: The program.
        roots: The nodes of the pattern's roots, in the pattern's order.
        nodes: Every node that the pattern matched, in program order.
        bindings: The variables: values, attributes, and what `let` made of them.
        anchor: In front of which node the replacement goes.
    """

    program: Program
    roots: tuple[Node, ...]
    nodes: tuple[Node, ...]
    bindings: dict[str, Any]
    anchor: Node

    @property
    def root(self) -> Node:
        """The node of the first root."""
        return self.roots[0]

    @property
    def in_order(self) -> bool:
        """Whether the roots come in the program in the order in which the pattern returns them."""
        return self.root.graph.ordered(self.roots) == list(self.roots)


@dataclass(frozen=True)
class Condition:
    """What has to hold of a match: a predicate (`binds` is None), or a variable that must have a value."""

    reason: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    binds: str | None = None


class Rule:
    """A rewriting rule; made by `air.rule`.

    Args:
        name: Its name in traces, statistics and errors.
        pattern: The pattern function.
        roots: The pattern: one operation, or several that are replaced together.

    Attributes:
        location: `file:line` of the pattern function.
        doc: Its docstring.
        conditions: What has to hold of a match, in the order in which it is asked.
        depth: How many operations are nested in the pattern.
        pattern_operations: All of them.
    """

    def __init__(self, name: str, pattern: Callable[..., Any], roots: Sequence[Pattern]) -> None:
        self.name = name
        self.roots = tuple(roots)
        self.location = location_of(pattern)
        self.doc = inspect.getdoc(pattern)
        self.conditions: list[Condition] = []
        self.depth = max(depth_of(root) for root in roots)
        self.pattern_operations = tuple(dict.fromkeys(inner for root in roots for inner in operations_of(root)))
        self.builder: Callable[..., Any] | None = None
        self.builder_parameters: tuple[str, ...] = ()
        self._variables = {name for root in roots for name in variables_of(root)}
        for reserved in ("op", "match", "rewriter"):
            if reserved in self._variables:
                raise self.error(f"a variable cannot be called {reserved!r}", "choose another name")

    @property
    def operations(self) -> frozenset[OpDef]:
        """The operations that the first root may be; rules are looked up by them."""
        options = options_of(self.roots[0])
        return frozenset(op for option in options if isinstance(option, Operation) for op in option.slots)

    @property
    def size(self) -> int:
        """How many operations the pattern has."""
        return len(self.pattern_operations)

    def where(self, reason: str) -> Callable[[Function], Function]:
        """Decorate a predicate over variables: True, or False, or text that says why not.

        Args:
            reason: What does not hold when it answers False, for `air.explain`.
        """
        return self._condition(reason, None)

    def let(self, name: str, reason: str) -> Callable[[Function], Function]:
        """Decorate a function of variables whose result becomes the variable `name`; None is no match.

        Args:
            name: The new variable, for later conditions and the replacement.
            reason: What does not hold when it answers None, for `air.explain`.
        """
        return self._condition(reason, name)

    def replacement(self, function: Function) -> Function:
        """Decorate the function that makes the replacement from the variables it names.

        `op` makes nodes as in the pattern, `match` is the whole `Match`, `rewriter` is for everything else. It returns
        one value for each root, a tuple if there are several; None keeps a root that it changed in place.
        """
        self.builder_parameters = self._parameters(function, ("op", "match", "rewriter"))
        self.builder = function
        return function

    def match(self, node: Node, program: Program, watch: Watcher | None = None, *, writes: bool = True) -> Match | None:
        """Match at a node.

        Args:
            node: What the first root has to be.
            program: Its program.
            watch: Called with each mismatch.
            writes: Whether the program may have nodes that write to their operands; looking for them takes time.

        Returns:
            The first match whose conditions hold, or None.

        Raises:
            RuleError: A condition failed, other than by answering no.
        """
        if not node.results:
            return None
        matcher = Matcher(watch, writes)
        for roots in matcher.roots(self.roots, node.result):
            bindings = dict(matcher.bindings)
            anchor = anchor_of(roots, bindings.values())
            if anchor is None:
                matcher.miss(
                    None, node.result, "no place lies behind what the replacement reads and before its readers"
                )
                continue
            nodes = tuple(node.graph.ordered(matcher.nodes.values()))
            found = Match(program, roots, nodes, bindings, anchor)
            if all(self._holds(condition, found, matcher) for condition in self.conditions):
                return found
        return None

    def call(self, what: str, function: Callable[..., Any], parameters: Iterable[str], scope: dict[str, Any]) -> Any:
        """Call one of the rule's functions with the variables that it names.

        Raises:
            RuleError: It failed. UnsupportedError is passed on: it is about the program.
        """
        try:
            return function(*(scope.get(name) for name in parameters))
        except (RuleError, UnsupportedError):
            raise
        except Exception as error:  # whatever a rule raises must name the rule
            reason = getattr(error, "reason", str(error))
            made = self.error(
                f"{what} ({location_of(function)}) failed: {type(error).__name__}: {reason}",
                getattr(error, "hint", None) or "ask for what it relies on with having() or where()",
                scope["match"].root,
            )
            raise made from error

    def error(self, reason: str, hint: str, node: Node | None = None) -> RuleError:
        """An error that names the rule."""
        return RuleError(f"the rule {self.name!r} ({self.location}): {reason}", node=node, hint=hint)

    def __repr__(self) -> str:
        return f"<rule {self.name}: {', '.join(map(str, self.roots))}>"

    def _condition(self, reason: str, binds: str | None) -> Callable[[Function], Function]:
        def decorate(function: Function) -> Function:
            self.conditions.append(Condition(reason, function, self._parameters(function, ("match",)), binds))
            if binds is not None:
                self._variables.add(binds)
            return function

        return decorate

    def _parameters(self, function: Callable[..., Any], special: tuple[str, ...]) -> tuple[str, ...]:
        wanted = tuple(inspect.signature(function).parameters)
        for name in wanted:
            if name in self._variables or name in special:
                continue
            close = difflib.get_close_matches(name, sorted(self._variables), n=1)
            known = ", ".join(sorted(self._variables))
            hint = f"did you mean {close[0]!r}?" if close else f"the variables are {known}"
            raise self.error(f"the function at {location_of(function)} asks for {name!r}, which is no variable", hint)
        return wanted

    def _holds(self, condition: Condition, found: Match, matcher: Matcher) -> bool:
        what = f"the condition {condition.reason!r}"
        answer = self.call(what, condition.function, condition.parameters, {**found.bindings, "match": found})
        if condition.binds is not None and answer is not None:
            found.bindings[condition.binds] = answer
            return True
        if condition.binds is None and not isinstance(answer, bool | str):
            raise self.error(f"{what} answered {answer!r}", "return True, False, or text that says why not", found.root)
        if answer is True:
            return True
        said = f"{condition.reason}: {answer}" if isinstance(answer, str) else condition.reason
        matcher.miss(None, found.root.result, said)
        return False


def rule(name: str) -> Callable[[Callable[..., Any]], Rule]:
    """Make a rewriting rule of a pattern function: `@air.rule("drop-double-transpose")`.

    The function takes `op` and the pattern's variables and returns the expression to look for, as in
    `op.aten.neg(op.aten.neg(x))`; a tuple of expressions is replaced together. Decorate what replaces it with
    `.replacement`, and what has to hold with `.where` and `.let`.

    Args:
        name: For traces, statistics and errors.

    Raises:
        RuleError: An operation is unknown (with a suggestion) or does not take the arguments of the pattern.
    """

    def decorate(function: Callable[..., Any]) -> Rule:
        try:
            return Rule(name, function, trace(function))
        except RuleError as error:
            reason = f"the rule {name!r} ({location_of(function)}): {error.reason}"
            raise RuleError(reason, hint=error.hint) from None

    return decorate


def anchor_of(roots: tuple[Node, ...], bound: Iterable[Any]) -> Node | None:
    """In front of which node the replacement can go: it reads what is bound, and the roots' readers read it."""
    graph = roots[0].graph
    first, *others = ordered = graph.ordered(roots)
    if not others:
        return first
    read = [v.producer for v in bound if isinstance(v, Value) and v.producer not in roots]
    if not read or graph.ordered([*read, first])[-1] is first:
        return first
    last = ordered[-1]
    readers = [user for root in ordered[:-1] for user in root.users if user not in roots]
    return last if graph.ordered([last, *readers])[0] is last else None


def location_of(function: Callable[..., Any]) -> str:
    """`file:line` of a function."""
    code = getattr(function, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code is not None else repr(function)


__all__ = ["Condition", "Match", "Rule", "location_of", "rule"]
