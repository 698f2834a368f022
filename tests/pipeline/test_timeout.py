"""A limit on time: it stops loops, spares what is done, and leaves the interpreter as it was."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

import autosp_ir as air
from autosp_ir.pipeline import timeout
from autosp_ir.pipeline.timeout import call_within

_TRACED = """
import sys
from autosp_ir.pipeline.timeout import call_within
def work():
    while seconds < 1:
        pass
for seconds in (60.0, 0.05):
    try:
        call_within(seconds, work)
    except Exception as error:
        assert "still running" in str(error)
sys.settrace(lambda frame, event, argument: None)
(lambda: 1)()
"""


def _loop() -> None:
    while True:
        pass


def _fail() -> None:
    time.sleep(0.001)
    raise ValueError("the pass fails")


def test_a_loop_is_stopped_where_it_is() -> None:
    with pytest.raises(air.PassError, match=r"test_timeout\.py"):
        call_within(0.05, _loop)


def test_functions_can_be_traced_behind_a_limit() -> None:
    """An interpreter that looks for an exception for ever hangs in the first function that a debugger traces."""
    subprocess.run([sys.executable, "-c", _TRACED], check=True, timeout=60)


@pytest.mark.parametrize("seconds", [0.0, 1e-5, 1e-4, 5e-4, 1e-3, 1.1e-3])
def test_a_limit_that_runs_out_anywhere_ends_in_an_error_with_a_name(seconds: float) -> None:
    """What stops a pass may be raised while the limit is still being set, or while another error is on its way."""
    for _ in range(20):
        with pytest.raises((ValueError, air.PassError)):
            call_within(seconds, _fail)
        assert threading.active_count() < 50


def test_an_error_that_came_first_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit runs out while the error is on its way: what it raises arrives behind the error."""
    failure, fired = ValueError("the pass fails"), threading.Event()

    def fail() -> None:
        assert fired.wait(10)
        raise failure

    def arrive() -> None:
        raise timeout._OutOfTimeError

    monkeypatch.setattr(timeout, "_raise_in", lambda thread: fired.set())
    monkeypatch.setattr(timeout, "_let_it_arrive", arrive)
    with pytest.raises(ValueError, match="the pass fails") as raised:
        call_within(0.001, fail)
    assert raised.value is failure and raised.value.__context__ is None


def test_what_is_done_in_time_stays_done() -> None:
    assert call_within(0.3, lambda: 7) == 7
    time.sleep(0.4)


def test_without_a_limit_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(threading, "Timer")
    assert call_within(None, lambda: 7) == 7
