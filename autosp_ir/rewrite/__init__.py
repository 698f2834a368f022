"""Rewriting: the rewriter that owns every mutation, rules and their driver, and a builder for programs in tests."""

from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.rewrite.driver import apply_rules
from autosp_ir.rewrite.events import Listener, RewriteEvent
from autosp_ir.rewrite.explain import Explanation, explain
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.rewrite.rules import Match, Rule, rule
from autosp_ir.rewrite.statistics import RewriteStatistics, RuleStatistics

__all__ = [
    "Explanation",
    "Listener",
    "Match",
    "ProgramBuilder",
    "RewriteEvent",
    "RewriteStatistics",
    "Rewriter",
    "Rule",
    "RuleStatistics",
    "apply_rules",
    "explain",
    "rule",
]
