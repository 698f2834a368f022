"""When copies to host memory and back run, and which of them hide under compute.

Each direction is one stream that runs its copies in order. A copy to the host begins as soon as its value is there; a
copy back begins as late as it can and still be there in time, so that the device's memory is taken late.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autosp_ir.analysis.cost import Cost, Link, link_seconds
from autosp_passes._host_copies import Candidate, Copy

FULL = "host= is used up"


@dataclass(frozen=True)
class Slot:
    """Where a copy stands in the program.

    Args:
        copy: The copy.
        of: The candidate that it belongs to.
        freed: Its wait on the way to the host stands in front of this place of the forward.
        reload: Its start on the way back stands in front of this place.
    """

    copy: Copy
    of: Candidate
    freed: int
    reload: int


class HostSchedule:
    """Places copies on the time of a program.

    Args:
        seconds: What each node takes, forward in front.
        forward: How many of them are the forward.
        link: What connects the device to host memory.
        curve: Bytes alive on the device while each node runs.
    """

    def __init__(self, seconds: Sequence[float], forward: int, link: Link, curve: Sequence[int]) -> None:
        self._begin: list[float] = [0.0, *np.cumsum(seconds).tolist()]
        self._forward = forward
        self._link = link
        self._curve = np.asarray(curve, dtype=np.int64)

    def idle(self, candidate: Candidate) -> float:
        """Seconds between the last use in the forward and the first one behind it."""
        return self._begin[min(c.read for c in candidate.copies)] - self._begin[candidate.used + 1]

    def place(self, chosen: Sequence[Candidate]) -> list[Slot] | str:
        """Where the copies of all that is chosen stand, in the order of their way back, or why they do not hide."""
        copies = [(copy, candidate) for candidate in chosen for copy in candidate.copies]
        freed: dict[Copy, int] = {}
        free = 0.0
        for copy, candidate in sorted(copies, key=lambda entry: entry[0].made):
            free = max(free, self._begin[copy.made + 1]) + self._seconds(copy)
            if free > self._begin[self._forward]:
                return "the copy to the host would end behind the forward"
            freed[copy] = max(candidate.used + 1, bisect_left(self._begin, free, hi=self._forward))
        slots: list[Slot] = []
        free = self._begin[-1]
        for copy, candidate in sorted(copies, key=lambda entry: (entry[0].read, entry[0].made), reverse=True):
            free = min(free, self._begin[copy.read]) - self._seconds(copy)
            if free < self._begin[self._forward]:
                return "the copy back would have to begin in front of the backward"
            place = bisect_right(self._begin, free, lo=self._forward, hi=copy.read + 1) - 1
            slots.append(Slot(copy, candidate, freed[copy], place))
        return slots[::-1]

    def peak(self, slots: Sequence[Slot]) -> int:
        """The most bytes alive on the device with these copies made."""
        change = np.zeros(len(self._curve) + 1, dtype=np.int64)
        freed: dict[Candidate, int] = {}
        for slot in slots:
            freed[slot.of] = max(freed.get(slot.of, 0), slot.freed)
            change[slot.reload] += slot.copy.bytes
            change[slot.of.dies + 1] -= slot.copy.bytes
        for candidate, place in freed.items():
            change[place] -= candidate.bytes
            change[candidate.dies + 1] += candidate.bytes
        curve: NDArray[np.int64] = self._curve + np.cumsum(change[:-1])
        return int(curve.max(initial=0))

    def _seconds(self, copy: Copy) -> float:
        return link_seconds(Cost(sent=copy.bytes), self._link)


@dataclass
class Selection:
    """What goes to host memory.

    Args:
        chosen: The candidates.
        slots: Where their copies stand, in the order of their way back.
        peak: Bytes alive at once with them, by the schedule.
        stays: The others, by reason.
    """

    chosen: list[Candidate]
    slots: list[Slot]
    peak: int
    stays: dict[str, list[Candidate]]


def select(candidates: Sequence[Candidate], schedule: HostSchedule, host: float, target: float) -> Selection:
    """Take what lies idle longest first, until the target is met or nothing more lowers the peak.

    Args:
        candidates: What may be offloaded.
        schedule: Places copies.
        host: Bytes of pinned memory to use.
        target: Bytes alive at once that are low enough.
    """
    chosen: list[Candidate] = []
    slots: list[Slot] = []
    stays: dict[str, list[Candidate]] = {}
    peak = schedule.peak(slots)
    left = host
    for candidate in sorted(candidates, key=lambda c: (-schedule.idle(c), -c.bytes, c.copies[0].made)):
        if peak <= target:
            stays.setdefault("the peak is low enough without it", []).append(candidate)
        elif candidate.host_bytes > left:
            stays.setdefault(FULL, []).append(candidate)
        elif isinstance(placed := schedule.place([*chosen, candidate]), str):
            stays.setdefault(placed, []).append(candidate)
        else:
            chosen.append(candidate)
            slots, peak, left = placed, schedule.peak(placed), left - candidate.host_bytes
    for candidate in chosen[::-1]:
        fewer = [c for c in chosen if c is not candidate]
        placed = schedule.place(fewer)
        if not isinstance(placed, str) and schedule.peak(placed) <= max(peak, target):
            chosen, slots, peak = fewer, placed, schedule.peak(placed)
            stays.setdefault("the peak is as low without it", []).append(candidate)
    return Selection(chosen, slots, peak, stays)


__all__ = ["FULL", "HostSchedule", "Selection", "Slot", "select"]
