"""Loops over chunks: placed as their body is, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence

from autosp_ir.comm.chunk_loop import WHOLE as UNCUT
from autosp_ir.comm.chunk_loop import Loop, runner
from autosp_ir.comm.rules.base import WHOLE, Outcome, RuleContext, rule, whole
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import Placement, Shard
from autosp_ir.ir.verify import output_leaves

_BLOCKED = "reshape the operand so that the cut dimension holds one block of tokens"


@rule("autosp.chunk_loop")
def _loop(ctx: RuleContext) -> Outcome:
    loop = Loop.of(ctx.node)
    operands = _given(ctx, "operands", loop.cuts)
    return _joined(ctx, _placed(ctx, loop.program, operands), loop.joins)


@rule("autosp.chunk_loop_backward")
def _loop_backward(ctx: RuleContext) -> Outcome:
    loop = Loop.of(ctx.node)
    wanted = tuple(bool(w) for w in ctx.node.arg("wanted"))
    program = runner().joint(loop, wanted)
    differentiable = [k.dtype.is_floating_point for k in loop.results]
    outputs = [s.target for s, d in zip(loop.program.signature.outputs, differentiable, strict=True) if d]
    joins = [j for j, d in zip(loop.joins, differentiable, strict=True) if d]
    given = dict(zip((s.name for s in loop.program.signature.inputs), _given(ctx, "operands", loop.cuts), strict=True))
    given |= dict(zip(outputs, _given(ctx, "tangents", joins), strict=True))
    names = [s.target if s.target in outputs else s.name for s in program.signature.inputs]
    placed = _placed(ctx, program, [given[name] for name in names])
    along = [*loop.joins, *(cut for cut, w in zip(loop.cuts, wanted, strict=True) if w)]
    first = 0 if ctx.node.arg("results") else len(loop.joins)
    return _joined(ctx, placed[first:], along[first:])


def _given(ctx: RuleContext, argument: str, cuts: Sequence[int]) -> list[Placement]:
    """The placements of a list of operands that are cut along these dimensions."""
    placements = [ctx.placement(v) for v in ctx.node.arg(argument)]
    if ctx.what_if and not all(map(whole, placements)):
        ctx.fail("the body of a loop is written for the shapes of one rank", "tile behind token-partition")
    _refuse_blocks(ctx, placements, cuts)
    return placements


def _joined(ctx: RuleContext, placements: Sequence[Placement], joins: Sequence[int]) -> Outcome:
    _refuse_blocks(ctx, placements, joins)
    return tuple(placements)


def _refuse_blocks(ctx: RuleContext, placements: Sequence[Placement], cuts: Sequence[int]) -> None:
    for placement, cut in zip(placements, cuts, strict=True):
        if isinstance(placement, Shard) and placement.dim == cut != UNCUT and placement.outer != 1:
            ctx.fail("a chunk would take whole blocks in place of a part of each", _BLOCKED)


def _placed(ctx: RuleContext, body: Program, placements: Sequence[Placement]) -> list[Placement]:
    """The placements of a body's outputs for those of its inputs.

    Raises:
        LayoutError: Some operation of the body cannot be placed.
    """
    from autosp_ir.comm.inference import infer_layouts, place  # which know the rules, this one too

    program = body.clone()
    # A loop stands between layouts: which whole values are Invariant is decided around it.
    program.stage, program.mesh = Stage.JOINT, {ctx.axis: ctx.size}
    for node, placement in zip(program.graph.inputs, placements, strict=True):
        node.result.type = place(node.result.type, ctx.axis, placement)
    infer_layouts(program, inputs=False)
    leaves = output_leaves(program.graph)
    return [leaf.tensor_type.layout[ctx.axis] if isinstance(leaf, Value) else WHOLE for leaf in leaves]
