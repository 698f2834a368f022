"""What ranks compare before a step, without ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import autosp_ir as air
from autosp_ir.emit.agreement import collectives_of
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from tests.models import build


@pytest.fixture(scope="module")
def program() -> Program:
    """A lowered step of two ranks."""
    model, batch = build("llama-gqa", length=16, num_hidden_layers=1)
    return air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(model, batch), mesh={"sp": 2}).program


def _moved(program: Program, device: torch.device) -> Program:
    moved = program.clone()
    for node in moved.graph.nodes:
        for value in node.results:
            if isinstance(value.type, TensorType):
                value.type = replace(value.type, device=device)
    return moved


def test_the_ranks_of_a_host_hold_one_program_on_different_gpus(program: Program) -> None:
    first, second = (collectives_of(_moved(program, torch.device("cuda", index))) for index in (0, 1))
    assert first == second


def test_a_rank_on_another_kind_of_device_differs(program: Program) -> None:
    assert collectives_of(program) != collectives_of(_moved(program, torch.device("cuda", 0)))


def test_an_exchange_of_another_type_differs(program: Program) -> None:
    wider = program.clone()
    exchange = next(n for n in wider.graph.nodes if n.op.has(Trait.COLLECTIVE))
    assert isinstance(exchange.result.type, TensorType)
    exchange.result.type = replace(exchange.result.type, dtype=torch.float64)
    assert collectives_of(wider) != collectives_of(program)
