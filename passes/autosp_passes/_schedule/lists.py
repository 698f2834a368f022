"""List scheduling: whenever the compute stream is free, the most urgent task that is ready.

A start costs the compute stream nothing and goes out as soon as it can. A wait whose collective is not done yet is put
off for as long as there is other work. Work that nothing costed waits for, in a backward the gradients of weights, can
be held in reserve for such moments. Both cost memory, so both are bounded: what runs early holds its result, and what
runs late its operands. Collectives of such work, the reductions of those gradients, can be kept out of the way of
others.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Literal

from autosp_ir.analysis.channels import Channels
from autosp_ir.comm.host_memory import starts_copy
from autosp_passes._schedule.problem import Problem

Yielding = Literal["at once", "covered", "idle"]


def list_order(
    problem: Problem,
    urgency: Sequence[float],
    ahead: int,
    reserve: float = 0.0,
    yielding: Yielding = "at once",
) -> list[int]:
    """An order by list scheduling.

    Args:
        problem: The tasks.
        urgency: Of each task; the greatest goes first, the program's own order decides between equals.
        ahead: How many places in front of the first task that is not done a task may be.
        reserve: Seconds of work that nothing costed waits for which may be held back.
        yielding: When collectives that nothing costed waits for go out: at once, `covered` by a task that is longer
            than they take, or also whenever their link is idle.
    """
    return _Lists(problem, urgency, ahead, reserve, yielding).run()


class _Lists:
    """One run.

    Args:
        problem: The tasks.
        urgency: As in `list_order`.
        ahead: Likewise.
        reserve: Likewise.
        yielding: Likewise.
    """

    def __init__(
        self,
        problem: Problem,
        urgency: Sequence[float],
        ahead: int,
        reserve: float,
        yielding: Yielding,
    ) -> None:
        self._problem = problem
        self._urgency = urgency
        self._ahead = ahead
        self._most_reserved = reserve
        self._reserved = 0.0
        self._reserve: deque[int] = deque()
        self._yielding = yielding
        self._postponed: deque[int] = deque()
        self._spare = problem.spare()
        self._last_long = self._find_last_long() if yielding == "covered" else len(problem.nodes)
        self._missing = [len(needed) for needed in problem.before]
        self._work: list[tuple[float, int]] = []
        self._starts: list[tuple[float, int]] = []
        self._waits: list[int] = []
        self._far: list[int] = []
        self._done = [False] * len(problem.nodes)
        self._first = 0
        self._now = 0.0
        self._channels: Channels[int] = Channels()
        self._order: list[int] = []

    def run(self) -> list[int]:
        """Order all tasks."""
        for task, missing in enumerate(self._missing):
            if not missing:
                heapq.heappush(self._far, task)
        self._admit()
        while len(self._order) < len(self._missing):
            self._place(self._next())
        return self._order

    def _admit(self) -> None:
        """Let in what is ready and no longer too far ahead."""
        while self._first < len(self._done) and self._done[self._first]:
            self._first += 1
        while self._far and self._far[0] <= self._first + self._ahead:
            task = heapq.heappop(self._far)
            if self._problem.start[task] is not None:
                self._waits.append(task)
                continue
            starts = self._problem.axis[task] is not None
            if self._spare[task] and starts and self._yielding != "at once":
                self._postponed.append(task)
                continue
            if self._spare[task] and not starts and self._most_reserved:
                self._reserve.append(task)
                self._reserved += self._problem.compute[task]
                continue
            heap = self._starts if starts else self._work
            heapq.heappush(heap, (-self._urgency[task], task))

    def _next(self) -> int:
        if self._starts:
            return heapq.heappop(self._starts)[1]
        self._channels.advance(self._now)
        for wait in self._waits:
            if self._channels.is_done(self._started(wait)):
                return self._take(wait)
        return self._next_work()

    def _next_work(self) -> int:
        """The next task that takes time, or a postponed start that it covers."""
        full = self._reserved > self._most_reserved
        if self._work and self._work[0][1] == self._last_long:
            full = True
            self._most_reserved = 0.0
        from_reserve = bool(self._reserve) and (full or not self._work)
        if not from_reserve and not self._work:
            if self._postponed:
                return self._postponed.popleft()
            return self._take(self._soonest(self._waits))
        task = self._reserve[0] if from_reserve else self._work[0][1]
        if self._postponed and self._covers(task, self._postponed[0]):
            return self._postponed.popleft()
        if from_reserve:
            self._reserved -= self._problem.compute[task]
            return self._reserve.popleft()
        return heapq.heappop(self._work)[1]

    def _find_last_long(self) -> int:
        """The last task that covers any collective nothing costed waits for."""
        problem = self._problem
        longest = max((c for c, spare in zip(problem.comm, self._spare, strict=True) if spare), default=0.0)
        long = (i for i in reversed(range(len(problem.nodes))) if problem.compute[i] > longest > 0)
        return next(long, len(problem.nodes))

    def _covers(self, task: int, start: int) -> bool:
        """Whether a collective may go out in front of a task."""
        axis = self._problem.axis[start] or ""
        backlog = self._channels.backlog(axis)
        if backlog and self._problem.crowds[task]:
            return False
        idle = self._yielding == "idle" and not backlog
        return idle or backlog + self._problem.comm[start] <= self._problem.compute[task]

    def _soonest(self, waits: Sequence[int]) -> int:
        started = {self._started(w): w for w in waits}
        return started[self._channels.soonest(started)[0]]

    def _take(self, wait: int) -> int:
        self._waits.remove(wait)
        return wait

    def _started(self, wait: int) -> int:
        start = self._problem.start[wait]
        assert start is not None
        return start

    def _place(self, task: int) -> None:
        axis = self._problem.axis[task]
        if axis is not None:
            room = not starts_copy(self._problem.nodes[task])
            self._channels.start(task, axis, self._problem.comm[task], self._now, room=room)
        elif self._problem.start[task] is not None:
            self._now = max(self._now, self._channels.done_at(self._started(task)))
        self._channels.advance(self._now)
        self._now += self._problem.compute[task]
        self._channels.advance(self._now, crowded=self._problem.crowds[task])
        self._order.append(task)
        self._done[task] = True
        for each in self._problem.after[task]:
            self._missing[each] -= 1
            if not self._missing[each]:
                heapq.heappush(self._far, each)
        self._admit()


__all__ = ["list_order"]
