"""Small modules as forward programs, their joint programs run directly, and autograd beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.split import SplitJoint
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature


def forward_program(
    model: nn.Module, batch: dict[str, Tensor], dynamic: dict[str, Any] | None = None, functional: bool = False
) -> Program:
    """The exported forward of `model`, bound to its tensors; outputs are `out0`, `out1`, …"""
    exported = torch.export.export(model, (), dict(batch), dynamic_shapes=dynamic, strict=False)
    if functional:
        exported = exported.run_decompositions({})
    program = import_graph(exported.graph_module)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = []
    for spec, node in zip(exported.graph_signature.input_specs, program.graph.inputs, strict=True):
        if spec.kind.name == "USER_INPUT":
            wanted = batch[node.name].requires_grad
            inputs.append(InputSpec(node.name, InputKind.USER_INPUT, node.name, wanted))
            continue
        kind = InputKind.PARAMETER if spec.kind.name == "PARAMETER" else InputKind.BUFFER
        target = str(spec.target)
        program.tensors[target] = tensors[target]
        inputs.append(InputSpec(node.name, kind, target, tensors[target].requires_grad))
    outputs = []
    for position, returned in enumerate(exported.graph_signature.output_specs):
        if returned.kind.name == "BUFFER_MUTATION":
            target = str(returned.target)
            outputs.append(OutputSpec(target, OutputKind.BUFFER_MUTATION, target))
        else:
            outputs.append(OutputSpec(f"out{position}", OutputKind.USER_OUTPUT, f"out{position}"))
    program.signature = Signature(inputs, outputs)
    program.verify()
    return program


def bound(program: Program, spec: InputSpec, values: dict[str, Tensor]) -> Any:
    return values[spec.target] if spec.target in values else program.tensors[spec.target]


def run_joint(program: Program, batch: dict[str, Tensor], tangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of a joint program, by output name."""
    values = {**batch, **{f"tangent {k}": v for k, v in tangents.items()}}
    arguments = [
        values[f"tangent {s.target}"] if s.kind is InputKind.TANGENT else bound(program, s, values)
        for s in program.signature.inputs
    ]
    with torch.no_grad():
        results = executable(program)(*arguments)
    return {s.name: r for s, r in zip(program.signature.outputs, results, strict=True)}


def run_split(split: SplitJoint, batch: dict[str, Tensor], tangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of the two halves, the saved values handed over."""
    forward = split.forward
    with torch.no_grad():
        results = executable(forward)(*[bound(forward, s, batch) for s in forward.signature.inputs])
    named = {s.name: r for s, r in zip(forward.signature.outputs, results, strict=True)}
    if split.backward is None:
        return named
    arguments = []
    for spec in split.backward.signature.inputs:
        if spec.kind is InputKind.SAVED:
            arguments.append(named[spec.target])
        elif spec.kind is InputKind.TANGENT:
            arguments.append(tangents[spec.target])
        else:
            arguments.append(bound(split.backward, spec, batch))
    with torch.no_grad():
        gradients = executable(split.backward)(*arguments)
    outputs = [s.name for s in split.backward.signature.outputs]
    kept = {s.name for s in forward.signature.outputs if s.kind is not OutputKind.SAVED}
    return {**{k: v for k, v in named.items() if k in kept}, **dict(zip(outputs, gradients, strict=True))}


def autograd_results(model: nn.Module, batch: dict[str, Tensor], tangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same results by autograd."""
    model.zero_grad()
    leaves = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in batch.items()}
    outputs = model(**leaves)
    # Tangents come in the order of the outputs.
    named = dict(zip(tangents, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    torch.autograd.backward(list(named.values()), [tangents[n] for n in named])
    found = {f"grad of {n}": p.grad for n, p in [*model.named_parameters(), *leaves.items()] if p.grad is not None}
    return {**{n: o.detach() for n, o in named.items()}, **found}


def assert_same_results(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, reference in expected.items():
        scale = max(1.0, float(reference.abs().max()))
        error = float((got[name] - reference).abs().max()) / scale
        assert error <= tolerance, f"{name}: {error}"
    assert {n for n in got if n.startswith("grad of")} == {n for n in expected if n.startswith("grad of")}


class TinyDecoder(nn.Module):
    """Tied embedding, norm, gated attention, a frozen bias, an input that wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.gate = nn.Linear(8, 8)
        self.gate.bias.requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.embed(ids))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        out = x + nn.functional.silu(self.gate(out)) * out
        logits = out @ self.embed.weight.T * scale
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def decoder_batch(length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {
        "ids": torch.randint(0, 11, (2, length), generator=generator),
        "labels": torch.randint(0, 11, (2, length), generator=generator),
        "scale": torch.rand(11, dtype=torch.float64, generator=generator).requires_grad_(),
    }


def decoder_tangents(length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, length, 11, dtype=torch.float64, generator=generator)
    return {"out0": torch.tensor(1.5, dtype=torch.float64), "out1": logits}


def decoder() -> TinyDecoder:
    torch.manual_seed(0)
    model: TinyDecoder = TinyDecoder().double()
    return model
