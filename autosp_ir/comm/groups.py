"""From the axis names of a program to the process groups of a run.

Programs name mesh axes logically ("sp"). At run time an `autosp::` operator resolves its axis to a process group:
either a logical name bound by `bind_axis`, or the name of a c10d group, which is what emission writes into a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from autosp_ir._torch_compat import resolve_group_name
from autosp_ir.errors import RuntimeMismatchError

# Bindings are process-wide, not thread-local: autograd runs CUDA backwards on its own threads.
_BOUND: dict[str, list[dist.ProcessGroup]] = {}


@contextmanager
def bind_axis(axis: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Resolve the logical axis name `axis` to `group` inside the context; the innermost binding wins.

    Args:
        axis: The logical name that the program uses, such as "sp".
        group: The process group that carries the axis.
    """
    stack = _BOUND.setdefault(axis, [])
    stack.append(group)
    try:
        yield
    finally:
        stack.pop()
        if not stack:
            _BOUND.pop(axis, None)


def resolve(axis: str) -> dist.ProcessGroup:
    """Find the process group of an axis.

    Args:
        axis: A logical name bound by `bind_axis`, or a c10d group name.

    Raises:
        RuntimeMismatchError: torch.distributed is not running, or no group answers to the name.
    """
    if axis in _BOUND:
        return _BOUND[axis][-1]
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeMismatchError(
            f"axis {axis!r} needs a process group, but torch.distributed is not initialized",
            hint="start the script with torchrun and call torch.distributed.init_process_group(), "
            "or run every rank in this process with autosp_ir.simulate(program, batch)",
        )
    group = resolve_group_name(axis)
    if group is None:
        raise RuntimeMismatchError(
            f"no process group is bound to axis {axis!r}",
            hint="emit the program with a device mesh that has this axis, "
            "or wrap the call in autosp_ir.comm.groups.bind_axis(axis, group)",
        )
    return group


def group_of(axis: str, size: int) -> dist.ProcessGroup | None:
    """Find the process group of an axis and check its size; None when the axis has one rank and needs no group.

    Args:
        axis: As in `resolve`.
        size: The axis size that the program was built for.

    Raises:
        RuntimeMismatchError: As in `resolve`, or the group has another size.
    """
    if size == 1 and axis not in _BOUND:
        return None
    group = resolve(axis)
    actual = dist.get_world_size(group)
    if actual != size:
        raise RuntimeMismatchError(
            f"the program was built for {size} rank(s) on axis {axis!r}, but its process group has {actual}",
            hint=f"run it on {size} rank(s), or partition the model again for a mesh of {{{axis!r}: {actual}}}",
        )
    return None if size == 1 else group
