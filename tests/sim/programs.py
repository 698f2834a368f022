"""Small hand-made programs for the simulator and the communication passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import autosp_ir.comm.ops  # noqa: F401  (registers torch.ops.autosp)
from autosp_ir.capture.fx_import import import_graph
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature, Stage


def autosp(name: str, *args: Any) -> Tensor:
    """Call `torch.ops.autosp.<name>`."""
    result: Tensor = getattr(torch.ops.autosp, name)(*args)
    return result


def traced(
    function: Callable[..., Any],
    inputs: dict[str, Tensor],
    mesh: dict[str, int] | None = None,
    tracing_mode: Literal["fake", "symbolic"] = "fake",
) -> Program:
    """A forward program of `function`, whose inputs called `x…` or `labels` are the batch and others parameters."""
    gm = make_fx(function, tracing_mode=tracing_mode)(*inputs.values())
    program = import_graph(gm)
    specs = []
    for node, (name, value) in zip(program.graph.inputs, inputs.items(), strict=True):
        kind = InputKind.USER_INPUT if name.startswith(("x", "labels")) else InputKind.PARAMETER
        specs.append(InputSpec(node.name, kind, name, kind is InputKind.PARAMETER))
        if kind is InputKind.PARAMETER:
            program.tensors[name] = value
    program.signature = Signature(specs, [OutputSpec("loss", OutputKind.USER_OUTPUT, "loss")])
    program.mesh = dict(mesh or {})
    return program


def traced_joint(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], mesh: dict[str, int] | None = None
) -> Program:
    """A joint program of the scalar `function`: the loss, then the gradient of every parameter."""
    parameters = [n for n in inputs if not n.startswith(("x", "labels"))]

    def step(*args: Tensor) -> tuple[Tensor, ...]:
        leaves = {n: a.detach().requires_grad_(n in parameters) for n, a in zip(inputs, args, strict=True)}
        loss = function(*leaves.values())
        return (loss, *torch.autograd.grad(loss, [leaves[n] for n in parameters]))

    program = traced(step, inputs, mesh)
    program.stage = Stage.JOINT
    program.signature.outputs += [OutputSpec(f"grad of {n}", OutputKind.GRADIENT, n) for n in parameters]
    mark_phases(program)
    return program


def mark_phases(program: Program) -> None:
    """Everything behind the loss is backward."""
    loss = program.graph.output_node.operands[0].producer
    behind = False
    for node in program.graph.nodes:
        node.phase = Phase.BACKWARD if behind and node.op.kind != "output" else Phase.FORWARD
        behind = behind or node is loss


def parallel_mlp(size: int, layers: int = 2) -> Callable[..., Tensor]:
    """A token-sharded MLP over [B, S, C] with an all-to-all round trip per layer, and a mean-square loss."""

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        count = x.numel()
        h = autosp("shard", x, 1, "sp", size)
        for weight in weights:
            h = autosp("all_to_all", h, 2, 1, "sp", size)
            h = torch.nn.functional.gelu(h)
            h = autosp("all_to_all", h, 1, 2, "sp", size)
            h = h @ autosp("invariant_to_replicate", weight, "sp", size)
        return autosp("all_reduce", (h * h).sum(), "sp", size) / count

    return forward


def dense_mlp(x: Tensor, *weights: Tensor) -> Tensor:
    """What `parallel_mlp` computes, on one device."""
    h = x
    for weight in weights:
        h = torch.nn.functional.gelu(h) @ weight
    return (h * h).sum() / x.numel()


def mlp_inputs(layers: int = 2, length: int = 16, width: int = 8) -> dict[str, Tensor]:
    """A batch of 2 and `layers` square weights, float64, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, Sequence[int]] = {"x": (2, length, width)}
    shapes |= {f"w{i}": (width, width) for i in range(layers)}
    return {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def dense_gradients(inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and weight gradients of `dense_mlp`."""
    leaves = {n: v.detach().requires_grad_(n != "x") for n, v in inputs.items()}
    loss = dense_mlp(*leaves.values())
    loss.backward()
    return loss.detach(), {n: v.grad for n, v in leaves.items() if v.grad is not None}
