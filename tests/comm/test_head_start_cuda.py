"""The head start on a GPU: a pause of the compute stream, and the operand."""

from __future__ import annotations

import pytest
import torch

from autosp_ir.comm.head_start import PAUSE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_it_pauses_the_stream_and_gives_its_operand() -> None:
    x = torch.ones(4, 4, device="cuda").t()
    torch.ops.autosp.head_start(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(100):
        given = torch.ops.autosp.head_start(x)
    end.record()
    torch.cuda.synchronize()
    assert given.data_ptr() == x.data_ptr() and given.stride() == x.stride()
    assert 100 * PAUSE / 2 <= begin.elapsed_time(end) / 1e3 <= 100 * PAUSE * 10
