"""Backend `inductor`: both graphs of a step, decomposed and compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from autosp_ir._torch_compat import compile_with_inductor, trace_decomposed
from autosp_ir.emit.boxed import Boxed
from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.split import SplitJoint
from autosp_ir.ir.infer import fake_of
from autosp_ir.ir.program import OutputKind, Program


def inductor_graphs(split: SplitJoint) -> tuple[Boxed, Boxed | None]:
    """Compile the forward, then the backward for the strides in which the forward really leaves its saved values.

    Args:
        split: The halves of a joint program.

    Returns:
        Boxed callables: each takes one list of arguments and empties it.
    """
    forward, strides = _compiled(split.forward, {}, is_backward=False)
    if split.backward is None:
        return forward, None
    specs = split.forward.signature.outputs
    saved = {s.target: stride for s, stride in zip(specs, strides, strict=True) if s.kind is OutputKind.SAVED}
    backward, _ = _compiled(split.backward, saved, is_backward=True)
    return forward, backward


def _compiled(
    program: Program, strides: dict[str, tuple[int, ...] | None], *, is_backward: bool
) -> tuple[Boxed, list[tuple[int, ...] | None]]:
    graph = executable(program)
    inputs = _fake_inputs(program, graph, strides)
    traced = trace_decomposed(graph, inputs, program.fake_mode)
    return compile_with_inductor(traced, inputs, program.fake_mode, is_backward=is_backward)


def _fake_inputs(program: Program, graph: fx.GraphModule, strides: dict[str, tuple[int, ...] | None]) -> list[Any]:
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    inputs: list[Any] = []
    with program.fake_mode:
        for node, exported in zip(program.graph.inputs, placeholders, strict=True):
            recorded = exported.meta.get("val")
            made = fake_of(node.result.type, program.fake_mode)
            if isinstance(made, Tensor) and isinstance(recorded, Tensor) and recorded.shape == made.shape:
                made = made.as_strided(made.shape, recorded.stride())
            stride = strides.get(node.name)
            if isinstance(made, Tensor) and stride is not None:
                made = made.as_strided(made.shape, stride)
            inputs.append(made)
    return inputs
