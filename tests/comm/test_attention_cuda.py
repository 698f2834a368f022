"""The attention operator pair on a GPU, against dense attention in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autosp_ir import _torch_compat
from autosp_ir.comm import attention_kernels
from tests.comm.test_attention import FORMS, attention, dense, gradients, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 6e-2), (torch.float16, 1e-2), (torch.float32, 1e-5), (torch.float64, 1e-10)],
)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("form", ["full", "causal", "scale", "window", "segments", "causal bias", "out of sight"])
def test_agrees_with_dense_attention(form: str, kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [x.detach().to(dtype) for x in tensors(kv_heads=kv_heads, width=16)]
    reference = [x.double().requires_grad_() for x in inputs]
    operands = [x.cuda().requires_grad_() for x in inputs]
    attributes: dict[str, Any] = FORMS[form]
    on_device = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in attributes.items()}
    out, lse = attention(*operands, **on_device)
    expected = dense(*reference, **attributes)
    assert out.stride() == operands[0].stride() and lse.is_contiguous()
    torch.testing.assert_close((out.double().cpu(), lse.double().cpu()), expected, rtol=tolerance, atol=tolerance)
    for with_lse in (False, True):
        grads, wanted = gradients((out.cpu(), lse.cpu()), operands, with_lse), gradients(expected, reference, with_lse)
        for actual, target in zip(grads, wanted, strict=True):
            torch.testing.assert_close(actual.double().cpu(), target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_float32_takes_the_fused_kernel(causal: bool) -> None:
    q, k, v = (x.detach().float().cuda() for x in tensors(kv_heads=2, width=16))
    call = attention_kernels.Call(q, k, v, None, None, causal, None, 0, 0, 0.25)
    names = [entry.name for entry in attention_kernels.KERNELS if entry.supports(call, False)]
    assert names == ["cuda-efficient", "blockwise"]


@pytest.mark.parametrize("causal", [False, True])
def test_half_types_take_the_fused_kernel(causal: bool) -> None:
    q, k, v = (x.detach().bfloat16().cuda() for x in tensors(kv_heads=2, width=16))
    call = attention_kernels.Call(q, k, v, None, None, causal, None, 0, 0, 0.25)
    fused = "cudnn" if torch.cuda.get_device_capability()[0] >= 9 else "cuda-flash"
    assert next(entry.name for entry in attention_kernels.KERNELS if entry.supports(call, False)) == fused


def _error_of_backward(batch: int, contiguous: tuple[bool, bool], backward: Callable[..., Any]) -> float:
    """The largest error of dq, dk and dv, the gradient of the output or the output itself being contiguous or not."""
    torch.manual_seed(batch)
    made = [torch.randn(batch, 256, 4, 64, device="cuda").bfloat16().transpose(1, 2) for _ in range(4)]
    wide = [x.detach().float().requires_grad_() for x in made[:3]]
    expected = torch.autograd.grad(dense(*wide, causal=True)[0], wide, made[3].float())
    out, lse = attention(*made[:3], causal=True)
    dout, out = (x.contiguous() if c else x for x, c in zip((made[3], out), contiguous, strict=True))
    grads = backward(dout, *made[:3], out, lse)
    return max(float((g.float() - e).norm() / e.norm()) for g, e in zip(grads, expected, strict=True))


def _ours(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    return torch.ops.autosp.attention_backward(dout, None, q, k, v, None, None, out, lse, causal=True)


def _torchs(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    state = torch.zeros((), dtype=torch.int64, device="cuda")
    return _torch_compat.cudnn_attention_backward()(
        dout, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, 256, 256, 0.0, True, scale=64**-0.5
    )


_STRIDES = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs cuDNN's attention"
)
def test_plans_that_others_made_do_not_serve() -> None:
    """Torch keeps the plans of cuDNN's backward whatever the strides of the output and of its gradient."""
    theirs = [_error_of_backward(1, strides, _torchs) for strides in _STRIDES]
    assert max(theirs) > 0.1, "torch tells the strides apart now, so that a thread of its own is not needed"
    assert max(_error_of_backward(1, strides, _ours) for strides in _STRIDES) <= 2e-2
    assert max(_error_of_backward(2, strides, _ours) for strides in _STRIDES[::-1]) <= 2e-2
