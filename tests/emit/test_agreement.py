"""What ranks compare before a step, without ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import autosp_ir as air
from autosp_ir.emit.collectives import collectives_of
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.ir.verify import verify_program
from tests.emit.agreeing import swap_exchanges
from tests.models import build


@pytest.fixture(scope="module")
def program() -> Program:
    """A lowered step of two ranks."""
    model, batch = build("llama-mha", length=16, num_hidden_layers=1)
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


def test_exchanges_of_one_type_in_another_order_differ(program: Program) -> None:
    """With two swapped, one rank takes the other's keys for queries."""
    other = program.clone()
    swap_exchanges(other)
    verify_program(other)
    assert [n.op.name for n in _collectives(other)] == [n.op.name for n in _collectives(program)]
    assert [n.result.type for n in _collectives(other)] == [n.result.type for n in _collectives(program)]
    assert collectives_of(other) != collectives_of(program)


def test_exchanges_of_one_name_and_type_but_of_another_operand_differ(program: Program) -> None:
    """A pass that goes through a set can build them in another order on every rank, numbered alike."""
    other = program.clone()
    first, second = swap_exchanges(other)
    names = first.name, second.name
    other.graph.rename(first.result, "set_aside")
    other.graph.rename(second.result, names[0])
    other.graph.rename(first.result, names[1])
    assert [n.name for n in _collectives(other)] == [n.name for n in _collectives(program)]
    assert collectives_of(other) != collectives_of(program)


def test_what_runs_between_collectives_does_not_count() -> None:
    model, batch = build("llama-mha", length=32, num_hidden_layers=1)
    captured = air.capture(model, batch)
    found = set()
    for begin in ("", "tile{chunks=2},", "tile{chunks=4 loop_from=2},"):
        pipeline = air.DEFAULT_PIPELINE.replace("differentiate", f"{begin}differentiate", 1)
        found.add(collectives_of(air.PassManager(pipeline).run(captured.clone(), mesh={"sp": 2}).program))
    assert len(found) == 1


def _collectives(program: Program) -> list[Node]:
    return [n for n in program.graph.nodes if n.op.has(Trait.COLLECTIVE)]
