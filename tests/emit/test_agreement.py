"""What ranks compare before a step, without ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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
        if "device" in node.kwargs:
            node.set_args(node.args, {**node.kwargs, "device": device})
        for value in node.results:
            if isinstance(value.type, TensorType):
                value.type = replace(value.type, device=device)
    return moved


def test_the_ranks_of_a_host_hold_one_program_on_different_gpus(program: Program) -> None:
    assert any("device" in n.kwargs for n in program.graph.nodes)
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


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_exchanges_of_one_name_and_type_but_of_another_operand_differ(name: str) -> None:
    """A pass that goes through a set can build them in another order on every rank, numbered alike.

    Where one weight makes queries, keys and values only the slices tell which is which.
    """
    program = _lowered(name)
    other = _swapped_alike(program)
    assert [n.name for n in _collectives(other)] == [n.name for n in _collectives(program)]
    assert collectives_of(other) != collectives_of(program)


def test_exchanges_of_one_weight_for_two_operands_differ() -> None:
    """Queries and keys of one projection depend on the same inputs, and the same outputs depend on them."""
    batch = {"ids": torch.randint(64, (1, 16))}
    program = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(OneProjection(), batch), mesh={"sp": 2}).program
    assert collectives_of(_swapped_alike(program)) != collectives_of(program)


class OneProjection(nn.Module):
    """Attention whose queries and keys come from one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.both, self.v = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        """A scalar of `[1, tokens]`."""
        x = self.embed(ids)
        made = self.both(x), self.both(x.tanh()), self.v(x)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in made)
        loss: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()
        return loss


def _swapped_alike(program: Program) -> Program:
    """The program with its first two exchanges in the other order, numbered as they were."""
    other = program.clone()
    first, second = swap_exchanges(other)
    names = first.name, second.name
    other.graph.rename(first.result, "set_aside")
    other.graph.rename(second.result, names[0])
    other.graph.rename(first.result, names[1])
    return other


def test_parameters_in_another_order_differ() -> None:
    """The exchanges change places with the parameters that they depend on, which are compared by name."""
    found = set()
    for order in ("ab", "ba"):
        torch.manual_seed(0)
        model = Branches(order)
        ids = torch.randint(64, (1, 16))
        program = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(model, {"ids": ids}), mesh={"sp": 2}).program
        found.add(collectives_of(program))
    assert len(found) == 2


class Branches(nn.Module):
    """Two attentions beside each other, run in an order that is given.

    Args:
        order: Their names.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.branches = nn.ModuleDict({name: nn.Linear(32, 96, bias=False) for name in order})

    def forward(self, ids: Tensor) -> Tensor:
        """A scalar of `[1, tokens]`."""
        x = self.embed(ids)
        for branch in self.branches.values():
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in branch(x).chunk(3, -1))
            found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + found.transpose(1, 2).flatten(-2)
        loss: Tensor = x.square().mean()
        return loss


def test_what_is_computed_again_does_not_count() -> None:
    policies = ("save-all", "min-cut", "autosp-sac", "budget fraction=1.0")
    found = {collectives_of(_lowered("llama-gqa", f"remat{{policy={policy}}}")) for policy in policies}
    assert len(found) == 1


def _lowered(name: str, remat: str = "remat") -> Program:
    model, batch = build(name, length=32, **({} if name == "gpt2" else {"num_hidden_layers": 1}))
    pipeline = air.DEFAULT_PIPELINE.replace("remat", remat)
    return air.PassManager(pipeline).run(air.capture(model, batch), mesh={"sp": 2}).program


def _collectives(program: Program) -> list[Node]:
    return [n for n in program.graph.nodes if n.op.has(Trait.COLLECTIVE)]
