"""How much memory a step may take on the GPUs that it will run on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

# What the estimate and the allocator's fragments may be off by, together.
_MARGIN = 0.92


def memory_found(model: nn.Module, mesh: DeviceMesh | None, axis: str) -> float | None:
    """Bytes that a step may take, weights included, on the rank of one sequence that has least; None without a GPU.

    What the process holds beside the model, such as the states of an optimizer, is not available; a limit set by
    `torch.cuda.set_per_process_memory_fraction` is kept. All ranks of the axis call this together.

    Args:
        model: Its parameters and buffers are counted as part of the step.
        mesh: Device mesh; None: all ranks share one sequence.
        axis: The mesh axis that shares one sequence.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not torch.cuda.is_available() or not tensors or any(t.device.type != "cuda" for t in tensors):
        return None
    device = tensors[0].device
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    others = allocated - sum(storages.values())
    found = torch.tensor(min(free + reserved, allowed) - others, dtype=torch.float64, device=device)
    if dist.is_available() and dist.is_initialized():
        group = None if mesh is None else mesh.get_group(axis)
        dist.all_reduce(found, dist.ReduceOp.MIN, group)
    return _MARGIN * float(found)


__all__ = ["memory_found"]
