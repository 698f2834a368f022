"""Backend `inductor`: both graphs of a step, decomposed and compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import (
    compile_with_inductor,
    storage_key,
    trace_decomposed,
    write_in_place,
)
from autosp_ir.comm.host_memory import name_strides, on_host
from autosp_ir.emit.boxed import StepGraphs
from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.gathers import pick_along_with_sums
from autosp_ir.emit.head_starts import COSTED, is_costed
from autosp_ir.emit.loops import prepare_loops
from autosp_ir.emit.pins import pinning_pass
from autosp_ir.emit.split import SplitJoint
from autosp_ir.emit.version import version_of_operators
from autosp_ir.ir.infer import fake_of
from autosp_ir.ir.program import InputKind, OutputKind, Program


def inductor_graphs(split: SplitJoint) -> StepGraphs:
    """Compile the forward, then the backward for the strides in which the forward really leaves its saved values.

    A saved value that shares memory with nothing else is donated: the backward may overwrite it, which spares a
    second buffer of the size of the logits. What lies in host memory is not: the device does not compute there.

    Args:
        split: The halves of a joint program.
    """
    traced, inputs = _traced(split.forward, {})
    own = _with_own_storage(split.forward, traced, inputs)
    # What these passes arranged would otherwise be rearranged, and chunks fused with one another.
    arranged = split.forward.facts & {"overlapped", "tiled", "offloaded"}
    pins = pinning_pass(is_costed, "tiled" in arranged, ",".join(COSTED)) if arranged else None
    # A buffer that waits for a later one of its size is memory that the chunks in between cannot have.
    reuse = not split.forward.facts & {"tiled", "head-chunked", "offloaded"}
    settings: dict[str, Any] = {"last_pass": pins, "version": version_of_operators(), "reuse": reuse}
    # Beside a tiled loss stands the gradient of its logits, which takes their place if it is one expression.
    whole = "tiled" in arranged
    forward, strides = compile_with_inductor(
        traced, inputs, split.forward.fake_mode, is_backward=False, inline=whole, **settings
    )
    if split.backward is None:
        return StepGraphs(forward, None)
    specs = split.forward.signature.outputs
    saved = {s.target: stride for s, stride in zip(specs, strides, strict=True) if s.kind is OutputKind.SAVED}
    traced, inputs = _traced(split.backward, saved)
    donated = [
        i for i, s in enumerate(split.backward.signature.inputs) if s.kind is InputKind.SAVED and s.target in own
    ]
    backward, _ = compile_with_inductor(
        traced, inputs, split.backward.fake_mode, is_backward=True, donated=donated, **settings
    )
    return StepGraphs(forward, backward, overwrites=frozenset(own))


def _traced(program: Program, strides: dict[str, tuple[int, ...] | None]) -> tuple[fx.GraphModule, list[Any]]:
    graph = executable(program)
    prepare_loops(graph.graph, "inductor")
    graph.recompile()
    inputs = _fake_inputs(program, graph, strides)
    traced = trace_decomposed(graph, inputs, program.fake_mode)
    pick_along_with_sums(traced.graph, program.fake_mode)
    products = torch.ops.autosp
    write_in_place(traced.graph, products.addmm_float32.default, products.addmm_float32_.default, "total")
    name_strides(traced.graph)
    return traced, inputs


def _with_own_storage(program: Program, traced: fx.GraphModule, inputs: list[Any]) -> set[str]:
    """Saved tensors that share storage with no input and no other output."""
    returned: Any = traced.graph.output_node().args[0]
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in returned]
    shared = Counter(storage_key(t) for t in [*values, *inputs] if isinstance(t, Tensor))
    return {
        spec.target
        for spec, value in zip(program.signature.outputs, values, strict=True)
        if spec.kind is OutputKind.SAVED
        and isinstance(value, Tensor)
        and shared[storage_key(value)] == 1
        and not on_host(program.graph.value(spec.target).producer)
    }


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
