"""What a pipeline did: one record per pass, with every rewrite it made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from autosp_ir.rewrite.events import RewriteEvent
from autosp_ir.rewrite.statistics import RuleStatistics


@dataclass
class PassRecord:
    """What one pass did.

    Args:
        name: The pass.
        text: The pass with its options, as in a pipeline.
        modified: Whether the program's structural hash changed.
        seconds: Time in `run`, without verification and instruments.
        hash: Structural hash of the program afterwards.
        statistics: What the pass counted; the hits of its rules among it.
        rules: Tries, hits and milliseconds of its rules, by name.
        rewrites: Its rewrites, in order.
    """

    name: str
    text: str
    modified: bool = False
    seconds: float = 0.0
    hash: str = ""
    statistics: dict[str, int] = field(default_factory=dict)
    rules: dict[str, RuleStatistics] = field(default_factory=dict)
    rewrites: list[RewriteEvent] = field(default_factory=list)


@dataclass
class Trace:
    """The records of a run, in pipeline order."""

    records: list[PassRecord] = field(default_factory=list)

    @property
    def rewrites(self) -> Iterator[RewriteEvent]:
        """Every rewrite of every pass, in order."""
        for record in self.records:
            yield from record.rewrites

    def record(self, name: str) -> PassRecord | None:
        """The last record of the pass called `name`."""
        return next((r for r in reversed(self.records) if r.name == name), None)

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        return "\n".join(
            f"{r.text}: {'modified' if r.modified else 'unchanged'}, "
            f"{len(r.rewrites)} rewrites, {r.seconds * 1e3:.1f} ms"
            for r in self.records
        )
