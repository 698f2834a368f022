"""Communication streams: first in, first out each; streams of one mesh axis share its link evenly.

While an operation fills the device, no collective begins on it: what is first in its queue by then waits for the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

from autosp_ir.ir.streams import mesh_axis

K = TypeVar("K", bound=Hashable)


class Channels(Generic[K]):
    """What is in flight, and when it arrives. Time only goes forward."""

    def __init__(self) -> None:
        self._now = 0.0
        self._queues: dict[str, deque[tuple[K, float]]] = {}
        self._links: dict[str, list[str]] = {}
        self._apart: set[str] = set()
        self._begun: dict[K, float] = {}
        self._done: dict[K, float] = {}

    def start(self, key: K, stream: str, seconds: float, now: float, *, room: bool = True) -> None:
        """Put a collective in the queue of its stream.

        Args:
            key: Names it.
            stream: A mesh axis, or a further stream of one.
            seconds: What it takes alone on its link.
            now: When it is started; not before any earlier call.
            room: Whether this stream needs room on the device, as collectives do and copies do not.
        """
        self.advance(now)
        if stream not in self._queues:
            self._queues[stream] = deque()
            self._apart |= set() if room else {stream}
            self._links.setdefault(mesh_axis(stream), []).append(stream)
        if not self._queues[stream]:
            self._begun[key] = now
        self._queues[stream].append((key, seconds))

    def advance(self, now: float, crowded: bool = False) -> None:
        """Let time pass until `now`.

        Args:
            now: Not before any earlier call.
            crowded: Whether there is room only for what has begun.
        """
        for link in self._links:
            self._run(link, now, crowded=crowded)
        self._now = max(self._now, now)

    def is_done(self, key: K) -> bool:
        """Whether a collective has arrived by now."""
        return key in self._done and self._done[key] <= self._now

    def done_at(self, key: K) -> float:
        """When a collective arrives if nothing else is started."""
        return self._done[key] if key in self._done else self.soonest({key})[1]

    def soonest(self, keys: Collection[K]) -> tuple[K, float]:
        """Which of several collectives on their way arrives first if nothing else is started, and when."""
        preview: Channels[K] = Channels()
        preview._now, preview._links = self._now, self._links
        preview._queues = {stream: queue.copy() for stream, queue in self._queues.items()}
        heads = [queue[0][0] for queue in self._queues.values() if queue]
        preview._begun = {head: self._begun[head] for head in heads if head in self._begun}
        for link in self._links:
            preview._run(link, float("inf"), keys)
        return min(((k, at) for k, at in preview._done.items() if k in keys), key=lambda item: item[1])

    def backlog(self, stream: str) -> float:
        """Seconds until the link of a stream is idle if nothing else is started."""
        queues = (self._queues[s] for s in self._links.get(mesh_axis(stream), ()))
        return sum(seconds for queue in queues for _, seconds in queue)

    def begun_at(self, key: K) -> float:
        """When a collective that has arrived, or is on its way, left the queue."""
        return self._begun[key]

    def drain(self) -> float:
        """Let everything arrive; returns when the last did, or 0."""
        self.advance(float("inf"))
        return max(self._done.values(), default=0.0)

    def _run(self, link: str, until: float, wanted: Collection[K] = (), crowded: bool = False) -> None:
        """Move one link's heads forward together, up to a time or until one of those wanted arrives."""
        now = self._now
        arrived = False
        while not arrived:
            heads = [(s, queue) for s in self._links[link] if (queue := self._queues[s])]
            active = [q for s, q in heads if not crowded or s in self._apart or q[0][0] in self._begun]
            for queue in active:
                self._begun.setdefault(queue[0][0], now)
            if not active:
                return
            step = min(queue[0][1] for queue in active) * len(active)
            if now + step > until:
                for queue in active:
                    head, left = queue[0]
                    queue[0] = (head, left - (until - now) / len(active))
                return
            now += step
            for queue in active:
                head, left = queue[0]
                left -= step / len(active)
                if left > 1e-15:
                    queue[0] = (head, left)
                    continue
                queue.popleft()
                self._done[head] = now
                arrived = arrived or head in wanted


__all__ = ["Channels"]
