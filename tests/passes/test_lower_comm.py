from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autosp_ir.comm.layout import infer_layouts
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import Layout, Shard
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.lockstep import simulate
from tests.sim.programs import autosp, mlp_inputs, parallel_mlp, traced, traced_joint


def lowered(program: Program) -> Program:
    return PassManager("lower-comm", verify=False).run(program, mesh=program.mesh).program


def one_operator(operator: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Program:
    """A joint program that shards nothing: every rank contributes `x` scaled by its index + 1."""

    def run(x: Tensor) -> Tensor:
        return operator(x * (autosp("axis_index", "sp", size) + 1))

    program = traced(run, {"x": x}, {"sp": size})
    program.stage = Stage.JOINT
    return program


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "all-reduce": ("all_reduce", ()),
    "all-gather first": ("all_gather", (0,)),
    "all-gather middle": ("all_gather", (1,)),
    "all-gather last to R": ("all_gather", (-1,)),
    "reduce-scatter first": ("reduce_scatter", (0,)),
    "reduce-scatter last": ("reduce_scatter", (2,)),
    "all-to-all first to last": ("all_to_all", (0, 2)),
    "all-to-all last to first": ("all_to_all", (2, 0)),
    "all-to-all middle to last": ("all_to_all", (1, -1)),
    "all-to-all last to middle": ("all_to_all", (2, 1)),
    "shard": ("shard", (1,)),
    "identity": ("invariant_to_replicate", ()),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_operator_computes_the_same(case: str, size: int, transposed: bool) -> None:
    name, arguments = CASES[case]
    to = ("replicate",) if case.endswith("to R") else ()

    def operator(x: Tensor) -> Tensor:
        return autosp(name, x.transpose(0, 2) if transposed else x, *arguments, "sp", size, *to)

    x = torch.arange(8.0 * 4 * 12).reshape(8, 4, 12)
    program = one_operator(operator, x, size)
    before, after = simulate(program, {"x": x}), simulate(lowered(program), {"x": x})
    for left, right in zip(before.outputs, after.outputs, strict=True):
        assert torch.equal(left["loss"], right["loss"])
    assert [(c.op, c.bytes) for c in after.comm] == [(c.op, c.bytes) for c in before.comm if size > 1]


def test_each_start_is_followed_by_its_wait_and_blocks_are_outermost() -> None:
    program = lowered(one_operator(lambda x: autosp("all_to_all", x, 2, 1, "sp", 4), torch.ones(2, 3, 8), 4))
    start = program.find("_c10d_functional.all_to_all_single")[0]
    assert start.result.tensor_type.shape == (4, 3, 2, 2)
    assert start.next is not None
    assert start.next.is_op("_c10d_functional.wait_tensor")
    assert start.next.operands == (start.result,)
    assert start.arg("group_name") == "sp"


def test_layouts_are_carried_through_the_blocks() -> None:
    program = one_operator(lambda x: autosp("all_to_all", x, 2, 1, "sp", 2), torch.ones(4, 3, 8), 2)
    operand = program.find("autosp.all_to_all")[0].operands[0]
    operand.type = operand.tensor_type.with_layout(Layout({"sp": Shard(1), "dp": Shard(0)}))
    program = lowered(program)
    start = program.find("_c10d_functional.all_to_all_single")[0]
    assert start.operands[0].tensor_type.layout == Layout({"sp": Shard(3), "dp": Shard(2)})
    assert start.result.tensor_type.layout == Layout({"sp": Shard(1), "dp": Shard(2)})
    result = program.graph.output_node.operands[0]
    assert result.tensor_type.layout == Layout({"sp": Shard(2), "dp": Shard(0)})
    assert result.tensor_type.shape == (4, 6, 4)


@pytest.mark.parametrize("name", ["all-gather middle", "reduce-scatter last", "all-to-all last to middle"])
def test_symbolic_extents_are_read_at_run_time(name: str) -> None:
    op, arguments = CASES[name]
    x = torch.arange(2.0 * 4 * 6).reshape(2, 4, 6)

    def run(x: Tensor) -> Tensor:
        return autosp(op, x, *arguments, "sp", 2)

    program = traced(run, {"x": x}, {"sp": 2}, tracing_mode="symbolic")
    program.stage = Stage.JOINT
    after = lowered(program)
    for batch in (x, torch.arange(3.0 * 8 * 10).reshape(3, 8, 10)):
        expected = simulate(program, {"x": batch}).outputs
        for left, right in zip(simulate(after, {"x": batch}).outputs, expected, strict=True):
            assert torch.equal(left["loss"], right["loss"])


def test_two_axes_on_one_dimension_are_refused() -> None:
    program = one_operator(lambda x: autosp("all_to_all", x, 2, 1, "sp", 2), torch.ones(4, 3, 8), 2)
    operand = program.find("autosp.all_to_all")[0].operands[0]
    operand.type = operand.tensor_type.with_layout(Layout({"sp": Shard(1), "dp": Shard(2)}))
    with pytest.raises(UnsupportedError, match="cut along axis 'dp'"):
        lowered(program)


@pytest.mark.parametrize("size", [2, 4])
def test_a_joint_program_keeps_loss_gradients_and_collectives(size: int) -> None:
    inputs = mlp_inputs()
    program = traced_joint(parallel_mlp(size), inputs, {"sp": size})
    infer_layouts(program)
    result = PassManager("lower-comm").run(program, mesh={"sp": size})
    before, after = simulate(program, {"x": inputs["x"]}), simulate(result.program, {"x": inputs["x"]})
    assert torch.equal(before.loss, after.loss)
    assert all(torch.equal(before.grads[n], after.grads[n]) for n in before.grads)
    assert [(c.op, c.axis, c.bytes, c.phase) for c in before.comm] == [
        (c.op, c.axis, c.bytes, c.phase) for c in after.comm
    ]
    left = {n.op.name for n in result.program.graph.nodes if n.op.name.startswith("autosp.")}
    assert left == {"autosp.shard"}
    assert result.program.stage is Stage.LOWERED
    assert "comm-lowered" in result.program.facts


@pytest.mark.parametrize("name", [n for n, (op, _) in CASES.items() if op != "invariant_to_replicate"])
def test_lowered_layouts_verify(name: str) -> None:
    op, arguments = CASES[name]
    to = ("replicate",) if name.endswith("to R") else ()
    start: dict[str, Callable[[Tensor], Tensor]] = {
        "all_reduce": lambda x: autosp("shard", x, 0, "sp", 2).sum(0),
        "reduce_scatter": lambda x: autosp("shard", x, 0, "sp", 2).sum(0).expand(8, 4, 12) * 1,
        "all_gather": lambda x: autosp("shard", x, arguments[0], "sp", 2),
        "all_to_all": lambda x: autosp("shard", x, arguments[1], "sp", 2),
        "shard": lambda x: x,
    }

    def run(x: Tensor) -> Tensor:
        result = autosp(op, start[op](x), *arguments, "sp", 2, *to)
        return result.sum() if op in ("all_reduce", "all_gather") else autosp("all_reduce", result.sum(), "sp", 2)

    x = torch.randn(8, 4, 12, dtype=torch.float64)
    program = traced(run, {"x": x}, {"sp": 2})
    program.stage = Stage.JOINT
    infer_layouts(program)
    result = PassManager("lower-comm").run(program).program
    torch.testing.assert_close(simulate(result, {"x": x}).loss, simulate(program, {"x": x}).loss)


def test_a_group_of_one_lowers_to_nothing() -> None:
    inputs = mlp_inputs()
    joint = traced_joint(parallel_mlp(1), inputs, {"sp": 1})
    infer_layouts(joint)
    program = PassManager("lower-comm").run(joint).program
    assert all(not v.tensor_type.layout for n in program.graph.nodes for v in n.results)
    assert not [n for n in program.graph.nodes if n.op.name.startswith(("autosp.", "_c10d"))]
