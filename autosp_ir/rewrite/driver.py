"""The greedy driver: applies rules until none matches any more.

Its semantics:

- *Order.* Nodes are visited from a queue, which starts with the whole program in program order. At a node the rules
  are tried in the order in which they were given; the first that matches is applied.
- *Revisiting.* After a rewrite these go to the end of the queue, unless they wait in it already: the nodes it made, a
  root that it changed in place, nodes downstream of them as far as the deepest pattern reaches, and the other readers
  of values that lost a reader.
- *Fixpoint.* When the queue is empty after a rewrite, all nodes are visited once more: the driver returns only after a
  visit of the whole program that rewrites nothing.
- *Termination.* A rewrite that makes again what it or an earlier rewrite of the same value replaced raises at once;
  more than `max_rewrites` raise too. Both name the rules.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from autosp_ir.errors import RuleError, TerminationError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import OpDef, Trait
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.application import apply_rule
from autosp_ir.rewrite.lineage import Lineages
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.rewrite.rules import Match, Rule
from autosp_ir.rewrite.statistics import RewriteStatistics

_LEAST_BOUND = 1000
_REWRITES_PER_NODE = 10


class RewriteContext(Protocol):
    """What `apply_rules` needs of a pass's context."""

    def rewriter(self, program: Program) -> Rewriter:
        """A rewriter that signs with the pass's name."""
        ...

    def count_rules(self, statistics: RewriteStatistics) -> None:
        """Add to the pass's statistics."""
        ...


def apply_rules(
    rules: Sequence[Rule],
    program: Program,
    within: Rewriter | RewriteContext | None = None,
    *,
    max_rewrites: int | None = None,
) -> RewriteStatistics:
    """Apply rules to a program, in place, until none matches; `driver` says in which order.

    Args:
        rules: The rules; an earlier one is tried first.
        program: The program; nested graphs are left alone.
        within: The rewriter to use, or the context of the pass that is running; None makes a rewriter.
        max_rewrites: How many rewrites are too many; by default ten for each node, and at least a thousand.

    Returns:
        Tries, hits and milliseconds of each rule. A context gets them too.

    Raises:
        TerminationError: Rules undo each other, or there are more than `max_rewrites` rewrites.
        RuleError: A rule is incomplete, or its replacement does not fit. UnsupportedError from a rule.
    """
    if within is None:
        within = Rewriter(program)
    rewriter = within if isinstance(within, Rewriter) else within.rewriter(program)
    if rewriter.program is not program:
        raise RuleError("the rewriter is of another program", hint="make it with ctx.rewriter(program)")
    driver = GreedyDriver(rules, rewriter, max_rewrites)
    try:
        driver.run()
    finally:
        if not isinstance(within, Rewriter):
            within.count_rules(driver.statistics)
    return driver.statistics


