"""`Recorder`: an instrument that keeps what every rewrite did.

While passes run it keeps references only: arguments, types and origins are immutable, so a node's version is a tuple
of what the node holds. Text, memory curves and communication are worked out when the recording is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Graph, Node, Origin, Phase
from autosp_ir.ir.ops import OpDef
from autosp_ir.ir.program import InputSpec, Program
from autosp_ir.ir.types import Type
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.instrument import Instrument
from autosp_ir.pipeline.trace import PassRecord, Trace
from autosp_ir.rewrite.events import RewriteEvent
from autosp_ir.viz.recording import Recording

BY_HAND = "outside the rewriter"
"""The rule of changes that no rewriter reported."""


class Version(NamedTuple):
    """What a node was at one moment, by reference."""

    id: int
    name: str
    op: OpDef
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    type: Type | None
    phase: Phase
    origin: Origin

    @staticmethod
    def of(node: Node) -> Version:
        """The node as it is now."""
        kind = node.results[0].type if node.results else None
        return Version(node.id, node.name, node.op, node.args, node.kwargs, kind, node.phase, node.origin)

    def same(self, node: Node) -> bool:
        """Whether the node still holds the very same objects."""
        return (
            self.args is node.args
            and self.kwargs is node.kwargs
            and self.origin is node.origin
            and self.phase is node.phase
            and (self.type is None or self.type is node.results[0].type)
            and self.op is node.op
            and self.name == node.name
        )


@dataclass
class RawDelta:
    """One rewrite, by node id; see `recording.Delta`. The id -1 stands for the start of the program."""

    rule: str
    at: float
    ms: float
    removed: list[int] = field(default_factory=list)
    placed: list[tuple[Version, int]] = field(default_factory=list)
    changed: list[Version] = field(default_factory=list)


@dataclass
class RawStage:
    """A program as one pass left it."""

    record: PassRecord
    start: float
    stage: str
    mesh: dict[str, int]
    facts: tuple[str, ...]
    inputs: list[InputSpec]
    outputs: tuple[str, ...]
    nodes: list[Version]
    deltas: list[RawDelta]
    new_graph: bool


class Recorder(Instrument):
    """Keeps the program before the pipeline, every rewrite, and the program after each pass.

    After the run the recording belongs to the trace: `result.trace.save("run.json")`. After a run that failed, what
    happened until then is in `recorder.recording()`.
    """

    def __init__(self) -> None:
        self._stages: list[RawStage] = []
        self._program: Program | None = None
        self._recorded: Callable[[], Recording] = Recording

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Keep the input."""
        # Each run has a list of its own: the trace of an earlier run keeps its recording.
        self._program, self._stages = program, []
        self._recorded = cache(partial(_assembled, self._stages, program))
        self._began = self._pass_began = time.perf_counter()
        self._follow(program.graph)
        self._keep(PassRecord("input", "input"), program, list(self._versions.values()), new_graph=True)

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Start a list of rewrites."""
        self._deltas: list[RawDelta] = []
        self._pass_began = time.perf_counter()

    def on_rewrite(self, event: RewriteEvent) -> None:
        """Keep what the rewrite did."""
        program = self._program
        if program is None or program.graph is not self._graph:
            return  # the pass made a new graph, which is kept whole
        delta = RawDelta(event.rule, time.perf_counter() - self._began, event.ms)
        for id in event.removed:
            self._remove(id, delta)
        moved = set(event.moved)
        for id in event.changed:
            node = self._graph.node(id)
            if node is not None and id not in moved:
                self._change(node, delta)
        nodes = (self._graph.node(id) for id in (*event.created, *event.moved))
        self._place([n for n in nodes if n is not None], delta)
        self._deltas.append(delta)

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Keep what the pass left, also what it changed without a rewriter."""
        new_graph = program.graph is not self._graph
        if new_graph:
            self._follow(program.graph)
        else:
            self._reconcile()
        nodes = [self._versions[node.id] for node in program.graph.nodes]
        self._keep(record, program, nodes, new_graph)

    def after_pipeline(self, program: Program, trace: Trace) -> None:
        """Give the recording to the trace."""
        trace.attach(self._recorded)

    def recording(self) -> Recording:
        """The last run: text, matched graphs, memory and communication are worked out on the first call.

        Raises:
            AutoSPError: Nothing has run yet.
        """
        if not self._stages:
            raise AutoSPError(
                "nothing was recorded", hint="pass the recorder to PassManager(…, instruments=[…]) and run"
            )
        return self._recorded()

    def _keep(self, record: PassRecord, program: Program, nodes: list[Version], new_graph: bool) -> None:
        self._stages.append(
            RawStage(
                record,
                self._pass_began - self._began,
                program.stage.value,
                dict(program.mesh),
                tuple(sorted(program.facts)),
                list(program.signature.inputs),
                tuple(o.name for o in program.signature.outputs),
                nodes,
                self._deltas if len(self._stages) else [],
                new_graph,
            )
        )

    def _follow(self, graph: Graph) -> None:
        """Know every node of a graph, and nothing else."""
        self._graph = graph
        self._versions: dict[int, Version] = {}
        self._next: dict[int, int] = {-1: -1}
        self._prev: dict[int, int] = {-1: -1}
        behind = -1
        for node in graph.nodes:
            self._versions[node.id] = Version.of(node)
            self._link(node.id, behind)
            behind = node.id

    def _change(self, node: Node, delta: RawDelta) -> None:
        known = self._versions.get(node.id)
        if known is None or known.same(node):
            return
        self._versions[node.id] = Version.of(node)
        delta.changed.append(self._versions[node.id])

    def _remove(self, id: int, delta: RawDelta) -> None:
        if id in self._versions:
            del self._versions[id]
            self._unlink(id)
            delta.removed.append(id)

    def _place(self, nodes: list[Node], delta: RawDelta) -> None:
        """Put nodes where they stand in the graph, in program order: what they stand behind is then known."""
        for node in nodes:
            if node.id in self._versions:
                self._unlink(node.id)
                del self._versions[node.id]
        for node in sorted(nodes, key=lambda n: n._order):
            behind = node.prev
            while behind is not None and behind.id not in self._versions:
                behind = behind.prev
            place = behind.id if behind is not None else -1
            self._versions[node.id] = Version.of(node)
            self._link(node.id, place)
            delta.placed.append((self._versions[node.id], place))

    def _reconcile(self) -> None:
        """Record what differs from the graph: a pass may have changed it without a rewriter."""
        delta = RawDelta(BY_HAND, time.perf_counter() - self._began, 0.0)
        nodes = list(self._graph.nodes)
        alive = {n.id for n in nodes}
        for id in [i for i in self._versions if i not in alive]:
            self._remove(id, delta)
        for node in nodes:
            self._change(node, delta)
        self._place(self._misplaced(nodes), delta)
        if delta.removed or delta.placed or delta.changed:
            self._deltas.append(delta)

    def _misplaced(self, nodes: list[Node]) -> list[Node]:
        """Nodes that are unknown, or that do not stand where they are known to."""
        found = []
        cursor = self._next[-1]
        passed: set[int] = set()
        for node in nodes:
            while cursor in passed:
                cursor = self._next[cursor]
            if node.id == cursor:
                cursor = self._next[cursor]
            else:
                found.append(node)
                passed.add(node.id)
        return found

    def _link(self, id: int, behind: int) -> None:
        after = self._next[behind]
        self._next[behind] = self._prev[after] = id
        self._next[id], self._prev[id] = after, behind

    def _unlink(self, id: int) -> None:
        before, after = self._prev.pop(id), self._next.pop(id)
        self._next[before], self._prev[after] = after, before


def _assembled(stages: Sequence[RawStage], program: Program) -> Recording:
    from autosp_ir.viz.assemble import assemble  # it imports this module

    return assemble(stages, program)


__all__ = ["BY_HAND", "RawDelta", "RawStage", "Recorder", "Version"]
