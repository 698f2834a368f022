"""Products of half-precision matrices kept and added up in float32: `torch.ops.autosp.mm_float32` and `addmm_float32`.

A weight that is used by every chunk of tokens has one gradient a chunk. Rounded to bfloat16 and added in bfloat16, 128
of them keep two digits. A matrix product accumulates in float32 anyway, so here its sum simply goes on: nothing is
rounded before the end, and no chunk's gradient exists by itself. Operands of other types give results of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = (
    "mm_float32(Tensor a, Tensor b) -> Tensor",
    "addmm_float32(Tensor total, Tensor a, Tensor b) -> Tensor",
    "addmm_float32_(Tensor(a!) total, Tensor a, Tensor b) -> ()",
)
_HALF = (torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    # Any strides will do. Were they asked for, Inductor would write a transposed operand a second time, beside itself.
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _wide(a) @ _wide(b)


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(total, _wide(a), _wide(b))


def _addmm_in_place(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(_wide(a), _wide(b))


def _mm_cuda(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype in _HALF else a @ b


def _addmm_cuda(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in _HALF:
        return torch.addmm(total, a, b)
    return torch.addmm(total, a, b, out_dtype=torch.float32)


def _addmm_in_place_cuda(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype in _HALF:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _mm_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32 if a.dtype in _HALF else a.dtype)


def _addmm_fake(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(total, memory_format=torch.contiguous_format)


def _nothing(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


for _name, _plain, _cuda, _fake in (
    ("mm_float32", _mm, _mm_cuda, _mm_fake),
    ("addmm_float32", _addmm, _addmm_cuda, _addmm_fake),
    ("addmm_float32_", _addmm_in_place, _addmm_in_place_cuda, _nothing),
):
    LIBRARY.impl(_name, _plain, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"autosp::{_name}", _fake, lib=LIBRARY)
