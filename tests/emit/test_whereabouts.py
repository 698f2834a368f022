"""The clock of a thread's work, for every state that the thread may be in."""

from __future__ import annotations

import threading
import time

from autosp_ir.emit.whereabouts import whereabouts, work_clock


def test_a_thread_that_has_ended_has_a_clock() -> None:
    """Steps may have run in a thread that is gone; its own clock must not be asked for."""
    ended: list[int] = []
    threads = [threading.Thread(target=lambda: ended.append(threading.get_ident())) for _ in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    for ident in ended:
        assert 0 <= work_clock(ident) <= time.process_time() + 1
        assert whereabouts(ident) == ""


def test_a_thread_that_waits_stands_still_and_one_that_works_does_not() -> None:
    wake = threading.Event()
    thread = threading.Thread(target=wake.wait, daemon=True)
    thread.start()
    assert thread.ident is not None
    before, mine = work_clock(thread.ident), work_clock(threading.get_ident())
    end = time.process_time() + 0.25
    while time.process_time() < end:
        pass
    assert work_clock(thread.ident) == before
    assert work_clock(threading.get_ident()) > mine
    wake.set()
    thread.join()
