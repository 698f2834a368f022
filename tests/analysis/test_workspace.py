"""What attention needs on a device while it runs, and where it is counted."""

from __future__ import annotations

import pytest
import torch

import autosp_ir as air
from autosp_ir.analysis.cost import DEVICES, workspace
from autosp_ir.analysis.fused import Fusion, fused_liveness
from autosp_ir.analysis.liveness import liveness

_TOKENS = 2**20


def _program(kv_heads: int) -> air.Program:
    b = air.ProgramBuilder(stage="joint")
    q, dout, out = (b.input(n, (1, 16, _TOKENS, 128), torch.bfloat16) for n in ("q", "dout", "out"))
    k, v = (b.input(n, (1, kv_heads, _TOKENS, 128), torch.bfloat16) for n in ("k", "v"))
    lse = b.input("lse", (1, 16, _TOKENS), torch.float32)
    dq, *_ = b.autosp.attention_backward(dout, None, q, k, v, None, None, out, lse, causal=True)
    b.output(out=dq)
    return b.build()


@pytest.mark.parametrize(("kv_heads", "expanded"), [(16, 0), (4, 2 * 16 * _TOKENS * 128 * 2)])
def test_the_backward_of_attention(kv_heads: int, expanded: int) -> None:
    """With 4 key heads for 16 and a million tokens cuDNN asked for 16.06 GiB on an H200."""
    program = _program(kv_heads)
    (node,) = program.find("autosp.attention_backward")
    needed = workspace(node, DEVICES["h200"])
    assert needed == 16 * _TOKENS * (128 + 1) * 4 + expanded
    assert not expanded or needed / 2**30 == pytest.approx(16.06, abs=0.005)
    assert workspace(node, DEVICES["cpu"]) == workspace(node, None) == 0
    assert workspace(program.graph.inputs[0], DEVICES["h200"]) == 0
    for report in (liveness, lambda p, **given: fused_liveness(Fusion(p), **given)):
        peaks = [report(program, device=device).peak_bytes for device in (None, DEVICES["h200"])]
        assert peaks[1] - peaks[0] == needed
