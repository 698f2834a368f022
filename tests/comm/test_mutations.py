"""Every way to get one communication wrong is a LayoutError, forward and joint; the programs themselves pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autosp_ir.capture.program import capture
from autosp_ir.comm.layout import check_layouts
from autosp_ir.ir.program import Program, Stage
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.testing.mutations import broken, check_mutations, mutations
from tests.models.zoo import build

torch.set_num_threads(1)
FORWARD = "canonicalize,pad-tokens,token-partition,ulysses"
MODELS = ["llama-gqa", "gpt2", "plain"]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, Program]:
    """A captured model by name."""
    module, batch = build(request.param)
    return request.param, capture(module, batch)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [Stage.FORWARD, Stage.JOINT])
def test_every_mutation_is_caught(
    model: tuple[str, Program], stage: Stage, ranks: int, record_property: Callable[[str, object], None]
) -> None:
    name, captured = model
    pipeline = FORWARD if stage is Stage.FORWARD else f"{FORWARD},differentiate"
    program = PassManager(pipeline, verify=False).run(captured, mesh={"sp": ranks}).program
    assert program.stage is stage
    report = check_mutations(program)
    for kind, total in report.total.items():
        record_property(f"{name} {stage} {ranks} {kind}", f"{report.caught[kind]} of {total}")
    assert [str(s) for s in report.survivors] == []
    assert report.total["erase"] > 30 and report.total["swap"] > 150 and report.total["dim"] > 20


def test_a_mutation_is_undone(model: tuple[str, Program]) -> None:
    _, captured = model
    program = PassManager(FORWARD, verify=False).run(captured, mesh={"sp": 2}).program
    before = str(program)
    for mutation in list(mutations(program)):
        with broken(program, mutation):
            assert str(program) != before or mutation.kind == "double"
        assert str(program) == before, mutation
    check_layouts(program)


def test_identities_are_mutated_only_where_they_mean_something(model: tuple[str, Program]) -> None:
    _, captured = model
    forward = PassManager(FORWARD, verify=False).run(captured, mesh={"sp": 2}).program
    joint = PassManager(f"{FORWARD},differentiate", verify=False).run(captured, mesh={"sp": 2}).program

    def erased(program: Program) -> set[str]:
        return {m.node for m in mutations(program) if m.kind == "erase"}

    identities = {n.name for n in forward.find("autosp.invariant_to_replicate")}
    assert identities and identities <= erased(forward)
    assert not {n.name for n in joint.find("autosp.invariant_to_replicate")} & erased(joint)
