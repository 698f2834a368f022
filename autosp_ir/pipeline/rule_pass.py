"""Passes that consist of rewriting rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.driver import apply_rules
from autosp_ir.rewrite.rules import Rule


class RulePass(Pass):
    """A pass that applies rules until none matches, then erases what nothing reads.

    A subclass sets `name` and `rules`; `air.register_pass("tidy", stage="joint", rules=[…])` makes one.

    Attributes:
        rules: The rules; an earlier one is tried first.
        max_rewrites: How many rewrites are too many; see `air.apply_rules`.
    """

    rules: ClassVar[Sequence[Rule]] = ()
    max_rewrites: ClassVar[int | None] = None

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            TerminationError: The rules do not come to an end. RuleError when one does not fit.
        """
        rewriter = ctx.rewriter(program)
        ctx.count_rules(apply_rules(self.rules, program, rewriter, max_rewrites=self.max_rewrites))
        rewriter.dead_code()


__all__ = ["RulePass"]
