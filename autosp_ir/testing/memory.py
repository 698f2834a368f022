"""What a step really holds: live storages, counted operation by operation while it runs."""

from __future__ import annotations

import itertools
import json
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autosp_ir._torch_compat import TorchDispatchMode, pytree_map
from autosp_ir.comm.chunk_loop import IMPLEMENTATIONS
from autosp_ir.errors import SimulationError

T = TypeVar("T")


class StorageTracker(TorchDispatchMode):
    """Live bytes of every storage that an operation allocates, by the storages' real lifetimes.

    Storages that operations only read belong to the caller and are not counted; neither is work space inside an
    operation, nor what is offloaded to host memory.

    Args:
        inputs: Tensors that are not counted even when an operation returns a view of them first.
    """

    def __init__(self, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(x.untyped_storage() for x in inputs)
        self.live = 0
        self.peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it returns."""
        pytree_map(self._ignore, (args, kwargs or {}))
        if func in IMPLEMENTATIONS:
            # A loop runs operations of its own, which allocate like any other.
            with self:
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        pytree_map(self._ignore if func is torch.ops.autosp.offload.default else self._track, result)
        return result

    def _ignore(self, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            self._seen.add(leaf.untyped_storage())

    def _track(self, leaf: Any) -> None:
        if not isinstance(leaf, Tensor) or leaf.untyped_storage() in self._seen:
            return
        storage = leaf.untyped_storage()
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def measured_peak(step: nn.Module, batch: Mapping[str, Any]) -> int:
    """The most bytes one forward and backward of an emitted module hold beside its parameters and inputs.

    Args:
        step: An emitted module, backend `aot_eager`, whose output has a loss, is one, or has it in front. Its
            gradients are dropped before and after.
        batch: Keyword arguments for it.

    Returns:
        Bytes, gradients among them.

    Raises:
        SimulationError: The output has no scalar to differentiate.
    """
    step.zero_grad(set_to_none=True)
    known = [*step.parameters(), *step.buffers(), *(v for v in batch.values() if isinstance(v, Tensor))]
    with StorageTracker(known) as tracker:
        _loss_of(step(**batch)).backward()
    step.zero_grad(set_to_none=True)
    peak: int = tracker.peak
    return peak


def allocated_peak(function: Callable[[], T]) -> tuple[T, int, int]:
    """Run a function and follow the CPU allocator, which compiled code asks without any operation of torch.

    Args:
        function: Called once, under torch's profiler.

    Returns:
        Its result, the most bytes it held at once, and those it left behind (negative: it freed more than it made).
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    moves = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    live = list(itertools.accumulate(bytes_ for _, bytes_ in moves))
    return result, max([0, *live]), live[-1] if live else 0


def _loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None:
        loss = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
        return loss
    raise SimulationError(
        f"there is no loss to differentiate in {type(output).__name__}",
        hint="capture with outputs=['loss'] or with loss_fn= for a loss outside the model",
    )


__all__ = ["StorageTracker", "allocated_peak", "measured_peak"]
