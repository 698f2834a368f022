"""Copies to host memory and back that take as long as they may: what a GPU can do to a step, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from autosp_ir.comm import host_memory

_POISON = float("nan")


@contextmanager
def late_copies() -> Iterator[list[int]]:
    """Inside, a copy reads its source only when it is awaited, and is not a number until then.

    A wait holds up the device alone. So what was copied to host memory stays no number for the host until the copy back
    begins, which a GPU does behind it.

    Yields:
        The bytes of each copy, as they are awaited.
    """
    begin, finish = host_memory._plainly, host_memory._alias
    pending: dict[int, tuple[Tensor, Tensor, bool]] = {}
    landing: dict[int, tuple[Tensor, Tensor]] = {}
    awaited: list[int] = []

    def start(source: Tensor, target: Tensor, to_host: bool) -> Tensor:
        if source.data_ptr() in landing:
            host, value = landing.pop(source.data_ptr())
            host.copy_(value)
        begin(source, target, to_host)
        if target.is_floating_point():
            target.fill_(_POISON)
        pending[target.data_ptr()] = (source, target, to_host)
        return target

    def end(copy: Tensor) -> Tensor:
        source, target, to_host = pending.pop(copy.data_ptr())
        if to_host:
            landing[target.data_ptr()] = (target, source.clone())
        else:
            target.copy_(source)
        awaited.append(target.nbytes)
        return finish(copy)

    with mock.patch.object(host_memory, "_plainly", start), mock.patch.object(host_memory, "_alias", end):
        yield awaited


__all__ = ["late_copies"]
