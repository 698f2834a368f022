"""How long a program takes: one compute stream in program order, and collectives and copies that run beside it.

Every process group is one first-in-first-out communication stream, and so is each direction between device and host
memory. A start costs no compute time; a wait stalls the compute stream until its collective or copy is done, and what
was started before it on the same stream with it. A collective that is not lowered yet holds up compute. On a GPU a
collective that is not under way when a product or an attention begins has to wait for its end, as two H200 do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autosp_ir.analysis.channels import Channels
from autosp_ir.analysis.cost import HOST_LINKS, Device, Link, compute_seconds, cost_of, is_costed, link_seconds
from autosp_ir.comm.host_memory import WAIT_COPY, starts_copy
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.streams import mesh_axis

WAIT = "_c10d_functional.wait_tensor"


@dataclass(frozen=True)
class Durations:
    """Seconds of every node.

    Args:
        compute: On the compute stream, in program order.
        comm: On a communication stream, for the nodes that start a collective or a copy.
        crowds: Nodes that leave no room for a collective that was not there before them.
    """

    compute: Mapping[Node, float]
    comm: Mapping[Node, float]
    crowds: frozenset[Node] = frozenset()

    @property
    def lower_bound(self) -> float:
        """No order is shorter: all compute, all communication of the busiest link, or the critical path."""
        links: dict[str, float] = {}
        for node, seconds in self.comm.items():
            link = mesh_axis(stream_of(node))
            links[link] = links.get(link, 0.0) + seconds
        return max(sum(self.compute.values()), max(links.values(), default=0.0), self.critical_path)

    @property
    def critical_path(self) -> float:
        """Seconds of the longest chain of operations that need each other."""
        end: dict[Node, float] = {}
        for node, seconds in self.compute.items():
            ready = max((end.get(v.producer, 0.0) for v in node.operands), default=0.0)
            end[node] = ready + self.comm.get(node, seconds)
        return max(end.values(), default=0.0)


@dataclass(frozen=True)
class Timeline:
    """One run.

    Args:
        makespan: Seconds until all streams are done.
        begin: When each node begins: on the compute stream, or on its communication stream for a start.
        arrive: When each collective that is started has arrived.
        stalls: Seconds that each wait holds up the compute stream; waits that do not are absent.
    """

    makespan: float
    begin: Mapping[Node, float]
    arrive: Mapping[Node, float]
    stalls: Mapping[Node, float]

    @property
    def exposed(self) -> float:
        """Seconds of communication and copies that no compute covers."""
        return sum(self.stalls.values())


def durations(
    program: Program,
    device: Device,
    link: Link,
    symbols: Mapping[str, int] | None = None,
    host_link: Link = HOST_LINKS["pcie5"],
) -> Durations:
    """Price every node.

    Args:
        program: A joint or lowered program.
        device: What computes.
        link: What connects the ranks.
        symbols: Numbers for symbolic extents.
        host_link: What connects the device to host memory.

    Raises:
        UnsupportedError: An extent is symbolic and has no number.
    """
    compute: dict[Node, float] = {}
    comm: dict[Node, float] = {}
    for node in program.graph.nodes:
        if node.op.kind in ("placeholder", "output"):
            continue
        cost = cost_of(node, symbols, program.mesh)
        compute[node] = compute_seconds(cost, device)
        if starts_copy(node):
            comm[node] = link_seconds(cost, host_link)
        elif is_start(node):
            comm[node] = link_seconds(cost, link)
        else:
            compute[node] += link_seconds(cost, link)
    return Durations(compute, comm, crowding(compute, device))


def crowding(nodes: Iterable[Node], device: Device) -> frozenset[Node]:
    """Those of some nodes that fill a device."""
    return frozenset(n for n in nodes if is_costed(n)) if device.crowded else frozenset()


def is_start(node: Node) -> bool:
    """Whether the node starts an asynchronous collective."""
    return node.op.has(Trait.COLLECTIVE) and node.op.name.startswith("_c10d_functional.") and node.op.name != WAIT


def is_wait(node: Node) -> bool:
    """Whether the node waits for one."""
    return node.op.name == WAIT


def start_of(wait: Node) -> Node:
    """The start that a wait waits for, of a collective or a copy."""
    producer = wait.operands[0].producer
    return producer.operands[0].producer if producer.op.target is operator.getitem else producer


def stream_of(start: Node) -> str:
    """The stream that a start runs on: a mesh axis or a further stream of one, or the direction of a copy."""
    return start.op.name if starts_copy(start) else str(start.arg("group_name"))


def run(order: Sequence[Node], priced: Durations) -> Timeline:
    """Follow one order of nodes.

    Args:
        order: A topological order of nodes that `priced` covers.
        priced: From `durations`.
    """
    now = 0.0
    channels: Channels[Node] = Channels()
    begin: dict[Node, float] = {}
    stalls: dict[Node, float] = {}
    started: dict[Node, None] = {}
    for node in order:
        if node in priced.comm:
            channels.start(node, stream_of(node), priced.comm[node], now, room=not starts_copy(node))
            started[node] = None
            continue
        if (is_wait(node) or node.is_op(WAIT_COPY)) and start_of(node) in started:
            channels.advance(now)
            arrived = channels.done_at(start_of(node))
            if arrived > now:
                stalls[node] = arrived - now
                now = arrived
        begin[node] = now
        now += priced.compute[node]
        if node in priced.crowds:
            channels.advance(begin[node])
            channels.advance(now, crowded=True)
    end = max(now, channels.drain())
    begin.update((node, channels.begun_at(node)) for node in started)
    return Timeline(end, begin, {node: channels.done_at(node) for node in started}, stalls)


__all__ = ["Durations", "Timeline", "crowding", "durations", "is_start", "is_wait", "run", "start_of", "stream_of"]
