"""Copies between a device and host memory that run beside compute: `torch.ops.autosp.offload`, `reload`, `wait_copy`.

| operator | does |
|---|---|
| `offload(x)` | starts a copy of `x` to pinned host memory |
| `reload(x, device)` | starts a copy of a value in host memory to a device |
| `wait_copy(copy, source)` | the copy, finished; keeps its source alive until then |

A copy may be read through its wait alone. On CUDA each direction has a side stream of its own. Memory is handed from
stream to stream by events: a copy starts behind what the compute stream has queued, and the compute stream waits for
its end. The source stays alive because the wait reads it, which holds for the buffers of compiled code as well, and
what a reload fills was allocated on the compute stream. So nothing is reused under a running copy, and no call of
`record_stream` keeps memory for longer than the program says. Pinned memory comes from torch's caching host allocator,
which keeps blocks from step to step and hands none out before the copies recorded on it are done: a forward that runs
twice before a backward gets other blocks. Where source and destination are both on the CPU, and in the simulator,
these are plain copies.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait, extend_op

OFFLOAD, RELOAD, WAIT_COPY = "autosp.offload", "autosp.reload", "autosp.wait_copy"

SCHEMAS = (
    "offload(Tensor x) -> Tensor",
    "reload(Tensor x, *, Device device) -> Tensor",
    "wait_copy(Tensor(a) copy, Tensor source) -> Tensor(a)",
)

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def starts_copy(node: Node) -> bool:
    """Whether the node starts a copy between a device and host memory."""
    return node.is_op(OFFLOAD, RELOAD)


def on_host(node: Node) -> bool:
    """Whether what the node gives stands in host memory: what was offloaded, in flight or awaited."""
    return node.is_op(OFFLOAD) or (node.is_op(WAIT_COPY) and node.operands[0].producer.is_op(OFFLOAD))


class _Copy(NamedTuple):
    """A copy on a side stream: when it is done, and what it must not lose until then."""

    done: torch.cuda.Event
    tensors: tuple[Tensor, Tensor]


_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
# By the address of the copy, which nothing else can have while the copy is alive.
_running: dict[int, _Copy] = {}
# The backward runs in a thread of autograd's.
_lock = threading.Lock()


def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    key = (device, direction)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device)
    return _streams[key]


def _copy(source: Tensor, target: Tensor, device: torch.device, direction: str) -> Tensor:
    """Start copying `source` to `target`, one of which is on the CUDA `device`, on its stream of that direction."""
    with _lock:
        stream = _stream(device, direction)
        # The source is being computed, and the target's memory may still be in use, by what is queued now.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = stream.record_event()
        # Copies whose wait never came, such as those of a step that failed.
        for address in [a for a, copy in _running.items() if copy.done.query()]:
            del _running[address]
        _running[target.untyped_storage().data_ptr()] = _Copy(done, (source, target))
    return target


def _offload(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return torch.empty_like(x, device="cpu").copy_(x)
    return _copy(x, torch.empty_like(x, device="cpu", pin_memory=True), x.device, "to host")


def _reload(x: Tensor, *, device: torch.device) -> Tensor:
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"host memory is reloaded to CUDA devices or the CPU, not to {device}", hint="leave `offload` out"
        )
    target = torch.empty_like(x, device=device)
    return _copy(x, target, target.device, "to device") if target.is_cuda else target.copy_(x)


def _wait_copy(copy: Tensor, source: Tensor) -> Tensor:
    device = copy.device if copy.is_cuda else source.device
    if device.type == "cuda":
        with _lock:
            running = _running.pop(copy.untyped_storage().data_ptr(), None)
        # Without an entry it was found done when a later copy started.
        if running is not None:
            torch.cuda.current_stream(device).wait_event(running.done)
    return _alias(copy)


def _alias(copy: Tensor, source: Tensor | None = None) -> Tensor:
    """The copy as another tensor on the same memory: an operator may not return its operand itself."""
    return copy.view(copy.shape)


def _offload_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


def _reload_shape(x: Tensor, *, device: torch.device) -> Tensor:
    return torch.empty_like(x, device=device)


def _plain_copy(x: Tensor, *, device: torch.device | None = None) -> Tensor:
    return x.clone()


def _awaited(copy: Tensor, source: Tensor) -> Tensor:
    return copy


for _name, _execute, _shape in (
    ("offload", _offload, _offload_shape),
    ("reload", _reload, _reload_shape),
    ("wait_copy", _wait_copy, _alias),
):
    LIBRARY.impl(_name, _execute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autosp::{_name}", _shape, lib=LIBRARY)

extend_op(torch.ops.autosp.offload.default, evaluate=_plain_copy)
extend_op(torch.ops.autosp.reload.default, evaluate=_plain_copy)
extend_op(torch.ops.autosp.wait_copy.default, traits=frozenset({Trait.PURE, Trait.VIEW}), evaluate=_awaited)

__all__ = ["OFFLOAD", "RELOAD", "WAIT_COPY", "on_host", "starts_copy"]
