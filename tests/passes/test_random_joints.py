"""Random programs: their joint graphs, whole and cut in two, give what autograd gives, and survive a round trip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.emit.fx_export import executable, export_graph
from autosp_ir.emit.split import split_joint
from autosp_ir.ir.program import InputSpec, Program
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.fuzz import random_graph
from tests.emit.fx_equality import assert_same_graph
from tests.passes.joints import run_joint, run_split

torch.set_num_threads(1)
SEEDS = 12


def differentiable(program: Program, spec: InputSpec) -> bool:
    return program.graph.value(spec.name).tensor_type.dtype.is_floating_point


def random_program(seed: int) -> Program:
    """A random program that wants the gradient of everything that can have one."""
    program = random_graph(seed)
    inputs = program.signature.inputs
    program.signature.inputs = [replace(s, requires_grad=differentiable(program, s)) for s in inputs]
    return program


def random_batch(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    batch = {}
    for spec in program.signature.inputs:
        kind = program.graph.value(spec.name).tensor_type
        shape = [int(extent) for extent in kind.shape]
        if spec.requires_grad:
            batch[spec.target] = torch.rand(shape, generator=generator, dtype=kind.dtype) + 0.1
        else:
            batch[spec.target] = torch.zeros(shape, dtype=kind.dtype)
    return batch


@pytest.mark.parametrize("policy", ["save-all", "min-cut"])
def test_random_programs_against_autograd(policy: str) -> None:
    for seed in range(SEEDS):
        check(random_program(seed), policy, torch.Generator().manual_seed(seed))


def check(program: Program, policy: str, generator: torch.Generator) -> None:
    batch = random_batch(program, generator)
    specs, names = program.signature.inputs, [o.target for o in program.signature.outputs]
    leaves = {s.target: batch[s.target].clone().requires_grad_(s.requires_grad) for s in specs}
    expected = dict(zip(names, executable(program)(*leaves.values()), strict=True))
    reached = {n: o for n, o in expected.items() if o.requires_grad}
    tangents = {n: torch.rand(o.shape, generator=generator, dtype=o.dtype) for n, o in reached.items()}
    if reached:
        torch.autograd.backward(list(reached.values()), list(tangents.values()))
    expected |= {f"grad of {n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}

    joint = PassManager(f"differentiate,remat{{policy={policy}}}").run(program).program
    exported = export_graph(joint)
    assert_same_graph(exported, export_graph(import_graph(exported)))
    for got in (run_joint(joint, batch, tangents), run_split(split_joint(joint), batch, tangents)):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value.detach(), rtol=1e-5, atol=1e-5, equal_nan=True)
