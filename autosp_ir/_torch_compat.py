"""The one place that touches torch's private API.

Each symbol has an accessor here and a test in `tests/test_torch_compat.py`, so that a torch upgrade breaks in one
place with one message. Supported: torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


def resolve_group_name(name: str) -> dist.ProcessGroup | None:
    """Find a process group by its c10d name (`ProcessGroup.group_name`); None when there is no such group."""
    from torch.distributed import distributed_c10d

    find: Callable[[str], object] = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    try:
        group = find(name)
    except (RuntimeError, LookupError):
        return None
    return group if isinstance(group, dist.ProcessGroup) else None


def cpu_flash_attention() -> torch._ops.OpOverload:
    """The fused CPU attention: `(q, k, v, dropout, is_causal, *, attn_mask, scale) -> (out, lse)`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def cpu_flash_attention_backward() -> torch._ops.OpOverload:
    """The backward of `cpu_flash_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cuda_flash_attention() -> torch._ops.OpOverload:
    """The fused CUDA attention for half types: `(q, k, v, dropout, is_causal, debug, *, scale) -> (out, lse, …)`."""
    return torch.ops.aten._scaled_dot_product_flash_attention.default


def cuda_flash_attention_backward() -> torch._ops.OpOverload:
    """The backward of `cuda_flash_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_backward.default
