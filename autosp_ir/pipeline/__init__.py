"""Passes and the manager that runs them."""

from autosp_ir.pipeline import instrument as instruments
from autosp_ir.pipeline.analysis import Analysis
from autosp_ir.pipeline.base import Pass, PassContext, Remark
from autosp_ir.pipeline.bisect import bisect, command_judge
from autosp_ir.pipeline.bisection import Bisection
from autosp_ir.pipeline.catalogue import catalogue
from autosp_ir.pipeline.instrument import Instrument
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.pipeline.registry import (
    failed_passes,
    format_pipeline,
    get_pass,
    parse_pipeline,
    register_pass,
    registered_passes,
)
from autosp_ir.pipeline.replay import Replay, reproduce
from autosp_ir.pipeline.rule_pass import RulePass
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE
from autosp_ir.pipeline.trace import PassRecord, Trace

__all__ = [
    "DEFAULT_PIPELINE",
    "Analysis",
    "Bisection",
    "Instrument",
    "Pass",
    "PassContext",
    "PassManager",
    "PassRecord",
    "PassResult",
    "Remark",
    "Replay",
    "RulePass",
    "Trace",
    "bisect",
    "catalogue",
    "command_judge",
    "failed_passes",
    "format_pipeline",
    "get_pass",
    "instruments",
    "parse_pipeline",
    "register_pass",
    "registered_passes",
    "reproduce",
]
