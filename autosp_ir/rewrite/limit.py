"""A limit on rewrites: from a number on, the places that passes offer to rewrite are left alone.

Bisection looks for the first rewrite that makes a program wrong by running a pipeline under one limit after another.
What is counted is a *site*: one application of a rule, or one place that an imperative pass asks about with
`rewriter.allows`. A pass that asks for nothing is rewritten, or not, as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autosp_ir.ir.graph import Node


@dataclass(frozen=True)
class Site:
    """A place that a pass was allowed to rewrite.

    Args:
        index: Its number in the run, counted from 1.
        pass_name: The pass.
        rule: Name of the rule, or `file:line` of the code that asked.
        location: `file:line` of the rule or of the code that asked.
        node: Name of the node.
        source: The model's source line that the node comes from.
    """

    index: int
    pass_name: str
    rule: str
    location: str
    node: str
    source: str | None = None

    def __str__(self) -> str:
        rule = self.rule if self.rule == self.location else f"{self.rule} ({self.location})"
        source = f"   # {self.source}" if self.source else ""
        return f"rewrite {self.index} of {self.pass_name}: {rule} at %{self.node}{source}"


@dataclass
class RewriteLimit:
    """Lets the first `limit` sites of a run be rewritten, and notes them.

    Args:
        limit: How many; None allows all.
        sites: Those allowed so far.
        refused: Whether a site was left alone.
    """

    limit: int | None = None
    sites: list[Site] = field(default_factory=list)
    refused: bool = False

    def allows(self, node: Node, pass_name: str, rule: str | None, location: str) -> bool:
        """Ask for one site; the answer counts, so ask once per site."""
        if self.limit is not None and len(self.sites) >= self.limit:
            self.refused = True
            return False
        index = len(self.sites) + 1
        self.sites.append(Site(index, pass_name, rule or location, location, node.name, node.origin.source))
        return True


__all__ = ["RewriteLimit", "Site"]
