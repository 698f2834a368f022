"""Layouts of whole programs are numerically true, forward and joint, on models; `tests/fuzz` adds random programs."""

from __future__ import annotations

import pytest
import torch

from autosp_ir.capture.program import capture
from autosp_ir.comm.layout import check_layouts
from autosp_ir.errors import SimulationError
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import INVARIANT, Layout, Shard
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.sim.layout_truth import assemble, check_layout_truth, split
from tests.comm.layout_probe import placements_of
from tests.models.zoo import build

torch.set_num_threads(1)
FORWARD = "canonicalize,pad-tokens,token-partition,ulysses"
JOINT = f"{FORWARD},differentiate"
LOWERED = f"{JOINT},grad-sync,lower-comm"


def partitioned(name: str, pipeline: str, ranks: int) -> tuple[Program, Program, dict[str, torch.Tensor]]:
    model, batch = build(name, dtype=torch.float64, batch_size=2)
    program = capture(model, batch)
    many, one = (PassManager(pipeline, verify=False).run(program, mesh={"sp": n}).program for n in (ranks, 1))
    return many, one, batch


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "plain"])
def test_every_value_of_a_model_is_what_its_layout_says(name: str, ranks: int) -> None:
    many, one, batch = partitioned(name, JOINT, ranks)
    check_layouts(many)
    report = check_layout_truth(many, one, batch, tolerance=1e-6, allow_reshaped=True)
    # Only what exists for replicated K/V heads has no counterpart: 4 ranks share 2 of them.
    replicated = name == "llama-gqa" and ranks == 4
    assert bool(report.unmatched or report.reshaped) == replicated
    assert len(report.compared) > 300


def test_every_value_around_lowered_collectives_is_true() -> None:
    many, one, batch = partitioned("llama-mha", LOWERED, 4)
    check_layouts(many)
    report = check_layout_truth(many, one, batch, tolerance=1e-6)
    assert len(report.compared) > 300


def test_a_false_layout_is_found() -> None:
    many, one, batch = partitioned("plain", FORWARD, 2)
    value = next(n.result for n in many.graph.nodes if n.is_op("aten.embedding"))
    value.type = value.tensor_type.with_layout(Layout({"sp": Shard(2)}))
    with pytest.raises(SimulationError, match="is not true"):
        check_layout_truth(many, one, batch, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_what_is_split_is_assembled_again(dtype: torch.dtype) -> None:
    value = (torch.randn(4, 8, 2) * 5).to(dtype)
    for placement in placements_of(value, 4):
        whole = assemble(split(value, placement, 4), placement)
        assert torch.allclose(whole.double(), value.double())


def test_ranks_that_differ_are_no_whole_value() -> None:
    with pytest.raises(SimulationError, match="ranks 0 and 1"):
        assemble([torch.zeros(2), torch.ones(2)], INVARIANT)


def test_values_made_of_others_are_no_counterparts() -> None:
    """Autograd differentiates in another order where extents are one, and names what it makes alike."""

    def program(ranks: int, of: int) -> Program:
        b = ProgramBuilder(mesh={"sp": ranks})
        x = b.input("x", (4,), torch.float64)
        made = [b.aten.neg(x), b.aten.exp(x)]
        squared = b.aten.mul.Tensor(made[of], made[of])
        b.output(out=b.aten.sin(squared))
        return b.build()

    batch = {"x": torch.arange(4, dtype=torch.float64)}
    report = check_layout_truth(program(2, 0), program(1, 1), batch)
    assert report.compared == ["x", "neg", "exp"] and report.unmatched == ["mul", "sin"]
    assert not check_layout_truth(program(2, 0), program(1, 0), batch).unmatched
