"""A limit on time: it stops loops, spares what is done, and leaves the interpreter as it was."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

import autosp_ir as air
from autosp_ir.pipeline.timeout import time_limit

_TRACED = """
import sys
from autosp_ir.pipeline.timeout import time_limit
for seconds in (60.0, 0.05):
    try:
        with time_limit(seconds):
            while seconds < 1:
                pass
    except Exception as error:
        assert "still running" in str(error)
sys.settrace(lambda frame, event, argument: None)
(lambda: 1)()
"""


def test_a_loop_is_stopped_where_it_is() -> None:
    with pytest.raises(air.PassError, match=r"test_timeout\.py"), time_limit(0.05):
        while True:
            pass


def test_functions_can_be_traced_behind_a_limit() -> None:
    """An interpreter that looks for an exception for ever hangs in the first function that a debugger traces."""
    subprocess.run([sys.executable, "-c", _TRACED], check=True, timeout=60)


def test_another_error_wins_over_a_limit_that_is_just_running_out() -> None:
    for _ in range(20):
        with pytest.raises((ValueError, air.PassError)), time_limit(0.002):
            time.sleep(0.002)
            raise ValueError("the pass fails")
        assert threading.active_count() < 50


def test_what_is_done_in_time_stays_done() -> None:
    with time_limit(0.3):
        pass
    time.sleep(0.4)


def test_without_a_limit_nothing_is_timed() -> None:
    before = threading.active_count()
    with time_limit(None):
        assert threading.active_count() == before
