"""Why a rule does not fire: the best partial match, and what ended it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from autosp_ir.errors import RuleError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.matching import Mismatch
from autosp_ir.rewrite.pattern import Operation, show
from autosp_ir.rewrite.rules import Match, Rule


@dataclass(frozen=True)
class Explanation:
    """What became of a rule in a program; `str` is a report.

    Args:
        rule: The rule.
        matches: Where it matches.
        candidates: How many nodes its pattern could start at.
        at: The node where the best partial match starts; None when it matches or there are no candidates.
        mismatch: What ended the best partial match.
        note: What else the program has.
    """

    rule: Rule
    matches: list[Match] = field(default_factory=list)
    candidates: int = 0
    at: Node | None = None
    mismatch: Mismatch | None = None
    note: str = ""

    @property
    def fires(self) -> bool:
        """Whether the rule matches somewhere."""
        return bool(self.matches)

    @property
    def reason(self) -> str:
        """Why the rule does not fire, in one sentence; empty when it does."""
        if self.fires:
            return ""
        return self.mismatch.reason if self.mismatch is not None else self.note

    def __str__(self) -> str:
        head = [f"rule {self.rule.name!r} ({self.rule.location})"]
        head += [f"looks for  {root}" for root in self.rule.roots]
        return "\n".join([*head, *(self._matched() if self.fires else self._missed())])

    def _matched(self) -> list[str]:
        lines = [f"It matches {_times(len(self.matches), 'time')}."]
        for match in self.matches[:3]:
            lines += [*_lines(match.nodes), *_bindings(match.bindings)]
        return lines

    def _missed(self) -> list[str]:
        if self.mismatch is None or self.at is None:
            return [f"It cannot start anywhere: {self.note}."]
        mismatch, total = self.mismatch, self.rule.size
        found = mismatch.found.producer if isinstance(mismatch.found, Value) else None
        lines = [
            f"It could start at {_times(self.candidates, 'node')} and matches at none.",
            f"Best partial match: {len(mismatch.nodes)} of {_times(total, 'operation')}, from %{self.at.name}",
        ]
        for pattern, node in sorted(mismatch.nodes.items(), key=lambda item: item[1].id):
            lines += [*_lines([node]), f"          is {pattern}"]
        lines += _bindings(mismatch.bindings)
        if found is not None and found not in mismatch.nodes.values():
            lines += ["Stopped at", found.describe(0)]
        if mismatch.wanted is not None and isinstance(mismatch.wanted, Operation):
            lines.append(f"which is not {mismatch.wanted}")
        return [*lines, f"Reason: {mismatch.reason}."]


def explain(rule: Rule, program: Program, node: Node | Value | str | None = None) -> Explanation:
    """Say where a rule matches, or why it does not: the best partial match and what ended it.

    Args:
        rule: The rule.
        program: The program, as it would be when the rule runs; it is not changed.
        node: Look at this node only, by itself, its value or its name.

    Returns:
        An explanation; print it.

    Raises:
        RuleError: A condition of the rule failed, or `rule` is none. VerifyError: no value has that name.
    """
    if not isinstance(rule, Rule):
        raise RuleError(f"{rule!r} is no rule", hint='decorate a pattern function with air.rule("my-rule")')
    asked = _node(program, node)
    nodes = [asked] if asked is not None else list(program.graph.nodes)
    candidates = [n for n in nodes if n.op in rule.operations]
    matches: list[Match] = []
    best: tuple[int, Node, Mismatch] | None = None
    for candidate in candidates:
        seen: list[Mismatch] = []
        match = rule.match(candidate, program, seen.append)
        if match is not None:
            matches.append(match)
            continue
        for mismatch in seen:
            score = len(mismatch.nodes) * 2 + (mismatch.wanted is None)
            if best is None or score > best[0]:
                best = (score, candidate, mismatch)
    if matches or best is None:
        return Explanation(rule, matches, len(candidates), note=_absent(rule, asked, program))
    return Explanation(rule, matches, len(candidates), best[1], best[2])


def _node(program: Program, node: Node | Value | str | None) -> Node | None:
    if isinstance(node, str):
        return program.graph.value(node).producer
    return node.producer if isinstance(node, Value) else node


def _absent(rule: Rule, asked: Node | None, program: Program) -> str:
    """Why the pattern cannot start anywhere, and what comes near."""
    wanted = sorted(op.name for op in rule.operations)
    if asked is not None:
        return f"%{asked.name} is {asked.op.name}, not {' or '.join(wanted)}"
    bases = {_base(name) for name in wanted}
    near = Counter(n.op.name for n in program.graph.nodes if _base(n.op.name) in bases)
    others = f", though {', '.join(f'{name} ({n}x)' for name, n in near.most_common(4))}" if near else ""
    return f"the program has no {' or '.join(wanted)}{others}"


def _base(name: str) -> str:
    """`add` for `aten.add.Tensor`, `aten.add_.Tensor` and `operator.add`."""
    parts = name.split(".")
    return (parts[1] if len(parts) > 1 else name).strip("_")


def _lines(nodes: Iterable[Node]) -> list[str]:
    """IR lines, each with the model's source line as a comment."""
    return [node.describe(0).splitlines()[0] for node in nodes]


def _bindings(bindings: dict[str, Any]) -> list[str]:
    shown = ", ".join(f"{name} = {show(value)}" for name, value in bindings.items())
    return [f"with {shown}"] if shown else []


def _times(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


__all__ = ["Explanation", "explain"]