class GreedyDriver:
    """One run of rules over a program.

    Args:
        rules: The rules.
        rewriter: Of the program.
        max_rewrites: How many rewrites are too many; see `apply_rules`.
    """

    def __init__(self, rules: Sequence[Rule], rewriter: Rewriter, max_rewrites: int | None = None) -> None:
        _check(rules)
        self.statistics = RewriteStatistics([rule.name for rule in rules])
        self._rewriter = rewriter
        self._graph = rewriter.graph
        least = max(_LEAST_BOUND, _REWRITES_PER_NODE * len(rewriter.graph))
        self._bound = least if max_rewrites is None else max_rewrites
        self._reach = max((rule.depth for rule in rules), default=0)
        self._most_inside = max((rule.size for rule in rules), default=0)
        self._inside = {op for rule in rules for inner in rule.pattern_operations for op in inner.slots}
        self._by_op: dict[OpDef, list[Rule]] = {}
        for rule in rules:
            for op in rule.operations:
                self._by_op.setdefault(op, []).append(rule)
        self._queue: deque[Node] = deque()
        self._waiting: set[Node] = set()
        self._lineages = Lineages()
        self._writes = any(node.op.has(Trait.MUTATES) for node in self._graph.nodes)

    def run(self) -> None:
        """Rewrite until a visit of the whole program rewrites nothing.

        Raises:
            TerminationError: That does not happen.
        """
        settled = -1
        while settled != self.statistics.rewrites:
            settled = self.statistics.rewrites
            self.statistics.sweeps += 1
            self._enqueue(self._graph.nodes)
            while self._queue:
                node = self._queue.popleft()
                self._waiting.discard(node)
                if not node.erased:
                    self._visit(node)
        self._rewriter.finish()

    def _visit(self, node: Node) -> None:
        for rule in self._by_op.get(node.op, ()):
            counted = self.statistics.rules[rule.name]
            started = time.perf_counter()
            match = rule.match(node, self._rewriter.program, writes=self._writes)
            if match is not None and not self._rewriter.allows(match.root, rule.name, location=rule.location):
                match = None
            if match is not None:
                self._apply(rule, match)
                counted.hits += 1
            counted.tries += 1
            counted.ms += (time.perf_counter() - started) * 1e3
            if match is not None:
                return

    def _apply(self, rule: Rule, match: Match) -> None:
        if self.statistics.rewrites >= self._bound:
            raise self._endless(rule, match.root)
        before = [self._lineages.key(root.result) for root in match.roots]
        read = [value for node in match.nodes for value in node.operands]
        first_new = self._graph.next_id
        made = apply_rule(rule, match, self._rewriter)
        self.statistics.rewrites += 1
        created = self._created(made, first_new)
        self._writes = self._writes or any(node.op.has(Trait.MUTATES) for node in created)
        self._lineages.note_created(created)
        in_place = all(new is None for new in made)
        for root, new, key in zip(match.roots, made, before, strict=True):
            if new is None and not in_place:
                continue
            undone = self._lineages.step(rule.name, key, root, new, created)
            if undone:
                raise self._undone(undone, root if new is None else new.producer)
        self._revisit(match, made, created, read)

    def _created(self, made: Iterable[Value | None], first_new: int) -> list[Node]:
        """The nodes that a rewrite made, operands first."""
        found: dict[Node, None] = {}
        pending = [value.producer for value in made if value is not None]
        while pending:
            node = pending.pop()
            if node.id >= first_new and node not in found:
                found[node] = None
                pending.extend(value.producer for value in node.operands)
        return self._graph.ordered(found)

    def _revisit(
        self, match: Match, made: Sequence[Value | None], created: Iterable[Node], read: Iterable[Value]
    ) -> None:
        changed = [*(root for root in match.roots if not root.erased), *created]
        changed += [user for value in made if value is not None for user in value.users]
        reach = dict.fromkeys(changed)
        level = list(reach)
        for _ in range(self._reach):
            level = [user for node in level for user in node.users if user not in reach]
            reach.update(dict.fromkeys(level))
        for value in dict.fromkeys(read):
            # With more readers than a pattern has operations it cannot be inside a match anyway.
            if not value.producer.erased and value.producer.op in self._inside:
                users = value.users
                reach.update(dict.fromkeys(users if len(users) <= self._most_inside else ()))
        self._enqueue(self._graph.ordered(reach))

    def _enqueue(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.op in self._by_op and node not in self._waiting and not node.erased:
                self._waiting.add(node)
                self._queue.append(node)

    def _undone(self, names: Sequence[str], node: Node) -> TerminationError:
        distinct = [name for name in self.statistics.rules if name in names]
        if len(distinct) == 1:
            reason = f"the rule {distinct[0]!r} makes again what it replaced"
            hint = "let a where() refuse what the rule itself makes"
        else:
            *most, last = map(repr, distinct)
            reason = f"the rules {', '.join(most)} and {last} undo each other"
            hint = "drop one of them, or let a where() refuse what the other makes"
        return TerminationError(f"{reason}; at %{node.name} this would never end", node=node, hint=hint)

    def _endless(self, rule: Rule, node: Node) -> TerminationError:
        recent = self._lineages.recent()
        names = ", ".join(f"{name!r} ({n}x)" for name, n in recent) or repr(rule.name)
        return TerminationError(
            f"{self._bound} rewrites did not reach a fixpoint; the last ones were by {names}",
            node=node,
            hint="let a where() refuse what the rule itself makes, or give a larger max_rewrites",
        )


def _check(rules: Sequence[Rule]) -> None:
    names: dict[str, Rule] = {}
    for rule in rules:
        if not isinstance(rule, Rule):
            raise RuleError(f"{rule!r} is no rule", hint='decorate a pattern function with air.rule("my-rule")')
        other = names.setdefault(rule.name, rule)
        if other is not rule:
            raise rule.error(f"the rule at {other.location} has the same name", "rename one of them")
        if rule.builder is None:
            raise rule.error("it has no replacement", "decorate one with .replacement")


__all__ = ["GreedyDriver", "RewriteContext", "apply_rules"]
