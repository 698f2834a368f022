"""Candidates for the order of one half, and the best that fits in the memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from autosp_ir.analysis.timeline import Timeline
from autosp_passes._motion import loose_waits, start_early, wait_last, wait_late
from autosp_passes._schedule.cp_sat import solve
from autosp_passes._schedule.lists import Yielding, list_order
from autosp_passes._schedule.problem import Problem

_ANY = 10**9
# Places that work may run ahead of the program: most of a layer, without a bound, a few costed operations.
_AHEAD = (200, _ANY, 25)
# Work held back, in times of the longest exchange.
_RESERVES = (0, 1, 2, 4)
_NOISE = 0.03


@dataclass(frozen=True)
class Schedule:
    """One order and what it is worth.

    Args:
        name: How it was found.
        order: Tasks of the problem.
        timeline: The run of it.
        peak: The most bytes alive.
    """

    name: str
    order: tuple[int, ...]
    timeline: Timeline
    peak: int


def best(problem: Problem, cap: float, effort: float = 0.0) -> Schedule:
    """The fastest order within a memory cap; the program's own when none is.

    Args:
        problem: One half.
        cap: Bytes that may be alive at once. The program's own order is allowed whatever it takes.
        effort: How long to search with CP-SAT as well, in its deterministic seconds; 0 to leave it out.

    Raises:
        UnsupportedError: CP-SAT is wanted and not installed.
    """
    found = _judged(problem, "program order", range(len(problem.nodes)))
    if not any(problem.comm):
        return found
    bound = problem.lower_bound
    for name, order in _candidates(problem):
        if found.timeline.makespan <= bound * (1 + 1e-6):
            break
        candidate = _judged(problem, name, order)
        if candidate.peak <= cap and _key(candidate) < _key(found):
            found = candidate
    solved = solve(problem, found.order, effort).order if effort else None
    if solved is not None:
        candidate = _judged(problem, "cp-sat", settled(problem, solved))
        found = candidate if candidate.peak <= cap and _key(candidate) < _key(found) else found
    return _patient(problem, found, cap)


def _patient(problem: Problem, found: Schedule, cap: float) -> Schedule:
    """The same order, with as many waits at its end as the memory allows of those that only the caller needs.

    Where a link is slower than the estimate, a wait in the middle stalls all that stands behind it. The collectives
    that began last are the last to be done, so that their waits go first.
    """
    order = [problem.nodes[i] for i in found.order]
    waits = loose_waits(order)
    number = {node: i for i, node in enumerate(problem.nodes)}
    result, few, many = found, 0, len(waits)
    while few < many:
        count = (few + many + 1) // 2
        later = wait_last(order, waits[-count:])
        candidate = _judged(problem, found.name, [number[n] for n in later])
        slower = candidate.timeline.makespan > found.timeline.makespan * (1 + 1e-9)
        if slower or candidate.peak > max(cap, found.peak):
            many = count - 1
        else:
            result, few = candidate, count
    return result


def _key(schedule: Schedule) -> tuple[float, int]:
    return schedule.timeline.makespan, schedule.peak


def _judged(problem: Problem, name: str, order: Sequence[int]) -> Schedule:
    return Schedule(name, tuple(order), problem.timeline(order), problem.peak(order))


def _candidates(problem: Problem) -> Iterator[tuple[str, list[int]]]:
    own = [-float(i) for i in range(len(problem.nodes))]
    paths = problem.longest_paths()
    for overtake in (True, False):
        yield f"starts early, waits late {overtake=}", settled(problem, range(len(problem.nodes)), overtake)
    for ahead in _AHEAD:
        yield f"critical path, {_distance(ahead)}", settled(problem, list_order(problem, paths, ahead))
    # Of projections that wait for the same, the short ones first: their exchanges run under the long one.
    scale = 2 * max(problem.compute) or 1.0
    shortest = [-depth - compute / scale for depth, compute in zip(problem.depths(), problem.compute, strict=True)]
    for ahead in _AHEAD[:2]:
        yield f"shortest first, {_distance(ahead)}", settled(problem, list_order(problem, shortest, ahead))
    longest = max(problem.comm)
    spare = problem.spare()
    reduces = any(c for c, each in zip(problem.comm, spare, strict=True) if each)
    for yielding in get_args(Yielding) if reduces else get_args(Yielding)[:1]:
        for ahead in _AHEAD:
            for factor in _RESERVES if ahead > _AHEAD[-1] else _RESERVES[:1]:
                order = list_order(problem, own, ahead, factor * longest, yielding)
                name = (
                    f"program order, {_distance(ahead)}, {factor} exchanges of work in reserve, reductions {yielding}"
                )
                yield name, settled(problem, order)
    # The same on every rank.
    draw = random.Random(0)
    for ahead in _AHEAD[:2]:
        urgency = [path * (1 + _NOISE * draw.random()) for path in paths]
        yield f"critical path, perturbed, {_distance(ahead)}", settled(problem, list_order(problem, urgency, ahead))


def _distance(ahead: int) -> str:
    return "any distance" if ahead == _ANY else f"{ahead} operations ahead"


def settled(problem: Problem, order: Sequence[int], overtake: bool = False) -> list[int]:
    """Starts as early and waits as late as the order of costed work allows."""
    number = {node: i for i, node in enumerate(problem.nodes)}
    return [number[n] for n in wait_late(start_early([problem.nodes[i] for i in order], overtake=overtake))]


__all__ = ["Schedule", "best", "settled"]
