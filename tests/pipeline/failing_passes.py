"""Passes that fail, in a file that a fresh process can load."""

from __future__ import annotations

import torch

import autosp_ir as air
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.program import Program
from autosp_ir.pipeline import PassContext


@air.register_pass("fails-at-attention", stage="forward")
def fails_at_attention(program: Program, ctx: PassContext, *, least: int = 1) -> None:
    """Refuses programs with attention."""
    found = program.find("autosp.attention")
    if len(found) >= least:
        raise UnsupportedError(f"{len(found)} attentions on {ctx.mesh}", node=found[0], hint="remove it")


@air.register_pass("fails-at-values", stage="forward")
def fails_at_values(program: Program, ctx: PassContext) -> None:
    """Fails by the values of a parameter."""
    values = [t for t in program.tensors.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if values and values[0].abs().max() > 0:
        raise ValueError(f"{tuple(values[0].shape)} is not zero")


@air.register_pass("breaks-a-type", stage="forward")
def breaks_a_type(program: Program, ctx: PassContext) -> None:
    """Leaves a stored type that does not follow."""
    node = program.graph.output_node.prev
    assert node is not None
    kind = node.result.tensor_type
    node.result.type = type(kind)((3,), kind.dtype, kind.device, kind.layout)


@air.register_pass("multiplies-tanh", stage="forward")
def multiplies_tanh(program: Program, ctx: PassContext) -> None:
    """Is wrong at its third site."""
    rewriter = ctx.rewriter(program)
    for position, node in enumerate(program.find("aten.tanh")):
        if rewriter.allows(node, "alias"):
            with rewriter.after(node):
                name = "aten.sigmoid" if position == 2 else "aten.alias"
                rewriter.replace(node, rewriter.create(name, (node.result,)))
