"""When a watch ends its process: only while that waits in vain, never while it says why it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from autosp_ir.emit import watch as module
from autosp_ir.emit.peers import Line
from autosp_ir.emit.watch import Watch
from autosp_ir.errors import RankFailureError
from tests.emit.faulty import free_port

VERDICT = "rank 1 failed in the forward of step 3"


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(module, "_GRACE", 0.0)
    monkeypatch.setattr(module, "_LINGER", 0.0)
    return codes


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """A watch over a group of one, whose thread does nothing of its own."""
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    watch = Watch(patience=20.0)
    yield watch
    watch.stop()
    dist.destroy_process_group()


@pytest.fixture
def line(alone: Watch) -> Line:
    assert dist.group.WORLD is not None
    return alone.line(dist.group.WORLD)


def test_a_rank_that_stays_in_a_collective_is_ended_and_says_why(
    alone: Watch, line: Line, ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    alone.verdict = VERDICT
    with alone.inside([line], "forward"):
        alone._enforce()
    assert ended == [1]
    assert VERDICT in capsys.readouterr().err


def test_a_rank_that_has_left_its_collective_is_not_ended_though_its_time_is_up(
    alone: Watch, line: Line, ended: list[int]
) -> None:
    alone.verdict = VERDICT
    with pytest.raises(RankFailureError, match=VERDICT), alone.inside([line], "forward"):
        raise RuntimeError("gloo/transport: Connection closed by peer")
    alone._enforce()
    assert not ended


def test_a_rank_is_not_ended_while_it_tells_the_others_of_its_error(alone: Watch, line: Line, ended: list[int]) -> None:
    asked = []

    class NoMemory(Exception):
        def __str__(self) -> str:
            asked.append(line.inside)
            alone._enforce()
            return "no memory"

    with pytest.raises(NoMemory), alone.inside([line], "forward"):
        raise NoMemory
    assert asked[0], "the others are told from inside of the part"
    assert not ended


def test_a_rank_that_raises_what_it_learns_at_the_start_of_a_step_is_not_ended(
    alone: Watch, line: Line, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "_talk", lambda *_: setattr(alone, "verdict", VERDICT))
    with pytest.raises(RankFailureError, match=VERDICT):
        alone.exchange(line, "a batch")
    alone._enforce()
    assert not ended
