"""The attention operator pair on a GPU, against dense attention in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
    assert out.is_contiguous() and lse.is_contiguous()
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
