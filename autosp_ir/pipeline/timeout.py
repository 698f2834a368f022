"""A limit on the time of a pass, for passes that loop without changing anything."""

from __future__ import annotations

import ctypes
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from autosp_ir.errors import TerminationError

_T = TypeVar("_T")


class _OutOfTimeError(BaseException):
    """Raised in the thread of a pass; no `except Exception` in the pass stops it."""


def call_within(seconds: float | None, work: Callable[[], _T]) -> _T:
    """Call a function, and stop it after some time, between two steps of Python code.

    This is no context manager: CPython raises the exception that stops `work` wherever the thread happens to be, and
    the code that enters and leaves a `with` block is outside of any `try` of its own.

    Args:
        seconds: How long it may take; None sets no limit.
        work: What to call, without arguments, in this thread.

    Returns:
        What `work` returns.

    Raises:
        TerminationError: It took longer; the message says where it was. An error of `work` that came first is raised
            as it is.
    """
    if seconds is None:
        return work()
    thread, lock, finished, fired = threading.get_ident(), threading.Lock(), threading.Event(), threading.Event()
    failure: BaseException | None = None
    arrived = False

    def expire() -> None:
        with lock:
            if not finished.is_set():
                fired.set()
                _raise_in(thread)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    try:
        try:
            timer.start()
            return work()
        except _OutOfTimeError:
            arrived = True
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            with lock:
                finished.set()
            timer.cancel()
            if fired.is_set() and not arrived:
                _let_it_arrive()
    except _OutOfTimeError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
    if failure is not None:
        raise failure
    raise TerminationError(
        f"still running after {seconds:g} s (at {frame.filename}:{frame.lineno})",
        hint="the pass loops for ever, or needs a longer timeout",
    )


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_OutOfTimeError))


def _let_it_arrive() -> None:
    """Give an exception that is on its way to this thread the time to be raised here, and not in later code.

    Taking it back, which CPython also offers, leaves the interpreter asked to look for one for ever: from then on
    Python 3.11 never leaves the first line of a function that a debugger traces.
    """
    for _ in range(100):
        time.sleep(1e-3)


__all__ = ["call_within"]
