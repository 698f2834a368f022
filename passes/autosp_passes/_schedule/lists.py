"""List scheduling: whenever the compute stream is free, the most urgent task that is ready.

A start costs the compute stream nothing and goes out as soon as it can. A wait whose collective is not done yet is put
off for as long as there is other work. How far work may run ahead of the program's own order is bounded: what runs
early holds its result, and what runs late its operands.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from autosp_ir.analysis.channels import Channels
from autosp_passes._schedule.problem import Problem


def list_order(problem: Problem, urgency: Sequence[float], ahead: int, patience: float = 0.0) -> list[int]:
    """An order by list scheduling.

    Args:
        problem: The tasks.
        urgency: Of each task; the greatest goes first, the program's own order decides between equals.
        ahead: How many places in front of the first task that is not done a task may be.
        patience: A more urgent wait is waited for if that takes less than this part of the next task's time.
    """
    return _Lists(problem, urgency, ahead, patience).run()


class _Lists:
    """One run.

    Args:
        problem: The tasks.
        urgency: As in `list_order`.
        ahead: Likewise.
        patience: Likewise.
    """

    def __init__(self, problem: Problem, urgency: Sequence[float], ahead: int, patience: float) -> None:
        self._problem = problem
        self._urgency = urgency
        self._ahead = ahead
        self._patience = patience
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
            heap = self._starts if self._problem.axis[task] is not None else self._work
            heapq.heappush(heap, (-self._urgency[task], task))

    def _next(self) -> int:
        if self._starts:
            return heapq.heappop(self._starts)[1]
        self._channels.advance(self._now)
        for wait in self._waits:
            if self._channels.is_done(self._started(wait)):
                return self._take(wait)
        if not self._work:
            return self._take(self._soonest(self._waits))
        task = self._work[0][1]
        urgent = [w for w in self._waits if self._urgency[w] > self._urgency[task]] if self._patience else []
        if urgent:
            soonest = self._soonest(urgent)
            stall = self._channels.done_at(self._started(soonest)) - self._now
            if stall < self._patience * self._problem.compute[task]:
                return self._take(soonest)
        return heapq.heappop(self._work)[1]

    def _soonest(self, waits: Sequence[int]) -> int:
        return min(waits, key=lambda w: (self._channels.done_at(self._started(w)), -self._urgency[w], w))

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
            self._channels.start(task, axis, self._problem.comm[task], self._now)
        elif self._problem.start[task] is not None:
            self._now = max(self._now, self._channels.done_at(self._started(task)))
        self._now += self._problem.compute[task]
        self._order.append(task)
        self._done[task] = True
        for each in self._problem.after[task]:
            self._missing[each] -= 1
            if not self._missing[each]:
                heapq.heappush(self._far, each)
        self._admit()


__all__ = ["list_order"]
