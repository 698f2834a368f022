from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autosp_ir.comm.layout import infer_layouts
from autosp_ir.errors import DeadlockError, SimulationError, UnsupportedError
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Stage
from autosp_ir.ir.types import TensorType
from autosp_ir.sim.lockstep import simulate
from autosp_ir.sim.mesh import RankMesh
from tests.sim.programs import autosp, dense_gradients, dense_mlp, mlp_inputs, parallel_mlp, traced, traced_joint


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_loss_and_gradients_equal_the_dense_model(size: int) -> None:
    inputs = mlp_inputs()
    sim = simulate(traced_joint(parallel_mlp(size), inputs, {"sp": size}), {"x": inputs["x"]})
    loss, gradients = dense_gradients(inputs)
    torch.testing.assert_close(sim.loss, loss, rtol=1e-12, atol=0)
    assert sim.grads.keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(sim.grads[name], expected, rtol=1e-12, atol=1e-12)


def test_collectives_are_recorded_in_order_with_bytes_and_phase() -> None:
    inputs = mlp_inputs(layers=1)
    sim = simulate(traced_joint(parallel_mlp(2), inputs, {"sp": 2}), (inputs["x"],))
    activations, weight = 2 * 8 * 8 * 8, 8 * 8 * 8
    assert [(c.op, c.axis, c.bytes, c.phase) for c in sim.comm] == [
        ("all_to_all", "sp", activations, "forward"),
        ("all_to_all", "sp", activations, "forward"),
        ("all_reduce", "sp", 8, "forward"),
        ("all_reduce", "sp", weight, "backward"),
    ]
    assert [c.wire_bytes for c in sim.comm] == [activations // 2, activations // 2, 8, weight]


def test_one_rank_does_not_communicate_and_identities_cost_no_memory() -> None:
    inputs = mlp_inputs()
    batch = {"x": inputs["x"]}
    dense = simulate(traced_joint(dense_mlp, inputs), batch)
    alone = simulate(traced_joint(parallel_mlp(1), inputs, {"sp": 1}), batch)
    assert alone.comm == []
    assert alone.peak_bytes == dense.peak_bytes


def test_outputs_and_trace_are_per_rank() -> None:
    x = torch.arange(8.0)
    program = traced(lambda x: autosp("shard", x, 0, "sp", 4) + autosp("axis_index", "sp", 4), {"x": x}, {"sp": 4})
    sim = simulate(program, {"x": x}, trace=True)
    for rank in range(4):
        torch.testing.assert_close(sim.outputs[rank]["loss"], x[2 * rank : 2 * rank + 2] + rank)
        assert torch.equal(sim.values[rank]["shard"], x[2 * rank : 2 * rank + 2])


def test_two_axes_have_their_own_groups() -> None:
    def both(x: Tensor) -> Tensor:
        rank = 10 * autosp("axis_index", "dp", 2) + autosp("axis_index", "sp", 3)
        along_sp = autosp("all_gather", rank.reshape(1) + x * 0, 0, "sp", 3)
        return autosp("all_gather", along_sp, 0, "dp", 2)

    x = torch.zeros(1, dtype=torch.int64)
    sim = simulate(traced(both, {"x": x}, {"dp": 2, "sp": 3}), {"x": x})
    for outputs in sim.outputs:
        assert outputs["loss"].tolist() == [0, 1, 2, 10, 11, 12]
    assert RankMesh.of({"dp": 2, "sp": 3}).group(4, "dp") == (1, 4)
    assert RankMesh.of({"dp": 2, "sp": 3}).group(4, "sp") == (3, 4, 5)


def test_a_forward_program_is_differentiated_on_demand() -> None:
    inputs = mlp_inputs()
    program = traced(parallel_mlp(2), inputs, {"sp": 2})
    loss, gradients = dense_gradients(inputs)
    sim = simulate(program, {"x": inputs["x"]})
    torch.testing.assert_close(sim.loss, loss)
    for name, expected in gradients.items():
        torch.testing.assert_close(sim.grads[name], expected, rtol=1e-12, atol=1e-12)
    assert sim.program.stage is Stage.JOINT
    assert program.stage is Stage.FORWARD
    forward = simulate(program, {"x": inputs["x"]}, gradients=False)
    assert forward.grads == {}
    assert torch.equal(forward.loss, sim.loss)


def test_attention_over_cut_tokens_is_refused() -> None:
    def attend(x: Tensor) -> Tensor:
        q = autosp("shard", x, 2, "sp", 2)
        out: Tensor = torch.ops.autosp.attention(q, q, q, causal=True)[0]
        return autosp("all_gather", out, 2, "sp", 2)

    x = torch.randn(1, 2, 8, 4)
    program = traced(attend, {"x": x}, {"sp": 2})
    infer_layouts(program)
    with pytest.raises(UnsupportedError, match="no pass has resolved it"):
        simulate(program, {"x": x})


def test_ranks_that_disagree_on_a_gradient_are_an_error() -> None:
    inputs = mlp_inputs(layers=1)
    program = traced_joint(parallel_mlp(2), inputs, {"sp": 2})
    reduce = program.find("autosp.all_reduce")[-1]
    reduce.result.replace_all_uses_with(reduce.operands[0])
    with pytest.raises(SimulationError, match="disagree on the gradient of 'w0'"):
        simulate(program, {"x": inputs["x"]})


def two_collectives(swapped: bool) -> Program:
    def run(x: Tensor) -> Tensor:
        if swapped:
            gathered = autosp("all_gather", x, 0, "sp", 2)
            return gathered.sum() + autosp("all_reduce", x, "sp", 2).sum()
        total = autosp("all_reduce", x, "sp", 2).sum()
        return autosp("all_gather", x, 0, "sp", 2).sum() + total

    return traced(run, {"x": torch.ones(4)}, {"sp": 2})


def test_a_rank_dependent_order_deadlocks() -> None:
    batch = {"x": torch.ones(4)}
    assert float(simulate(programs=[two_collectives(False)] * 2, batch=batch).loss) == 16.0
    with pytest.raises(DeadlockError, match=r"rank 0: all_reduce.*rank 1: all_gather"):
        simulate(programs=[two_collectives(False), two_collectives(True)], batch=batch)


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "axis"])
def test_every_kind_of_divergence_deadlocks(change: str) -> None:
    def run(x: Tensor) -> Tensor:
        y = autosp("all_reduce", x, "sp", 2)
        if change == "missing":
            return y.sum()
        if change == "axis":
            return autosp("all_reduce", y, "dp", 2).sum()
        y = y[:2] if change == "shape" else y.to(torch.float64)
        return autosp("all_reduce", y, "sp", 2).sum()

    def straight(x: Tensor) -> Tensor:
        return autosp("all_reduce", autosp("all_reduce", x, "sp", 2), "sp", 2).sum()

    x = torch.ones(4)
    mesh = {"dp": 2, "sp": 2} if change == "axis" else {"sp": 2}
    odd, other = traced(run, {"x": x}, mesh), traced(straight, {"x": x}, mesh)
    with pytest.raises(DeadlockError):
        simulate(programs=[other, odd] * (2 if change == "axis" else 1), batch={"x": x})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "the batch has no 'x'"),
        ({"x": torch.ones(4), "y": torch.ones(4)}, "does not read"),
        ({"x": torch.ones(5)}, r"the program wants torch.float32\[4\]"),
        ({"x": torch.ones(4, dtype=torch.float64)}, "the program wants torch.float32"),
        ({"x": 1.0}, "wants a tensor"),
        ({"x": torch.ones(4, device="meta")}, "without data"),
        ((torch.ones(4), torch.ones(4)), "2 positional entries"),
    ],
)
def test_a_bad_batch_is_a_named_error(batch: Any, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        simulate(two_collectives(False), batch)


def test_unbound_parameters_are_a_named_error_and_can_be_given() -> None:
    inputs = mlp_inputs(layers=1)
    program = traced_joint(parallel_mlp(2), inputs, {"sp": 2})
    bound = dict(program.tensors)
    program.tensors.clear()
    with pytest.raises(SimulationError, match="parameter 'w0' is not bound"):
        simulate(program, {"x": inputs["x"]})
    assert simulate(program, {"x": inputs["x"]}, tensors=bound).grads["w0"].abs().max() > 0


def test_wrong_mesh_and_wrong_number_of_programs_are_named_errors() -> None:
    program = two_collectives(False)
    program.mesh = {"sp": 4}
    with pytest.raises(SimulationError, match="built for 2 rank"):
        simulate(program, {"x": torch.ones(4)})
    with pytest.raises(SimulationError, match="1 program"):
        simulate(programs=[two_collectives(False)], batch={"x": torch.ones(4)})
    with pytest.raises(SimulationError, match="either one program or"):
        simulate(batch={"x": torch.ones(4)})


def test_a_started_collective_must_be_awaited() -> None:
    x = torch.ones(4)

    def run(x: Tensor) -> Tensor:
        started = torch.ops._c10d_functional.all_reduce(x, "sum", "sp")
        awaited: Tensor = torch.ops._c10d_functional.wait_tensor(started)
        return awaited.sum()

    program = traced(run, {"x": x}, {"sp": 2})
    assert float(simulate(program, {"x": x}).loss) == 8.0
    wait = program.find("_c10d_functional.wait_tensor")[0]
    wait.result.replace_all_uses_with(wait.operands[0])
    with pytest.raises(SimulationError, match="may still be running"):
        simulate(program, {"x": x})


def test_in_place_programs_leave_the_callers_tensors_alone() -> None:
    x = torch.zeros(2)
    program = traced(lambda x: x.add_(1).sum(), {"x": x}, {"sp": 2})
    assert float(simulate(program, {"x": x}).loss) == 2.0
    assert x.tolist() == [0.0, 0.0]


def test_random_numbers_follow_the_seed_and_agree_on_all_ranks() -> None:
    x = torch.ones(16)
    program = traced(lambda x: torch.ops.aten.rand_like(x), {"x": x}, {"sp": 2})
    state = torch.get_rng_state()
    first, again, other = (simulate(program, {"x": x}, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.outputs[0]["loss"], first.outputs[1]["loss"])
    assert torch.equal(first.outputs[0]["loss"], again.outputs[0]["loss"])
    assert not torch.equal(first.outputs[0]["loss"], other.outputs[0]["loss"])


def test_tangents_default_to_ones_and_can_be_given() -> None:
    x = torch.arange(4.0)
    program = traced(lambda x, tangent: x * tangent, {"x": x, "tangent": torch.ones(4)}, {})
    program.signature.inputs[1] = InputSpec(program.signature.inputs[1].name, InputKind.TANGENT, "loss")
    program.signature.outputs = [OutputSpec("grad", OutputKind.GRADIENT, "x")]
    assert simulate(program, {"x": x}).grads["x"].tolist() == x.tolist()
    assert simulate(program, {"x": x}, tangents={"loss": 2 * torch.ones(4)}).grads["x"].tolist() == (2 * x).tolist()


def test_symbols_take_the_extents_of_the_batch() -> None:
    import sympy

    x = torch.ones(4)
    program = traced(lambda x: x.sum(), {"x": x}, {})
    length = sympy.Symbol("s0", positive=True, integer=True)
    program.graph.inputs[0].result.type = TensorType((length,), torch.float32)
    assert float(simulate(program, {"x": torch.ones(7)}).loss) == 7.0
