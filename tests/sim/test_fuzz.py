"""The random programs themselves."""

from __future__ import annotations

import torch

from autosp_ir.ir.types import TupleType
from autosp_ir.sim.fuzz import random_graph
from autosp_ir.sim.lockstep import simulate


def test_a_seed_names_one_program() -> None:
    assert random_graph(3) == random_graph(3)
    assert random_graph(3) != random_graph(4)


def test_random_programs_are_varied() -> None:
    programs = [random_graph(seed) for seed in range(100)]
    nodes = [n for p in programs for n in p.graph.nodes]
    assert len({n.op.name for n in nodes}) > 60
    assert any(isinstance(v.type, TupleType) for n in nodes for v in n.results)
    assert any(isinstance(a, list) and None in a for n in nodes for a in n.args)
    assert {type(v) for n in nodes for v in n.kwargs.values()} >= {bool, int, float, str, torch.dtype, torch.device}


def test_random_programs_can_be_evaluated() -> None:
    for seed in range(20):
        program = random_graph(seed)
        torch.manual_seed(seed)
        batch = {
            spec.target: torch.randn(tuple(program.graph.value(spec.name).tensor_type.shape))
            for spec in program.signature.inputs
        }
        program.tensors = {t: v for t, v in batch.items() if t.startswith("p.")}
        outputs = simulate(program, {t: v for t, v in batch.items() if not t.startswith("p.")}).outputs[0]
        for spec, value in zip(program.signature.outputs, program.graph.output_node.operands, strict=True):
            assert outputs[spec.name].shape == value.tensor_type.shape
            assert outputs[spec.name].dtype == value.tensor_type.dtype
