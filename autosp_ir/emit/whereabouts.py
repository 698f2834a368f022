"""Where a thread of this process is, and whether it does anything."""

from __future__ import annotations

import sys
import sysconfig
import time
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_FOREIGN = (_TORCH, str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"], "<")
_INSTALLED = "site-packages"


def work_clock(thread: int) -> float:
    """A number that stands still while a thread does nothing of its own accord.

    Processor time in tenths of a second. Inside torch it always advances: what waits there for a collective, a
    checkpoint's disk or a loader's workers is not idle, and has timeouts of its own.

    Args:
        thread: From `threading.get_ident()`.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        # It has ended, and its clock with it: asking for that one fails, and a watch that fails is silent, which the
        # others take for death. Whatever goes on in the process counts.
        return round(time.process_time(), 1)
    in_torch = frame.f_code.co_filename.startswith(_TORCH)
    if in_torch or not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return round(time.clock_gettime(time.pthread_getcpuclockid(thread)), 1)


def whereabouts(thread: int) -> str:
    """`file:line in function` of the innermost frame of a thread that is the user's code; empty if none is."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_FOREIGN) and _INSTALLED not in code.co_filename:
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return ""


__all__ = ["whereabouts", "work_clock"]
