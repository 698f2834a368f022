from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosp_ir.capture.program import capture
from autosp_ir.errors import AutoSPError
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.sim.lockstep import simulate
from autosp_ir.testing import DenseReference, EquivalenceError, assert_equivalent, compare_to_dense
from autosp_ir.testing.equivalence import compare_runs
from tests.models.architectures import small
from tests.testing.toy_models import canonical, tokenwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pipeline", ["token-partition", "token-partition,differentiate"])
def test_a_right_program_passes_at_any_precision_and_stage(dtype: torch.dtype, pipeline: str) -> None:
    model, batch = tokenwise(dtype)
    program = PassManager(pipeline).run(canonical(model, batch, ["loss", "logits"]), mesh={"sp": 4}).program
    result = assert_equivalent(model, program, batch, world=4)
    assert result.ok and len(result.program.deviations) == 4 * 2 + 4


def test_a_wrong_constant_is_found_and_named() -> None:
    model, batch = tokenwise()
    program = canonical(model, batch)
    node = program.find("aten.add.Tensor")[0]
    node.set_args((node.args[0], 1e-4), dict(node.kwargs))
    with pytest.raises(EquivalenceError, match=r"gradient of embed\.weight"):
        assert_equivalent(model, program, batch)


def test_a_wrong_gradient_alone_is_found() -> None:
    model, batch = tokenwise()
    program = PassManager("token-partition,differentiate").run(canonical(model, batch), mesh={"sp": 2}).program
    reductions = [n for n in program.find("autosp.all_reduce") if str(n.phase) == "backward"]
    node = reductions[0]
    node.result.replace_all_uses_with(node.operands[0])
    with pytest.raises(AutoSPError, match=r"disagree|differ by more"):
        assert_equivalent(model, program, batch)


def test_a_capture_that_differs_from_the_model_cannot_cancel_out() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            factor = 2.0 if torch.compiler.is_compiling() else 3.0
            return (x * self.weight * factor).sum()

    model, batch = Moody(), {"x": torch.randn(2, 8, 4)}
    program = capture(model, batch, seq_dims={"x": 1})
    result = compare_to_dense(model, program, batch)
    assert not result.capture.ok and result.program.ok
    with pytest.raises(EquivalenceError, match="captured program against the eager model"):
        assert_equivalent(model, program, batch)


def test_losses_outside_the_model_and_inputs_with_gradients() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    def loss_fn(output: Tensor, batch: Any) -> Tensor:
        return torch.nn.functional.mse_loss(output, batch["x"])

    torch.manual_seed(0)
    model, batch = Block(), {"x": torch.randn(2, 8, 4, requires_grad=True)}
    program = capture(model, batch, seq_dims={"x": 1}, loss_fn=loss_fn, outputs=["loss", "out0"])
    program.facts.add("canonical")
    parallel = PassManager("token-partition").run(program, mesh={"sp": 2}).program
    result = assert_equivalent(model, parallel, batch)
    assert {d.what for d in result.program.deviations if "gradient" in d.what} == {
        "gradient of linear.weight",
        "gradient of linear.bias",
        "gradient of x",
    }


def test_one_reference_serves_many_programs() -> None:
    model, batch = tokenwise()
    reference = DenseReference.of(model, batch)
    for size in (1, 2, 3):
        reference.check(PassManager("token-partition").run(canonical(model, batch), mesh={"sp": size}).program)


def test_the_world_must_match_and_the_program_must_be_captured() -> None:
    model, batch = tokenwise()
    program = canonical(model, batch)
    with pytest.raises(EquivalenceError, match="1 rank"):
        assert_equivalent(model, program, batch, world=4)
    program.capture = None
    with pytest.raises(AutoSPError, match="not captured"):
        assert_equivalent(model, program, batch)


def test_queries_that_attend_to_nothing_have_the_gradients_of_attention_as_it_is_defined() -> None:
    # A finite number in place of minus infinity, as models write it: torch's CPU kernel gets these gradients wrong.
    model, batch = small("falcon, ALiBi")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :5] = 0
    batch["attention_mask"] = mask
    reference = DenseReference.of(model, batch)
    assert reference.check(PassManager("canonicalize").run(reference.program).program).ok


def test_what_rounding_leaves_of_zero_is_measured_against_a_magnitude() -> None:
    def centred(factor: float) -> Any:
        b = ProgramBuilder()
        x = b.input("x", (3, 4), torch.float64)
        mean = b.aten.mean.dim(x, [1], True)
        b.output(out=b.aten.mean.dim(b.aten.sub.Tensor(b.aten.mul.Scalar(x, factor), mean), [1]))
        return b.build()

    x = torch.tensor([[1.0, 0.1, 0.2, 0.3]] * 3, dtype=torch.float64)
    runs = [simulate(centred(factor), {"x": x}) for factor in (1.0, 1.0 + 1e-15, 1.0 + 1e-9)]
    compare_runs(runs[1], runs[0], least=1e-2).check()
    with pytest.raises(EquivalenceError):
        compare_runs(runs[1], runs[0]).check()
    with pytest.raises(EquivalenceError):
        compare_runs(runs[2], runs[0], least=1e-2).check()
