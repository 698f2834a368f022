from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosp_ir.comm.ops  # noqa: F401  (registers torch.ops.autosp)
from autosp_ir.comm.layout import infer_layouts
from autosp_ir.emit.split import crossing_values, split_joint
from autosp_ir.errors import PipelineError
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import ScalarType, TensorType
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.sim.lockstep import simulate
from autosp_passes.remat import may_recompute, view_root
from tests.passes.joints import (
    assert_same_results,
    autograd_results,
    decoder,
    decoder_batch,
    decoder_tangents,
    forward_program,
    run_joint,
    run_split,
)
from tests.sim.programs import autosp, traced

torch.set_num_threads(1)
POLICIES = ("save-all", "min-cut", "autosp-sac")
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def rematerialised(program: Program, policy: str) -> PassResult:
    return PassManager(f"differentiate,remat{{policy={policy}}}").run(program)


def saved_bytes(program: Program) -> int:
    kinds = [v.type for v in crossing_values(program)]
    return sum(int(k.numel) * k.dtype.itemsize for k in kinds if isinstance(k, TensorType))


@pytest.mark.parametrize("policy", POLICIES)
def test_both_halves_give_autograds_results(policy: str) -> None:
    model, batch, tangents = decoder(), decoder_batch(), decoder_tangents()
    program = rematerialised(forward_program(model, batch), policy).program
    expected = autograd_results(model, batch, tangents)
    assert_same_results(run_joint(program, batch, tangents), expected)
    split = split_joint(program)
    assert split.backward is not None
    split.forward.verify()
    split.backward.verify()
    assert_same_results(run_split(split, batch, tangents), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_dynamic_lengths(policy: str) -> None:
    length = torch.export.Dim("length", min=2, max=64)
    dynamic: dict[str, Any] = {"ids": {1: length}, "labels": {1: length}, "scale": None}
    model = decoder()
    program = rematerialised(forward_program(model, decoder_batch(), dynamic), policy).program
    split = split_joint(program)
    assert any(isinstance(program.graph.value(n).type, ScalarType) for n in split.saved)
    for size in (5, 9):
        batch, tangents = decoder_batch(size), decoder_tangents(size)
        assert_same_results(run_split(split, batch, tangents), autograd_results(model, batch, tangents))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_program_is_forward_then_the_rest(policy: str) -> None:
    program = rematerialised(forward_program(decoder(), decoder_batch()), policy).program
    phases = [n.phase for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    border = phases.index(next(p for p in phases if p is not Phase.FORWARD))
    assert Phase.FORWARD not in phases[border:]
    for node in program.graph.nodes:
        if node.phase is Phase.RECOMPUTE:
            following = [u.phase for u in node.users]
            assert following
            assert Phase.FORWARD not in following


@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_taken_again_from_their_base(policy: str) -> None:
    program = rematerialised(forward_program(decoder(), decoder_batch()), policy).program
    saved = crossing_values(program)
    assert saved
    assert all(view_root(v) is v for v in saved)
    recomputed = {n.op.name for n in program.graph.nodes if n.phase is Phase.RECOMPUTE}
    assert "aten.t" in recomputed


def test_min_cut_saves_less_and_recomputes_cheap_operations() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second((self.first(x).cos() * 2).sin().exp().tanh()).sum()
            return result

    model = Pointwise().double()
    batch = {"x": torch.randn(3, 8, dtype=torch.float64)}
    tangents = {"out0": torch.tensor(1.0, dtype=torch.float64)}
    program = forward_program(model, batch)
    everything, least = (rematerialised(program, p) for p in ("save-all", "min-cut"))
    assert least.statistics["remat"]["saved_bytes"] == saved_bytes(least.program)
    assert saved_bytes(least.program) < saved_bytes(everything.program)
    recomputed = {n.op.name for n in least.program.graph.nodes if n.phase is Phase.RECOMPUTE}
    assert {"aten.cos", "aten.sin"} <= recomputed
    assert not any(n.op.name == "aten.cos" for n in everything.program.graph.nodes if n.phase is Phase.RECOMPUTE)
    for result in (everything, least):
        split = split_joint(result.program)
        assert_same_results(run_split(split, batch, tangents), autograd_results(model, batch, tangents))


@pytest.mark.parametrize("policy", POLICIES)
def test_attention_is_never_computed_again(policy: str) -> None:
    forward = forward_program(decoder(), decoder_batch())
    before = PassManager("differentiate").run(forward).program
    program = rematerialised(forward, policy).program
    assert len(program.find(ATTENTION)) == len(before.find(ATTENTION)) == 1
    assert all(n.phase is not Phase.RECOMPUTE for n in program.find(ATTENTION))


@pytest.mark.parametrize("policy", POLICIES)
def test_random_operations_are_never_computed_again(policy: str) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.lin(x).sin(), 0.5).square().sum()

    model = Dropped().double()
    batch = {"x": torch.randn(3, 8, dtype=torch.float64)}
    tangents = {"out0": torch.tensor(1.0, dtype=torch.float64)}
    program = rematerialised(forward_program(model, batch), policy).program
    drawn = [n for n in program.graph.nodes if n.op.has(Trait.RANDOM)]
    assert [n.phase for n in drawn] == [Phase.FORWARD]
    torch.manual_seed(3)
    got = run_split(split_joint(program), batch, tangents)
    torch.manual_seed(3)
    assert_same_results(got, autograd_results(model, batch, tangents))


def exchanging(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Collectives whose results only cheap operations read, so that a cut would love to move them."""
    h = autosp("shard", x, 1, "sp", 4)
    h = (h @ autosp("invariant_to_replicate", w, "sp", 4)).cos()
    h = autosp("all_to_all", h, 2, 1, "sp", 4).sin().exp()
    h = autosp("all_to_all", h, 1, 2, "sp", 4).cos()
    h = h @ autosp("invariant_to_replicate", v, "sp", 4)
    return autosp("all_reduce", h.square().sum(), "sp", 4)


@pytest.mark.parametrize("policy", POLICIES)
def test_collectives_are_never_computed_again(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 16, 8), "w": (8, 8), "v": (8, 8)}
    inputs = {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    forward = traced(exchanging, inputs, {"sp": 4})
    infer_layouts(forward)
    before = PassManager("differentiate").run(forward).program
    program = rematerialised(forward, policy).program

    def collectives(of: Program) -> Counter[tuple[str, str]]:
        return Counter((n.op.name, str(n.phase)) for n in of.graph.nodes if n.op.has(Trait.COLLECTIVE))

    assert collectives(program) == collectives(before)
    recomputed = [n for n in program.graph.nodes if n.phase is Phase.RECOMPUTE]
    assert recomputed
    assert all(may_recompute(n) for n in recomputed)
    # Identity operators are erased by lowering, so saving their results would hold a copy of every parameter.
    assert not [v for v in crossing_values(program) if v.producer.op.has(Trait.IDENTITY)]
    split = split_joint(program)
    assert split.backward is not None
    split.forward.verify()
    split.backward.verify()
    expected, got = simulate(before, {"x": inputs["x"]}), simulate(program, {"x": inputs["x"]})
    assert torch.equal(expected.loss, got.loss)
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(got.grads[name], gradient, rtol=0, atol=1e-12)


def test_nothing_to_save_without_gradients() -> None:
    model = nn.Linear(4, 2).requires_grad_(False)
    result = rematerialised(forward_program(model, {"input": torch.randn(3, 4)}), "min-cut")
    assert [r.pass_name for r in result.remarks] == ["differentiate", "remat"]
    split = split_joint(result.program)
    assert split.backward is None
    assert split.saved == ()


def test_it_needs_a_joint_program() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(PipelineError):
        PassManager("remat").run(forward_program(model, {"input": torch.randn(3, 4)}))
