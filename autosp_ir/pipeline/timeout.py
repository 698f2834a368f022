"""A limit on the time of a pass, for passes that loop without changing anything."""

from __future__ import annotations

import ctypes
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
    thread, lock, finished, fired = threading.get_ident(), threading.Lock(), threading.Event(), threading.Event()

    def expire() -> None:
        with lock:
            if not finished.is_set():
                fired.set()
                _raise_in(thread)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                finished.set()
            timer.cancel()
        if fired.is_set():
            _let_it_arrive()
    except _OutOfTimeError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise TerminationError(
            f"still running after {seconds:g} s (at {frame.filename}:{frame.lineno})",
            hint="the pass loops for ever, or needs a longer timeout",
        ) from None
    except BaseException:
        if fired.is_set():
            with suppress(_OutOfTimeError):
                _let_it_arrive()
        raise


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_OutOfTimeError))


def _let_it_arrive() -> None:
    """Give an exception that is on its way to this thread the time to be raised here, and not in later code.

    Taking it back, which CPython also offers, leaves the interpreter asked to look for one for ever: from then on
    Python 3.11 never leaves the first line of a function that a debugger traces.
    """
    for _ in range(100):
        time.sleep(1e-3)


__all__ = ["time_limit"]
