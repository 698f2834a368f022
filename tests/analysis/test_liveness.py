from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from autosp_ir.analysis.liveness import liveness
from autosp_ir.emit.fx_export import executable
from autosp_ir.errors import VerifyError
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.sim.lockstep import simulate
from autosp_ir.testing.memory import StorageTracker
from tests.sim.programs import dense_mlp, mlp_inputs, parallel_mlp, traced, traced_joint


def tracked_peak(program: Program, inputs: list[Tensor]) -> int:
    module = executable(program)
    with StorageTracker(inputs) as tracker, torch.no_grad():
        module(*inputs)
    peak: int = tracker.peak
    return peak


def attention_like(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    """Heads by view and transpose, a softmax, and a reshape that has to copy."""
    batch, length, width = x.shape
    q = (x @ w0).view(batch, length, 2, width // 2).transpose(1, 2)
    scores: Tensor = (q @ q.transpose(-1, -2)).softmax(-1)
    merged = (scores @ q).transpose(1, 2).reshape(batch, length, width)
    a: Tensor
    b: Tensor
    a, b = (merged @ w1).split(width // 2, dim=-1)
    return (a * torch.nn.functional.silu(b)).sum()


@pytest.mark.parametrize("function", [dense_mlp, attention_like])
def test_static_equals_simulated_equals_tracked(function: Callable[..., Tensor]) -> None:
    inputs = mlp_inputs()
    program = traced_joint(function, inputs)
    static = liveness(program)
    assert static.peak_bytes == simulate(program, {"x": inputs["x"]}).peak_bytes[0]
    assert static.peak_bytes == tracked_peak(program, list(inputs.values()))


@pytest.mark.parametrize("size", [2, 4])
def test_static_equals_simulated_over_ranks(size: int) -> None:
    inputs = mlp_inputs()
    program = traced_joint(parallel_mlp(size), inputs, {"sp": size})
    assert simulate(program, {"x": inputs["x"]}).peak_bytes == [liveness(program).peak_bytes] * size


def test_views_cost_nothing_and_keep_their_base() -> None:
    def run(x: Tensor) -> Tensor:
        base = x + 1
        view = base.t()
        other = base * 2
        return view.sum() + other.sum()

    report = liveness(traced(run, {"x": torch.ones(4, 4)}))
    assert report.by_node["add"] == 64
    assert "t" not in report.by_node
    # The base is alive through its view while the other product is made.
    assert report.peak_bytes == 64 + 64 + 4


def test_a_reshape_copies_only_where_strides_forbid_a_view() -> None:
    report = liveness(traced(lambda x: (x + 1).view(16), {"x": torch.ones(4, 4)}))
    assert report.by_node.get("view") is None
    program = traced(lambda x: (x + 1).t(), {"x": torch.ones(4, 4)})
    transposed = program.graph.output_node.operands[0]
    shape = program.graph.create("aten.reshape", (transposed, [16]), type=TensorType((16,), torch.float32))
    program.graph.output_node.set_args((shape.result,))
    assert liveness(program).by_node[shape.name] == 64


def test_saved_values_phases_and_inputs() -> None:
    inputs = mlp_inputs(layers=1)
    program = traced_joint(dense_mlp, inputs)
    report = liveness(program)
    assert report.peak_bytes == max(report.by_phase.values()) == max(report.curve)
    assert report.curve[report.names.index(report.peak_node)] == report.peak_bytes
    assert set(report.by_phase) == {Phase.FORWARD, Phase.BACKWARD}
    forward = {n.name for n in program.graph.nodes if n.phase is Phase.FORWARD}
    assert set(report.saved) < forward
    assert report.saved_bytes == sum(report.by_node[name] for name in report.saved)
    counted = liveness(program, count_inputs=True)
    given = sum(v.nbytes for v in inputs.values())
    assert counted.peak_bytes == report.peak_bytes + given
    assert counted.at_peak == {**report.at_peak, "inputs": given}
    assert sum(report.at_peak.values()) == report.peak_bytes
    # The whole loss is computed before the backward, at whose end all gradients are there.
    assert 0 < report.at_peak["saved"] <= report.saved_bytes


@pytest.mark.parametrize(
    ("holds", "op", "arguments"), [(True, "all_to_all_single", ([8, 8], [8, 8])), (False, "all_reduce", ("sum",))]
)
def test_a_started_collective_holds_its_operand_until_the_wait(
    holds: bool, op: str, arguments: tuple[Any, ...]
) -> None:
    """An all-reduce works on a copy of its operand, which is free as soon as the copy is made."""

    def run(x: Tensor) -> Tensor:
        started = getattr(torch.ops._c10d_functional, op)(x * 2, *arguments, "sp")
        unrelated = (x * 3).sum()
        awaited: Tensor = torch.ops._c10d_functional.wait_tensor(started)
        return awaited.sum() + unrelated

    program = traced(run, {"x": torch.ones(16)}, {"sp": 2})
    report = liveness(program)
    assert report.peak_bytes == 64 + 64 + (64 if holds else 0) + 4
    assert report.peak_bytes == simulate(program, {"x": torch.ones(16)}).peak_bytes[0]


def test_symbols_need_numbers() -> None:
    program = traced(lambda x: x * 2, {"x": torch.ones(4)})
    length = sympy.Symbol("s0", positive=True, integer=True)
    for node in program.graph.nodes:
        if node.results:
            node.result.type = TensorType((length,), torch.float32)
    with pytest.raises(VerifyError, match="has no number"):
        liveness(program)
    assert liveness(program, symbols={"s0": 10}).peak_bytes == 40
