"""`torch.ops.autosp.head_start(x)`: the compute stream pauses, so that a collective gets onto the GPU first.

A product or an attention fills every multiprocessor for as long as it runs. A collective is launched by another stream,
some microseconds after what it waits for; if compute goes on at once, the collective finds no room until the kernel
beside which it was to run is nearly over. Seen on two H200: all-to-alls that were issued in front of an attention began
at its end. With the collective's kernel in place first, the two share the GPU.

On CUDA the operator queues a kernel of one thread that spins for `PAUSE`, elsewhere it does nothing. It returns its
operand: what reads that stands behind it, and keeps a compiler from leaving it out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosp_ir._torch_compat import spin

PAUSE = 15e-6
"""Seconds. From the end of a kernel to the beginning of a collective that waits for it: 2 to 12 µs on an H200."""

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
# Any strides will do: for strides of its own a compiler would copy the operand.
LIBRARY.define("head_start(Tensor(a) x) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _alias(x: Tensor) -> Tensor:
    """The operand as another tensor on the same memory: an operator may not return its operand itself."""
    return x.view(x.shape)


def _head_start(x: Tensor) -> Tensor:
    if x.is_cuda:
        spin(PAUSE, x.device)
    return _alias(x)


torch.library.register_fake("autosp::head_start", _alias, lib=LIBRARY)
LIBRARY.impl("head_start", _head_start, "CompositeExplicitAutograd")

__all__ = ["PAUSE"]
