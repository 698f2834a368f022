"""What rules did: tries, hits and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class RuleStatistics:
    """What one rule did.

    Args:
        tries: Nodes that it was compared with.
        hits: Rewrites.
        ms: Milliseconds spent on matching and rewriting.
    """

    tries: int = 0
    hits: int = 0
    ms: float = 0.0

    def add(self, other: RuleStatistics) -> None:
        """Add what the rule did in another run."""
        self.tries += other.tries
        self.hits += other.hits
        self.ms += other.ms


class RewriteStatistics:
    """What a run of rules did.

    Attributes:
        rules: By rule name, in the order in which they were given.
        rewrites: Rewrites in all.
        sweeps: Visits of the whole program.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.rules: dict[str, RuleStatistics] = {name: RuleStatistics() for name in names}
        self.rewrites = 0
        self.sweeps = 0

    def __getitem__(self, name: str) -> RuleStatistics:
        return self.rules[name]

    def __str__(self) -> str:
        width = max((len(name) for name in self.rules), default=0)
        lines = [f"{n:{width}}  {s.hits:6} of {s.tries:6}  {s.ms:9.1f} ms" for n, s in self.rules.items()]
        return "\n".join([f"{self.rewrites} rewrites in {self.sweeps} sweeps", *lines])


__all__ = ["RewriteStatistics", "RuleStatistics"]
