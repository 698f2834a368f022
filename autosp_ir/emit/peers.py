"""What a rank knows of those it works with, and what it makes of an error: who is the cause?"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from dataclasses import dataclass, field

import torch.distributed as dist

SILENCE = 12.0
"""Seconds without a word after which a rank is held to be dead."""

# What gloo, NCCL and the store write when the other end is the cause.
_COMMUNICATION = ("gloo/", "NCCL", "Connection ", "Broken pipe", "Timed out", "timed out", "ncclComm")


@dataclass
class Line:
    """Ranks that run the same steps together.

    Attributes:
        name: Name of the process group, the same on all of them.
        ranks: Their global ranks.
        calls: Steps begun.
        programs: How many programs have begun a step here; all ranks run them in one order.
        talks: Exchanges begun, of which each step has at least one.
        moves: Times that this rank has entered or left a part of a step; all ranks make the same moves.
        place: Where this rank is.
        inside: Whether it may be waiting for the others.
        since: When it came there.
        met: What its ranks name their exchanges by, once they have met.
        talked: Keys of its latest exchanges, the oldest first.
    """

    name: str
    ranks: tuple[int, ...]
    calls: int = 0
    programs: int = 0
    talks: int = 0
    moves: int = 0
    place: str = "before its first step"
    inside: bool = False
    since: float = field(default_factory=time.monotonic)
    met: str = ""
    talked: deque[list[str]] = field(default_factory=deque)

    def move(self, place: str, inside: bool) -> None:
        """Enter or leave a part of a step."""
        self.place, self.inside, self.since = place, inside, time.monotonic()
        self.moves += 1


@dataclass
class Peer:
    """What is known of another rank: its last words, when they last changed, when it last moved or did anything.

    Its `number`, once both have met, tells its words from those of an earlier process group.
    """

    said: str = ""
    heard: float = field(default_factory=time.monotonic)
    lines: dict[str, tuple[int, str, bool]] = field(default_factory=dict)
    moved: float = field(default_factory=time.monotonic)
    worked: float = 0.0
    lived: float = field(default_factory=time.monotonic)
    where: str = ""
    ended: bool = False
    number: str = ""

    def hear(self, said: str, now: float) -> None:
        """Take in what it last said."""
        if said == self.said:
            return
        told = json.loads(said)
        # A store may still hold the last words of a process group that was there before.
        if told["number"] != self.number if self.number else told["ended"]:
            return
        lines = {name: (moves, place, inside) for name, (moves, place, inside) in told["lines"].items()}
        if lines != self.lines:
            self.lines, self.moved, self.lived = lines, now, now
        if told["worked"] != self.worked:
            self.worked, self.lived = told["worked"], now
        self.said, self.heard, self.where, self.ended = said, now, told["where"], told["ended"]

    def waits_elsewhere(self, line: Line) -> bool:
        """Whether it waits for ranks of another line."""
        return any(inside for name, (_, _, inside) in self.lines.items() if name != line.name)


def fault(peer: Peer, line: Line, now: float, patience: float) -> str | None:
    """What is wrong with a peer that this rank waits for, in words; None for nothing.

    Args:
        peer: What is known of it.
        line: The ranks that both are of.
        now: `time.monotonic()`.
        patience: Seconds that it may do nothing.
    """
    moves, place, _ = peer.lines.get(line.name, (0, "before its first step", False))
    if peer.ended:
        return f"has left, {place}"
    silent = now - max(peer.heard, line.since)
    if silent > SILENCE:
        return (
            f"has not been heard of for {now - peer.heard:.0f} s (it was {place} then): its process has died or is "
            "stopped, or its machine cannot be reached"
        )
    idle = now - max(peer.lived, line.since)
    if moves < line.moves and idle > patience and not peer.waits_elsewhere(line):
        where = f" at {peer.where}" if peer.where else ""
        return f"has stalled {place}{where}: it has done nothing for {idle:.0f} s"
    if moves == line.moves and place != line.place and now - max(peer.moved, line.since) > patience:
        return f"is {place}, so the ranks have not run the same steps forward and backward"
    return None


def is_communication(error: BaseException) -> bool:
    """Whether an error only says that the other end of a connection is gone or late."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _COMMUNICATION)


def brief(error: BaseException) -> str:
    """Class and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__module__}.{type(error).__qualname__}: {lines[0] if lines else ''}".removeprefix("builtins.")


def store_lost() -> str:
    """Whose end it is when the rendezvous store does not answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "the launcher that holds the rendezvous store does not answer: it has ended or cannot be reached"
    return "rank 0, which holds the rendezvous store, does not answer: its process has died or cannot be reached"


__all__ = ["SILENCE", "Line", "Peer", "brief", "fault", "is_communication", "store_lost"]
