"""One half of a lowered program as tasks: what each waits for, how long it takes, what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autosp_ir.analysis.aliasing import Aliasing, Storage
from autosp_ir.analysis.cost import is_costed
from autosp_ir.analysis.fused import Fusion, writes_over
from autosp_ir.analysis.timeline import Durations, Timeline, is_wait, run, start_of, stream_of
from autosp_ir.comm.host_memory import WAIT_COPY
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program

_KEEPS_ORDER = frozenset({Trait.MUTATES, Trait.RANDOM})


@dataclass(frozen=True)
class Problem:
    """Tasks of one half, numbered in program order.

    Args:
        nodes: The operations.
        before: For each task, the tasks it needs.
        after: For each task, the tasks that need it.
        compute: Seconds on the compute stream.
        comm: Seconds on a communication stream; 0 for what starts nothing.
        axis: The communication stream of a start, else None.
        start: For a wait, the task that started what it awaits.
        crowds: Whether each task leaves no room for a collective that was not there before it.
        priced: Seconds by node, for the timeline.
        made: Bytes that each task allocates.
        over: Bytes of an operand that each task may write over if it is the last to read it, else 0.
        reads: Storages that die in this half: their bytes, what made it (-1: an earlier half), what holds it.
        held: Bytes alive when the half begins, of which `reads` may free some.
    """

    nodes: tuple[Node, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    compute: tuple[float, ...]
    comm: tuple[float, ...]
    axis: tuple[str | None, ...]
    start: tuple[int | None, ...]
    crowds: tuple[bool, ...]
    priced: Durations
    made: tuple[int, ...]
    over: tuple[int, ...]
    reads: tuple[tuple[int, int, tuple[int, ...]], ...]
    held: int

    def timeline(self, order: Sequence[int]) -> Timeline:
        """Follow one order."""
        return run([self.nodes[i] for i in order], self.priced)

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes alive in one order."""
        place = [0] * len(self.nodes)
        for at, task in enumerate(order):
            place[task] = at
        freed = [0] * len(self.nodes)
        reused = [0] * len(self.nodes)
        for size, maker, readers in self.reads:
            last = max(readers, key=place.__getitem__)
            freed[place[last]] += size
            if self.over[last] == size and maker != last:
                reused[place[last]] = size
        live = top = self.held
        for at, task in enumerate(order):
            live += self.made[task]
            top = max(top, live - reused[at])
            live -= freed[at]
        return top

    @property
    def lower_bound(self) -> float:
        """Seconds that no order of this half is shorter than."""
        own = {node: self.priced.compute[node] for node in self.nodes}
        return Durations(own, {n: self.priced.comm[n] for n in self.nodes if n in self.priced.comm}).lower_bound

    def depths(self) -> list[int]:
        """Costed tasks on the longest way to each task, itself among them."""
        depth: list[int] = []
        for node, needed in zip(self.nodes, self.before, strict=True):
            depth.append(max((depth[i] for i in needed), default=0) + is_costed(node))
        return depth

    def spare(self) -> list[bool]:
        """Whether nothing costed waits for each task."""
        costed = [is_costed(node) for node in self.nodes]
        leads = [False] * len(self.nodes)
        for task in reversed(range(len(self.nodes))):
            leads[task] = any(costed[i] or leads[i] for i in self.after[task])
        return [not each for each in leads]

    def longest_paths(self) -> list[float]:
        """Seconds from the beginning of each task to the end of what depends on it, along the longest way."""
        tail = [0.0] * len(self.nodes)
        for task in reversed(range(len(self.nodes))):
            own = self.comm[task] or self.compute[task]
            tail[task] = own + max((tail[i] for i in self.after[task]), default=0.0)
        return tail


