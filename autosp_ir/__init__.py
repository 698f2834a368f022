"""Sequence-parallel training as composable passes over a small dataflow IR.

Example:
    >>> step = autosp_ir.parallelize(model, batch)  # under torchrun: one sequence over all ranks
    >>> program = autosp_ir.capture(model, batch)  # or pass by pass
    >>> result = autosp_ir.PassManager("canonicalize,token-partition,ulysses").run(program, mesh={"sp": 4})
    >>> simulated = autosp_ir.simulate(result.program, batch)
"""

from autosp_ir import doctor, instruments, testing
from autosp_ir.analysis.liveness import liveness
from autosp_ir.analysis.token_axis import token_factors
from autosp_ir.capture.fx_import import import_graph
from autosp_ir.capture.program import capture
from autosp_ir.comm.rules.base import rule as layout_rule
from autosp_ir.emit.parallelize import emit, parallelize
from autosp_ir.errors import (
    AutoSPError,
    CaptureError,
    DeadlockError,
    ImportGraphError,
    LayoutError,
    NonFiniteError,
    ParseError,
    PassError,
    PipelineError,
    RankFailureError,
    RuleError,
    RuntimeMismatchError,
    SimulationError,
    TerminationError,
    UnsupportedError,
    VerifyError,
)
from autosp_ir.ir.graph import Graph, Node, Origin, Phase, Value
from autosp_ir.ir.ops import OpDef, Trait, register_op
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage
from autosp_ir.ir.text import parse
from autosp_ir.ir.types import Invariant, Layout, Partial, Placement, Replicate, Shard, TensorType
from autosp_ir.pipeline import (
    DEFAULT_PIPELINE,
    Analysis,
    Bisection,
    Pass,
    PassContext,
    PassManager,
    PassResult,
    Remark,
    Replay,
    RulePass,
    Trace,
    bisect,
    catalogue,
    failed_passes,
    format_pipeline,
    get_pass,
    parse_pipeline,
    register_pass,
    registered_passes,
    reproduce,
)
from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.rewrite.driver import apply_rules
from autosp_ir.rewrite.explain import explain
from autosp_ir.rewrite.pattern import Pattern
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.rewrite.rules import Match, Rule, rule
from autosp_ir.rewrite.strategies import (
    attention_arguments,
    replace_attention,
    token_positions,
    unresolved_attention,
)
from autosp_ir.sim.lockstep import Simulation, simulate

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PIPELINE",
    "Analysis",
    "AutoSPError",
    "Bisection",
    "CaptureError",
    "DeadlockError",
    "Graph",
    "ImportGraphError",
    "InputKind",
    "InputSpec",
    "Invariant",
    "Layout",
    "LayoutError",
    "Match",
    "Node",
    "NonFiniteError",
    "OpDef",
    "Origin",
    "OutputKind",
    "OutputSpec",
    "ParseError",
    "Partial",
    "Pass",
    "PassContext",
    "PassError",
    "PassManager",
    "PassResult",
    "Pattern",
    "Phase",
    "PipelineError",
    "Placement",
    "Program",
    "ProgramBuilder",
    "RankFailureError",
    "Remark",
    "Replay",
    "Replicate",
    "Rewriter",
    "Rule",
    "RuleError",
    "RulePass",
    "RuntimeMismatchError",
    "Shard",
    "Signature",
    "Simulation",
    "SimulationError",
    "Stage",
    "TensorType",
    "TerminationError",
    "Trace",
    "Trait",
    "UnsupportedError",
    "Value",
    "VerifyError",
    "apply_rules",
    "attention_arguments",
    "bisect",
    "capture",
    "catalogue",
    "doctor",
    "emit",
    "explain",
    "failed_passes",
    "format_pipeline",
    "get_pass",
    "import_graph",
    "instruments",
    "layout_rule",
    "liveness",
    "parallelize",
    "parse",
    "parse_pipeline",
    "register_op",
    "register_pass",
    "registered_passes",
    "replace_attention",
    "reproduce",
    "rule",
    "simulate",
    "testing",
    "token_factors",
    "token_positions",
    "unresolved_attention",
]
