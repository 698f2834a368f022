"""The order of one half as a constraint program, for OR-tools' CP-SAT (Perron and Furnon, https://developers.google.com/optimization).

Two resources that do one thing at a time: the compute stream, and each link. What takes no time is no task of the
program; it is put back where its operands are there. Memory is not part of it: the caller judges what comes back.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.streams import mesh_axis
from autosp_passes._schedule.problem import Problem

# Seconds become whole tenths of a microsecond.
_SCALE = 1e7


@dataclass(frozen=True)
class Solution:
    """What the solver found.

    Args:
        order: Tasks in order of their beginning; None when it found nothing in time.
        bound: Seconds that it proved no order to be shorter than.
        optimal: Whether `order` is as short as that.
    """

    order: list[int] | None
    bound: float
    optimal: bool


def solve(problem: Problem, hint: Sequence[int], effort: float) -> Solution:
    """Search for the shortest order.

    Args:
        problem: One half.
        hint: An order to start from.
        effort: How long to search, in CP-SAT's deterministic seconds, so that every rank finds the same.

    Raises:
        UnsupportedError: OR-tools is not installed.
    """
    cp_model = _or_tools()
    model = cp_model.CpModel()
    ticks = [round((problem.comm[i] or problem.compute[i]) * _SCALE) for i in range(len(problem.nodes))]
    horizon = sum(ticks)
    begins: dict[int, Any] = {}
    streams: dict[str, list[Any]] = {}
    for task, length in enumerate(ticks):
        if length:
            begins[task] = model.new_int_var(0, horizon, f"begin{task}")
            axis = problem.axis[task]
            stream = "compute" if axis is None else f"link {mesh_axis(axis)}"
            streams.setdefault(stream, []).append(model.new_fixed_size_interval_var(begins[task], length, f"run{task}"))
    for intervals in streams.values():
        model.add_no_overlap(intervals)
    for task, needed in _direct(problem, set(begins)).items():
        for each in needed:
            model.add(begins[task] >= begins[each] + ticks[each])
    end = model.new_int_var(0, horizon, "end")
    for task, begin in begins.items():
        model.add(end >= begin + ticks[task])
    for stream, intervals in streams.items():
        model.add(end >= sum(i.size_expr() for i in intervals)).with_name(stream)
    model.minimize(end)
    timeline = problem.timeline(hint)
    for task, begin in begins.items():
        model.add_hint(begin, round(timeline.begin[problem.nodes[task]] * _SCALE))
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = effort
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    status = solver.solve(model)
    bound = solver.best_objective_bound / _SCALE
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Solution(None, bound, False)
    at = {task: int(solver.value(begin)) for task, begin in begins.items()}
    return Solution(_with_the_rest(problem, at, ticks), bound, status == cp_model.OPTIMAL)


def _or_tools() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError as missing:
        raise UnsupportedError(
            "the solver cp-sat needs OR-tools, which is not installed",
            hint="pip install 'autosp_ir[schedule]', or use solver=lists",
        ) from missing
    return cp_model


def _direct(problem: Problem, tasks: set[int]) -> dict[int, set[int]]:
    """For each task with a length, those with a length that it waits for through nothing but tasks without."""
    through: list[set[int]] = []
    for needed in problem.before:
        sources: set[int] = set()
        for each in needed:
            sources |= {each} if each in tasks else through[each]
        through.append(sources)
    return {task: through[task] for task in tasks}


def _with_the_rest(problem: Problem, at: dict[int, int], ticks: Sequence[int]) -> list[int]:
    """All tasks by when they begin; what takes no time as soon as its operands are there.

    A start is issued when its operands are there, behind the starts in front of it: it waits in the queue of its link
    and not on the compute stream, where it would come behind work that began before the link was free.
    """
    ready = [0] * len(problem.nodes)
    time = [0] * len(problem.nodes)
    for task, needed in enumerate(problem.before):
        ready[task] = max((time[i] + ticks[i] for i in needed), default=0)
        time[task] = at.get(task, ready[task])
    issued: dict[str | None, int] = {}
    place = time[:]
    for task in sorted((t for t in at if problem.axis[t] is not None), key=lambda t: (at[t], t)):
        axis = problem.axis[task]
        place[task] = issued[axis] = max(ready[task], issued.get(axis, 0))
    missing = [len(needed) for needed in problem.before]
    heap = [(place[t], problem.axis[t] is None, t) for t, count in enumerate(missing) if not count]
    heapq.heapify(heap)
    order = []
    while heap:
        _, _, task = heapq.heappop(heap)
        order.append(task)
        for each in problem.after[task]:
            missing[each] -= 1
            if not missing[each]:
                heapq.heappush(heap, (place[each], problem.axis[each] is None, each))
    return order


__all__ = ["Solution", "solve"]