def halves(program: Program, priced: Durations, fusion: Fusion | None = None) -> list[Problem]:
    """The forward, and everything behind it, as two problems; a half without operations is left out.

    Args:
        program: A lowered program without symbolic extents.
        priced: Seconds of every node.
        fusion: The program as a compiler fuses it, if it will.
    """
    memory = _Memory.of(program) if fusion is None else _Memory.fused(fusion)
    own = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    forward = [n for n in own if n.phase is Phase.FORWARD]
    rest = [n for n in own if n.phase is not Phase.FORWARD]
    return [_problem(part, priced, memory) for part in (forward, rest) if part]


@dataclass(frozen=True)
class _Memory:
    """Which storages each node makes, and which nodes make or read each."""

    made: dict[Node, list[Storage]]
    readers: dict[Storage, list[Node]]
    over: dict[Node, int]

    @classmethod
    def of(cls, program: Program) -> _Memory:
        """As the operations run one by one."""
        aliasing = Aliasing()
        found = cls({}, {}, {})
        for node in program.graph.nodes:
            made = aliasing.step(node) if node.op.kind != "output" else []
            found._add(node, made, {s for v in node.operands for s in aliasing.storages(v)})
        return found

    @classmethod
    def fused(cls, fusion: Fusion) -> _Memory:
        """As a compiler fuses them: what it never writes is neither made nor read."""
        found = cls({}, {}, {})
        for node in fusion.nodes:
            made = [s for s in fusion.made.get(node, ()) if s not in fusion.absent]
            acts = node.op.kind == "output" or made or (fusion.runs(node) and not fusion.made[node])
            found._add(node, made, fusion.reads[node] if acts else set())
            if found.made[node] and writes_over(node):
                found.over[node] = found.made[node][0].bytes
        return found

    def _add(self, node: Node, made: list[Storage], read: set[Storage]) -> None:
        self.made[node] = [s for s in made if s.owned and not s.on_host]
        for storage in {*made, *read}:
            if storage.owned and not storage.on_host:
                self.readers.setdefault(storage, []).append(node)


def _problem(part: Sequence[Node], priced: Durations, memory: _Memory) -> Problem:
    number = {node: i for i, node in enumerate(part)}
    before = [sorted({number[v.producer] for v in node.operands if v.producer in number}) for node in part]
    _chain(before, [i for i, n in enumerate(part) if n.op.traits & _KEEPS_ORDER])
    after: list[list[int]] = [[] for _ in part]
    for task, needed in enumerate(before):
        for each in needed:
            after[each].append(task)
    forward = part[0].phase is Phase.FORWARD
    read = {s: [number[r] for r in readers if r in number] for s, readers in memory.readers.items()}
    # What the caller keeps, or a later half reads, is never freed here.
    lasting = {
        s
        for s, readers in memory.readers.items()
        if any(r not in number and (forward or r.phase is not Phase.FORWARD) for r in readers)
    }
    entering = [s for s in read if s.node not in number and not forward and (read[s] or s in lasting)]
    return Problem(
        nodes=tuple(part),
        before=tuple(map(tuple, before)),
        after=tuple(map(tuple, after)),
        compute=tuple(priced.compute[n] for n in part),
        comm=tuple(priced.comm.get(n, 0.0) for n in part),
        axis=tuple(stream_of(n) if n in priced.comm else None for n in part),
        start=tuple(number.get(start_of(n)) if is_wait(n) or n.is_op(WAIT_COPY) else None for n in part),
        crowds=tuple(n in priced.crowds for n in part),
        priced=priced,
        made=tuple(sum(s.bytes for s in memory.made[n]) for n in part),
        over=tuple(memory.over.get(n, 0) for n in part),
        reads=tuple(
            (s.bytes, number.get(s.node, -1), tuple(tasks)) for s, tasks in read.items() if tasks and s not in lasting
        ),
        held=sum(s.bytes for s in entering),
    )


def _chain(before: list[list[int]], tasks: Sequence[int]) -> None:
    """Keep these tasks in their order."""
    for earlier, later in pairwise(tasks):
        before[later] = sorted({*before[later], earlier})


__all__ = ["Problem", "halves"]
