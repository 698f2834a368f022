"""Instruments: hooks around passes that watch a run and never change the program."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.verify import effect_order, verify_program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.trace import PassRecord, Trace
from autosp_ir.rewrite.events import RewriteEvent
from autosp_ir.rewrite.statistics import RuleStatistics


class Instrument:
    """Override the hooks you need; each must leave the program as it is."""

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Called once, on the clone that the passes will rewrite."""

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Called before each pass."""

    def on_rewrite(self, event: RewriteEvent) -> None:
        """Called after each rewrite."""

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Called after each pass that succeeded, before the program is verified."""

    def after_pipeline(self, program: Program, trace: Trace) -> None:
        """Called once, when every pass succeeded."""


class Verify(Instrument):
    """Verifies the program before the first pass and after each pass that changed it."""

    def __init__(self) -> None:
        self._facts: frozenset[str] = frozenset()
        self._stage = Stage.FORWARD
        self._effects: tuple[str, ...] = ()

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Verify the input, so that no pass is blamed for it."""
        program.verify()

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Note facts, stage and the order of effects."""
        self._facts = frozenset(program.facts)
        self._stage = program.stage
        self._effects = effect_order(program)

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Verify what the pass left."""
        if not record.modified and self._facts == program.facts:
            return
        # A pass that produces another stage makes a new graph, whose effects have other names.
        verify_program(program, before=self._effects if program.stage is self._stage else None)


class Timing(Instrument):
    """Adds up seconds and runs by pass, over every pipeline it is given to.

    Attributes:
        seconds: By pass.
        runs: By pass.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.runs: Counter[str] = Counter()

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Add the pass's time."""
        self.seconds[record.name] += record.seconds
        self.runs[record.name] += 1

    def __str__(self) -> str:
        width = max((len(n) for n in self.seconds), default=0)
        return "\n".join(
            f"{n:{width}}  {s * 1e3:9.1f} ms  {self.runs[n]}x"
            for n, s in sorted(self.seconds.items(), key=lambda item: -item[1])
        )


class Statistics(Instrument):
    """Counts operations, and what each pass added and removed.

    Attributes:
        changes: Per pass, in order: its name and the change in the number of nodes by operation.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[str, dict[str, int]]] = []
        self._before: Counter[str] = Counter()

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Count operations."""
        self._before = _operations(program)

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Compare the counts."""
        after = _operations(program)
        changed = {op: after[op] - self._before[op] for op in sorted(after | self._before)}
        self.changes.append((record.name, {op: n for op, n in changed.items() if n}))

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: {', '.join(f'{n:+d} {op}' for op, n in change.items()) or 'no change'}"
            for name, change in self.changes
        )


class Rules(Instrument):
    """Adds up tries, hits and milliseconds of rewriting rules, over every pipeline it is given to.

    Attributes:
        done: By pass and rule.
    """

    def __init__(self) -> None:
        self.done: dict[tuple[str, str], RuleStatistics] = {}

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Add what the pass's rules did."""
        for name, done in record.rules.items():
            self.done.setdefault((record.name, name), RuleStatistics()).add(done)

    def __str__(self) -> str:
        rows = sorted(self.done.items(), key=lambda row: -row[1].ms)
        return "\n".join(f"{p}  {rule}  {s.hits} of {s.tries}  {s.ms:.1f} ms" for (p, rule), s in rows)


class PrintIR(Instrument):
    """Writes the program to numbered files: `00-input.ir`, then one per pass that changed it.

    Args:
        folder: Made when missing.
        unchanged: Also after passes that changed nothing.
    """

    def __init__(self, folder: str | Path, *, unchanged: bool = False) -> None:
        self.folder = Path(folder)
        self.unchanged = unchanged
        self._step = 0

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Write the input."""
        self._step = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("input", program)

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Write what the pass left."""
        self._step += 1
        if record.modified or self.unchanged:
            self._write(record.name, program)

    def _write(self, name: str, program: Program) -> None:
        (self.folder / f"{self._step:02d}-{name}.ir").write_text(f"{program}\n", encoding="utf-8")


def _operations(program: Program) -> Counter[str]:
    return Counter(node.op.name for node in program.graph.nodes)


__all__ = ["Instrument", "PrintIR", "Rules", "Statistics", "Timing", "Verify"]
