"""Rewriting: the rewriter that owns every mutation, its events, and a builder for programs in tests."""

from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.rewrite.events import Listener, RewriteEvent
from autosp_ir.rewrite.rewriter import Rewriter

__all__ = ["Listener", "ProgramBuilder", "RewriteEvent", "Rewriter"]
