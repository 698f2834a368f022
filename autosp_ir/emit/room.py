"""How much memory a step may take on the GPUs and hosts that it will run on, and the pipeline that keeps within it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autosp_ir.analysis.hardware import this_device, this_link
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.manager import PassResult
from autosp_ir.plan import fitting, plan

_logger = logging.getLogger("autosp_ir.emit")
# What the estimate and the allocator's fragments may be off by, together.
_MARGIN = 0.92
# The rest is for the page cache, data loaders and whatever else the host runs.
_HOST_SHARE = 0.5
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Bytes that a step may take on one rank.

    Args:
        device: On its device, weights included.
        host: Of pinned host memory.
    """

    device: float
    host: float


def room_found(model: nn.Module, mesh: DeviceMesh | None, axis: str) -> Room | None:
    """What there is on the rank of one sequence that has least; None without a GPU.

    What the process holds on the device beside the model, such as the states of an optimizer, is not available; a limit
    set by `torch.cuda.set_per_process_memory_fraction` is kept. Of the host's free memory the ranks that run on it
    share a half. All ranks of the axis call this together.

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
    here = _MARGIN * (min(free + reserved, allowed) - others), _HOST_SHARE * host_free() / _ranks_here()
    found = torch.tensor(here, dtype=torch.float64, device=device)
    if dist.is_available() and dist.is_initialized():
        group = None if mesh is None else mesh.get_group(axis)
        dist.all_reduce(found, dist.ReduceOp.MIN, group)
    return Room(*found.tolist())


def host_free() -> float:
    """Bytes of host memory that are free, to the machine and to the control group of this process; 0 if unknown."""
    try:
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        free = 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0.0
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0.0, min(free, int(limit) - used))


def _ranks_here() -> int:
    """How many ranks share this host: what torchrun says, else all of them."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def within(
    program: Program,
    mesh: Mapping[str, int],
    passes: Sequence[Pass],
    room: Room,
    *,
    axis: str,
    fused: bool,
    strict: bool,
    or_least: bool,
) -> PassResult:
    """Rewrite a captured program with the first pipeline of the plan that fits.

    Every rank predicts the same from the same program, and so chooses the same.

    Args:
        program: From `capture`.
        mesh: Axis sizes.
        passes: The pipeline to start from.
        room: What a rank has; the same on all of them.
        axis: The mesh axis that shares one sequence.
        fused: Whether a compiler fuses the program.
        strict: Refuse instead of gathering tokens.
        or_least: Where none fits take the least, with a warning.

    Raises:
        UnsupportedError: None fits, and `or_least` is not given.
    """
    device = this_device()
    ladder = plan(
        program,
        mesh,
        passes,
        axis=axis,
        device=device,
        link=this_link(device),
        fused=fused,
        strict=strict,
        host=room.host,
    )
    prediction, result = fitting(ladder, room.device, or_least=or_least)
    fits = prediction.peak_bytes <= room.device
    _logger.log(
        logging.INFO if fits else logging.WARNING,
        "%s: %.2f GiB predicted of %.2f GiB, and %.2f GiB of host memory",
        prediction.name,
        prediction.peak_bytes / 2**30,
        room.device / 2**30,
        prediction.host_bytes / 2**30,
    )
    return result


__all__ = ["Room", "host_free", "room_found", "within"]
