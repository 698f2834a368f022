"""What a loop over chunks costs and needs while it runs, from its body: `autosp.chunk_loop` and its gradient."""

from __future__ import annotations

from functools import lru_cache

import torch

from autosp_ir.analysis.cost import cost_of
from autosp_ir.analysis.fused import Fusion, fused_liveness
from autosp_ir.analysis.liveness import liveness
from autosp_ir.comm.chunk_loop import NAMES, WHOLE, Loop, runner
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.ir.ops import op_by_name
from autosp_ir.ir.program import Program

_HALF = (torch.bfloat16, torch.float16)


def _of_body(node: Node, in_parts: bool = False, decompose: bool = False) -> Program:
    """What runs once for each chunk."""
    loop = Loop.of(node)
    if node.is_op("autosp.chunk_loop"):
        return loop.program
    wanted = tuple(bool(w) for w in node.arg("wanted"))
    return runner().gradient(loop, wanted, bool(node.arg("results")), in_parts=in_parts, decompose=decompose)


@lru_cache(maxsize=256)
def _cost_of_body(program: Program) -> tuple[float, float]:
    costs = [cost_of(node) for node in program.graph.nodes]
    return sum(c.flops for c in costs), sum(c.bytes for c in costs)


@lru_cache(maxsize=256)
def _peak_of_body(program: Program, fused: bool) -> int:
    if not fused:
        return liveness(program).peak_bytes
    whole = program.clone()
    for node in whole.graph.nodes:
        # Unlike those of a step, the halves of a body are one graph to the compiler, and fuse with each other.
        node.phase = Phase.FORWARD
    return fused_liveness(Fusion(whole)).peak_bytes


def loop_cost(node: Node) -> dict[str, float]:
    """The work of all chunks; what is pointwise in them is counted unfused."""
    flops, moved = _cost_of_body(_of_body(node))
    chunks = Loop.of(node).chunks
    return {"flops": flops * chunks, "bytes": moved * chunks}


def loop_workspace(node: Node, fused: bool) -> int:
    """Bytes beside operands and results: one chunk's, and sums in float32 of what is given in half precision.

    Args:
        node: A loop.
        fused: Whether a compiler fuses what one chunk runs.
    """
    peak, loop = _peak_of_body(_of_body(node, in_parts=True, decompose=fused), fused), Loop.of(node)
    if node.is_op("autosp.chunk_loop"):
        return peak
    asked = zip(node.arg("operands"), loop.cuts, node.arg("wanted"), strict=True)
    sums = [v.tensor_type for v, cut, wanted in asked if wanted and cut == WHOLE]
    return peak + sum(4 * int(k.numel) for k in sums if k.dtype in _HALF)


for _name in NAMES:
    _op = op_by_name(_name)
    _op.cost, _op.workspace = loop_cost, loop_workspace

__all__ = ["loop_cost", "loop_workspace"]
