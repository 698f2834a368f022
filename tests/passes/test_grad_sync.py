from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from autosp_ir._torch_compat import new_fake_mode
from autosp_ir.comm.layout import infer_layouts
from autosp_ir.ir.program import InputSpec, OutputKind, OutputSpec, Program
from autosp_ir.ir.types import PARTIAL
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.lockstep import Simulation, simulate
from tests.sim.programs import autosp, dense_gradients, mlp_inputs, parallel_mlp, traced_joint

SIZE = 4


def joint(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Program:
    program = traced_joint(function, inputs, {"sp": SIZE})
    infer_layouts(program)
    return program


def weight_reductions(sim: Simulation) -> list[str]:
    return [c.op for c in sim.comm if c.phase == "backward" and c.op == "all_reduce"]


def shared_weight(x: Tensor, w: Tensor) -> Tensor:
    """One weight used three times, once transposed: three all-reduces meet in its gradient."""
    h = autosp("shard", x, 1, "sp", SIZE)
    h = h @ autosp("invariant_to_replicate", w, "sp", SIZE)
    h = h @ autosp("invariant_to_replicate", w.t(), "sp", SIZE)
    h = h.relu() @ autosp("invariant_to_replicate", w, "sp", SIZE)
    return autosp("all_reduce", (h * h).sum(), "sp", SIZE)


def dense_shared_weight(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w @ w.t()).relu() @ w
    return (h * h).sum()


@pytest.mark.parametrize("mode", ["in_graph", "external"])
def test_gradients_are_complete_either_way(mode: str) -> None:
    inputs = mlp_inputs()
    program = joint(parallel_mlp(SIZE), inputs)
    result = PassManager(f"grad-sync{{mode={mode}}}").run(program).program
    sim = simulate(result, {"x": inputs["x"]})
    loss, gradients = dense_gradients(inputs)
    torch.testing.assert_close(sim.loss, loss)
    for name, expected in gradients.items():
        torch.testing.assert_close(sim.grads[name], expected, rtol=1e-10, atol=1e-12)
    assert len(weight_reductions(sim)) == (2 if mode == "in_graph" else 0)
    assert result.info["grad_sync"] == mode
    assert "grad-synced" in result.facts


def test_external_ranks_return_their_share_times_the_ranks() -> None:
    inputs = mlp_inputs(layers=1)
    program = joint(parallel_mlp(SIZE), inputs)
    reduction = program.find("autosp.all_reduce")[-1]
    partials = simulate(program, {"x": inputs["x"]}, trace=True)
    external = PassManager("grad-sync{mode=external}").run(program).program
    returned = external.graph.output_node.operands[1]
    assert returned.tensor_type.layout["sp"] == PARTIAL
    sim = simulate(external, {"x": inputs["x"]}, trace=True)
    for rank in range(SIZE):
        share = partials.values[rank][reduction.operands[0].name]
        torch.testing.assert_close(sim.values[rank][returned.name], SIZE * share)


@pytest.mark.parametrize("mode", ["in_graph", "external"])
def test_a_parameter_used_several_times_has_one_reduction(mode: str) -> None:
    inputs = {"x": mlp_inputs()["x"], "w": mlp_inputs()["w0"]}
    program = joint(shared_weight, inputs)
    batch = {"x": inputs["x"]}
    assert len(weight_reductions(simulate(program, batch))) == 3
    result = PassManager(f"grad-sync{{mode={mode}}},lower-comm").run(program)
    sim = simulate(result.program, batch)
    assert len(weight_reductions(sim)) == (1 if mode == "in_graph" else 0)
    assert result.statistics["grad-sync"]["merged"] == 2
    weight = inputs["w"].clone().requires_grad_()
    dense_shared_weight(inputs["x"], weight).backward()
    torch.testing.assert_close(sim.grads["w"], weight.grad, rtol=1e-10, atol=1e-10)


def test_gradients_of_inputs_and_of_whole_parameters_stay_complete() -> None:
    def mixed(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
        """`w0` scales the whole batch on every rank, `w1` meets tokens only."""
        whole = x @ w0
        h = autosp("shard", whole, 1, "sp", SIZE) @ autosp("invariant_to_replicate", w1, "sp", SIZE)
        return autosp("all_reduce", (h * h).sum(), "sp", SIZE)

    inputs = mlp_inputs()
    program = joint(mixed, inputs)
    # The third gradient returned once more, as if it belonged to the input.
    extra = OutputSpec("grad of x", OutputKind.GRADIENT, "x")
    program.signature.outputs.append(extra)
    outputs = program.graph.output_node.args[0]
    program.graph.output_node.set_args(((*outputs, outputs[2]),))
    first = program.signature.inputs[0]
    program.signature.inputs[0] = InputSpec(first.name, first.kind, first.target, True)
    before = simulate(program, {"x": inputs["x"]})
    external = PassManager("grad-sync{mode=external}").run(program).program
    after = simulate(external, {"x": inputs["x"]})
    for name in before.grads:
        torch.testing.assert_close(after.grads[name], before.grads[name])
    layouts = [v.tensor_type.layout["sp"] for v in external.graph.output_node.args[0]]
    assert [placement == PARTIAL for placement in layouts] == [False, False, True, False]


VOCABULARY = 12


def embedded(idx: Tensor, x: Tensor, w: Tensor, *, padding: int, twice: bool = False) -> Tensor:
    """Tokens looked up in a table, cut over the ranks, times other tokens."""
    whole = autosp("invariant_to_replicate", w, "sp", SIZE)
    h = torch.nn.functional.embedding(autosp("shard", idx, 1, "sp", SIZE), whole, padding_idx=padding)
    h = h * autosp("shard", x, 1, "sp", SIZE)
    h = h @ whole.t() if twice else h
    return autosp("all_reduce", (h * h).sum(), "sp", SIZE)


def dense_embedded(idx: Tensor, x: Tensor, w: Tensor, *, padding: int, twice: bool = False) -> Tensor:
    h = torch.nn.functional.embedding(idx, w, padding_idx=padding) * x
    h = h @ w.t() if twice else h
    return (h * h).sum()


def table_inputs(width: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(0)
    # Few entries, so that tokens of several ranks share one.
    idx = torch.randint(0, 5, (2, 2 * SIZE))
    x = torch.randn(2, 2 * SIZE, width, dtype=torch.float64)
    return {"labels": idx, "x": x, "w": torch.randn(VOCABULARY, width, dtype=torch.float64)}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("padding", [-1, 3])
def test_gathered_tokens_give_the_gradient_of_a_table(padding: int, twice: bool) -> None:
    inputs = table_inputs()
    program = joint(partial(embedded, padding=padding, twice=twice), inputs)
    result = PassManager("grad-sync{embeddings=gather},lower-comm").run(program)
    batch = {n: inputs[n] for n in ("labels", "x")}
    sim = simulate(result.program, batch)
    weight = inputs["w"].clone().requires_grad_()
    dense_embedded(batch["labels"], batch["x"], weight, padding=padding, twice=twice).backward()
    torch.testing.assert_close(sim.grads["w"], weight.grad, rtol=1e-10, atol=1e-10)
    # A table that is also multiplied needs the reduction of that gradient in any case.
    assert len(weight_reductions(sim)) == (1 if twice else 0)
    assert result.statistics["grad-sync"].get("gathered embeddings", 0) == (0 if twice else 1)


@pytest.mark.parametrize(("width", "entries", "gathers"), [(4096, 4096, False), (4096, 131072, True), (8, 4096, False)])
def test_what_sends_less_is_chosen(width: int, entries: int, gathers: bool) -> None:
    with new_fake_mode():
        inputs = {
            "labels": torch.zeros((1, 4096 * SIZE), dtype=torch.int64),
            "x": torch.zeros((1, 4096 * SIZE, width)),
            "w": torch.zeros((entries, width)),
        }
    program = joint(partial(embedded, padding=-1), inputs)
    statistics = PassManager("grad-sync").run(program).statistics["grad-sync"]
    assert statistics.get("gathered embeddings", 0) == int(gathers)


def test_tables_are_reduced_if_that_is_wanted_or_left_to_the_caller() -> None:
    inputs = table_inputs()
    for options in ("embeddings=reduce", "mode=external embeddings=gather"):
        program = joint(partial(embedded, padding=-1), inputs)
        assert not PassManager(f"grad-sync{{{options}}}").run(program).program.find("autosp.all_gather")
