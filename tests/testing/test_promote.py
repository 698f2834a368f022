from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Graph
from autosp_ir.ir.ops import op_for_target
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.lockstep import simulate
from autosp_ir.testing import promote, promote_batch
from autosp_ir.testing.promote import floating_dtypes
from tests.testing.toy_models import canonical, tokenwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_floating_value_becomes_float64(dtype: torch.dtype) -> None:
    program = canonical(*tokenwise(dtype))
    assert torch.float32 in floating_dtypes(program)
    promoted = promote(program)
    promoted.verify()
    assert floating_dtypes(promoted) == {torch.float64}
    assert {t.dtype for t in promoted.tensors.values()} == {torch.float64}
    assert program.tensors["head.weight"].dtype == dtype


def test_a_partitioned_program_promotes_like_the_dense_one() -> None:
    model, batch = tokenwise()
    dense = canonical(model, batch, ["loss", "logits"])
    parallel = PassManager("token-partition,differentiate").run(dense, mesh={"sp": 4}).program
    promoted = promote(parallel)
    promoted.verify()
    assert floating_dtypes(promoted) == {torch.float64}
    expected, found = (simulate(promote(p), promote_batch(batch)) for p in (dense, parallel))
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-12, atol=1e-14)


def test_a_promoted_model_equals_the_model_written_in_float64() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        counted = torch.arange(x.shape[0], device=x.device) / 7
        return torch.softmax(x.float() * counted[:, None], -1) * torch.full((1,), 0.1, device=x.device)

    x = torch.randn(5, 3, dtype=torch.float64)
    program = import_graph(make_fx(step, tracing_mode="fake")(x))
    found = simulate(promote(program), {program.signature.inputs[0].target: x}, gradients=False).outputs[0]["out0"]
    wide = torch.softmax(x * (torch.arange(5).double() / 7)[:, None], -1) * 0.1
    torch.testing.assert_close(found, wide, rtol=1e-15, atol=1e-16)


def test_nested_graphs_are_promoted() -> None:
    class Checkpointed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = x.float().mean()
            return x * scale

    program = import_graph(torch.export.export(Checkpointed(), (torch.randn(4),), strict=False).graph_module)
    nested = [held for held in program.attrs.values() if isinstance(held, Graph)]
    assert nested, "no_grad is exported as a nested graph"
    promoted = promote(program)
    assert floating_dtypes(promoted) == {torch.float64}
    for held in (held for held in promoted.attrs.values() if isinstance(held, Graph)):
        kinds = [n.result.type for n in held.nodes if n.results]
        assert {k.dtype for k in kinds if isinstance(k, TensorType)} == {torch.float64}


def test_reading_bits_is_refused() -> None:
    program = canonical(*tokenwise())
    value = program.find("aten.linear")[0].result
    program.graph.create(op_for_target(torch.ops.aten.view.dtype), (value, torch.int32), type=value.type)
    with pytest.raises(UnsupportedError, match="bits"):
        promote(program)


def test_promote_batch_keeps_ids_and_containers() -> None:
    batch = promote_batch({"ids": torch.arange(3), "x": [torch.ones(2).half()], "flag": True})
    assert batch["ids"].dtype == torch.int64 and batch["x"][0].dtype == torch.float64 and batch["flag"] is True


def test_an_epsilon_that_follows_the_dtype_stays() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rms_norm(x, (4,))

    x = torch.full((4,), 1e-3)
    program = import_graph(torch.export.export(Norm(), (x,), strict=False).graph_module)
    wide = simulate(promote(program), (x.double(),), gradients=False).outputs[0]["out0"]
    torch.testing.assert_close(wide, torch.rms_norm(x, (4,)).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epsilon_is_the_number_that_the_kernel_adds(dtype: torch.dtype) -> None:
    """It rounds the epsilon, as what autograd makes of the norm does: no small part beside small activations."""

    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rms_norm(x, (4,), eps=1e-5)

    x = torch.full((4,), 2**-10, dtype=dtype)
    program = import_graph(torch.export.export(Norm(), (x,), strict=False).graph_module)
    wide = simulate(promote(program), (x.double(),), gradients=False).outputs[0]["out0"]
    rounded = torch.tensor(1e-5, dtype=torch.float32).double()
    torch.testing.assert_close(wide, x.double() * torch.rsqrt(x.double() ** 2 + rounded), rtol=1e-14, atol=0)
