"""Copies between a device and host memory that run beside compute: `torch.ops.autosp.offload`, `reload`, `wait_copy`.

| operator | does |
|---|---|
| `offload(x, stride=None)` | starts a copy of `x` to pinned host memory, in strides of its own or in those of `x` |
| `reload(x, device)` | starts a copy of what was offloaded to a device |
| `wait_copy(copy, source)` | the copy, finished; keeps its source alive until then |

A copy may be read through its wait alone. A wait makes the compute stream wait, not the host: what lies in host memory
may still be on its way then, so that no operation of the host's may read it, be it only to give it other strides. A
compiler must be told the strides that it has to have (`name_strides`), and what is reloaded must be what was offloaded.

On CUDA each direction has a side stream of its own. Memory is handed from
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
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait, extend_op

OFFLOAD, RELOAD, WAIT_COPY = "autosp.offload", "autosp.reload", "autosp.wait_copy"

SCHEMAS = (
    "offload(Tensor x, *, SymInt[]? stride=None) -> Tensor",
    "reload(Tensor x, *, Device device) -> Tensor",
    "wait_copy(Tensor(a) copy, Tensor source) -> Tensor(a)",
)

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    # Any strides will do. For strides of its own Inductor would copy an operand once for the start and once for the
    # wait, which then would keep the wrong copy alive.
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def starts_copy(node: Node) -> bool:
    """Whether the node starts a copy between a device and host memory."""
    return node.is_op(OFFLOAD, RELOAD)


def on_host(node: Node) -> bool:
    """Whether what the node gives stands in host memory: what was offloaded, in flight or awaited."""
    return node.is_op(OFFLOAD) or (node.is_op(WAIT_COPY) and node.operands[0].producer.is_op(OFFLOAD))


def name_strides(graph: fx.Graph) -> None:
    """Write the strides of what is offloaded into its start, in place.

    A compiler that chooses strides for a value would otherwise choose those of its copy, and where others are asked
    for, have the host copy it once more.

    Args:
        graph: A traced graph with fake values in `meta["val"]`.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.autosp.offload.default):
        node.kwargs = {**node.kwargs, "stride": list(node.meta["val"].stride())}


class _Copy(NamedTuple):
    """A copy that was started and not awaited: its end, where it reads, and what it must not lose until it is done."""

    done: torch.cuda.Event | None
    source: int
    tensors: tuple[Tensor, ...]
    to_host: bool


_streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
# By the address of the copy, which nothing else can have while the copy is alive.
_running: dict[int, _Copy] = {}
# Addresses of awaited copies in host memory, as long as they live.
_at_rest: set[int] = set()
# The backward runs in a thread of autograd's.
_lock = threading.Lock()


def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    key = (device, direction)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device)
    return _streams[key]


def _copy(source: Tensor, target: Tensor, to_host: bool) -> Tensor:
    """Start copying `source` to `target`, between CUDA and host memory, on the stream of that direction."""
    device = source.device if to_host else target.device
    with _lock:
        staged = _staged(source, target) if to_host else source
        stream = _stream(device, "to host" if to_host else "to device")
        # The source is being computed, and the target's memory may still be in use, by what is queued now.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(staged, non_blocking=True)
            done = stream.record_event()
        # Copies whose wait never came, such as those of a step that failed.
        for address, copy in _running.items():
            if copy.tensors and copy.done is not None and copy.done.query():
                _running[address] = copy._replace(tensors=())
        _running[_address(target)] = _Copy(done, source.data_ptr(), (staged, target), to_host)
    return target


def _staged(source: Tensor, target: Tensor) -> Tensor:
    """The source in the strides of the target.

    Torch copies between other strides through memory that is not pinned, and reads that without waiting for the device.
    """
    if source.stride() == target.stride():
        return source
    return torch.empty_strided(target.shape, target.stride(), dtype=source.dtype, device=source.device).copy_(source)


def _plainly(source: Tensor, target: Tensor, to_host: bool) -> Tensor:
    """Copy without a stream; the wait is checked all the same."""
    target.copy_(source)
    with _lock:
        _running[_address(target)] = _Copy(None, source.data_ptr(), (), to_host)
    return target


def _address(copy: Tensor) -> int:
    return copy.untyped_storage().data_ptr()


def _on_host(x: Tensor, stride: Sequence[int] | None, pinned: bool = False) -> Tensor:
    own = stride if stride is not None else torch.empty_like(x, device="meta").stride()
    return torch.empty_strided(x.shape, own, dtype=x.dtype, device="cpu", pin_memory=pinned)


def _offload(x: Tensor, *, stride: Sequence[int] | None = None) -> Tensor:
    start = _copy if x.is_cuda else _plainly
    return start(x, _on_host(x, stride, pinned=x.is_cuda), to_host=True)


def _reload(x: Tensor, *, device: torch.device) -> Tensor:
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"host memory is reloaded to CUDA devices or the CPU, not to {device}", hint="leave `offload` out"
        )
    if x.numel() and _address(x) not in _at_rest:
        raise UnsupportedError(
            "what is reloaded was not offloaded, so that it may have been copied before it was there",
            hint='the compiler gave it other strides: use backend="aot_eager", or leave `offload` out',
        )
    target = torch.empty_like(x, device=device)
    start = _copy if target.is_cuda else _plainly
    return start(x, target, to_host=False)


def _wait_copy(copy: Tensor, source: Tensor) -> Tensor:
    if copy.numel() == 0:
        return _alias(copy)
    with _lock:
        running = _running.pop(_address(copy), None)
    if running is None or running.source != source.data_ptr():
        raise UnsupportedError(
            "a copy to or from host memory is awaited with another source than it was started with, so that its source "
            "may have been overwritten",
            hint='the compiler took another copy of the operand: use backend="aot_eager", or leave `offload` out',
        )
    if running.to_host:
        _at_rest.add(_address(copy))
        weakref.finalize(copy.untyped_storage(), _at_rest.discard, _address(copy)).atexit = False
    if running.done is not None:
        device = copy.device if copy.is_cuda else source.device
        torch.cuda.current_stream(device).wait_event(running.done)
    return _alias(copy)


def _alias(copy: Tensor, source: Tensor | None = None) -> Tensor:
    """The copy as another tensor on the same memory: an operator may not return its operand itself."""
    return copy.view(copy.shape)


def _offload_shape(x: Tensor, *, stride: Sequence[int] | None = None) -> Tensor:
    return _on_host(x, stride)


def _reload_shape(x: Tensor, *, device: torch.device) -> Tensor:
    return torch.empty_like(x, device=device)


def _plain_copy(x: Tensor, *, stride: Sequence[int] | None = None, device: torch.device | None = None) -> Tensor:
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

__all__ = ["OFFLOAD", "RELOAD", "WAIT_COPY", "name_strides", "on_host", "starts_copy"]
