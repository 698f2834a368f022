"""Passes and the manager that runs them."""

from autosp_ir.pipeline.analysis import Analysis
from autosp_ir.pipeline.base import Pass, PassContext, Remark
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE

__all__ = ["DEFAULT_PIPELINE", "Analysis", "Pass", "PassContext", "Remark"]
