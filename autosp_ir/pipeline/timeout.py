"""A limit on the time of a pass, for passes that loop without changing anything."""

from __future__ import annotations

import ctypes
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from autosp_ir.errors import TerminationError


class _OutOfTimeError(BaseException):
    """Raised in the thread of a pass; no `except Exception` in the pass stops it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Stop what runs inside after some time, between two steps of Python code.

    Args:
        seconds: How long it may take; None sets no limit.

    Raises:
        TerminationError: It took longer; the message says where it was.
    """
    if seconds is None:
        yield
        return
    thread, lock, finished = threading.get_ident(), threading.Lock(), threading.Event()

    def expire() -> None:
        with lock:
            if not finished.is_set():
                _raise_in(thread, _OutOfTimeError)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                finished.set()
                _raise_in(thread, None)
            timer.cancel()
    except _OutOfTimeError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise TerminationError(
            f"still running after {seconds:g} s (at {frame.filename}:{frame.lineno})",
            hint="the pass loops for ever, or needs a longer timeout",
        ) from None


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise in another thread, or take back what it has not noticed yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(kind) if kind is not None else None
    )


__all__ = ["time_limit"]
