"""How much memory a program holds at every node: a static count of live storages.

Views share storage with their base; a storage dies with the last value on it. Parameters, buffers and inputs belong
to the caller and are counted only on demand, and so is what attention needs on a device while it runs. Other work space
inside operations is not counted, and what was offloaded to host memory is counted apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from autosp_ir.analysis.aliasing import Aliasing, Storage
from autosp_ir.analysis.cost import Device, workspace
from autosp_ir.ir.graph import Graph, Node, Phase
from autosp_ir.ir.program import Program


@dataclass(frozen=True)
class LivenessReport:
    """Memory of one rank over one run of a program.

    Attributes:
        peak_bytes: The most bytes alive at once.
        peak_node: The node that is running then.
        curve: Bytes alive while each node runs, in program order.
        names: The node names that belong to `curve`.
        saved_bytes: Storage made in forward that backward or recompute nodes read.
        saved: Names of the nodes that allocate it.
        by_node: Bytes that each node allocates; nodes that allocate nothing are absent.
        by_phase: The peak within each phase.
        host_bytes: What the program holds in host memory, all of it at once between forward and backward.
        at_peak: The peak in parts: `inputs` (parameters, buffers, constants and the batch, if they count), `saved` for
            the backward, `gradients` and whatever else the caller gets, `workspace` of attention, and `working`.
    """

    peak_bytes: int
    peak_node: str
    curve: tuple[int, ...]
    names: tuple[str, ...]
    saved_bytes: int
    saved: tuple[str, ...]
    by_node: Mapping[str, int]
    by_phase: Mapping[Phase, int]
    host_bytes: int = 0
    at_peak: Mapping[str, int] = field(default_factory=dict)


def liveness(
    program: Program | Graph,
    *,
    count_inputs: bool = False,
    symbols: Mapping[str, int] | None = None,
    device: Device | None = None,
) -> LivenessReport:
    """Count the storage that a run of `program` holds, from its types alone.

    Args:
        program: A program at any stage, or a graph.
        count_inputs: Whether parameters, buffers, constants and inputs count, from the first node on.
        symbols: Numbers for the symbols of a dynamic program, by symbol name.
        device: What it runs on, whose work space counts; None counts none.

    Returns:
        The peak, the curve over all nodes, and what is saved for backward.

    Raises:
        VerifyError: An extent is symbolic and has no number.
    """
    graph = program.graph if isinstance(program, Program) else program
    aliasing = Aliasing(symbols)
    nodes = [n for n in graph.nodes if n.op.kind != "output"]
    everywhere = {node: aliasing.step(node) for node in nodes}
    allocated = {node: [s for s in made if not s.on_host] for node, made in everywhere.items()}
    last = _last_uses(graph, aliasing)
    counted = {s for made in allocated.values() for s in made if s.owned or count_inputs}
    # Inputs exist before the first node runs.
    live = given = sum(s.bytes for s in counted if not s.owned)
    curve: list[int] = []
    dying = _by_last_use(last)
    for node in nodes:
        live += sum(s.bytes for s in allocated[node] if s.owned)
        curve.append(live + workspace(node, device, symbols))
        live -= sum(s.bytes for s in dying.get(node, ()) if s.owned and not s.on_host)
    peak = max(range(len(curve)), key=curve.__getitem__, default=None)
    saved = saved_storages(nodes, aliasing)
    return LivenessReport(
        peak_bytes=curve[peak] if peak is not None else 0,
        peak_node=nodes[peak].name if peak is not None else "",
        curve=tuple(curve),
        names=tuple(n.name for n in nodes),
        saved_bytes=sum(s.bytes for s in saved),
        saved=tuple(dict.fromkeys(s.node.name for s in saved)),
        by_node={n.name: sum(s.bytes for s in made) for n, made in allocated.items() if made},
        by_phase={
            phase: max(live for live, n in zip(curve, nodes, strict=True) if n.phase is phase)
            for phase in dict.fromkeys(n.phase for n in nodes)
        },
        host_bytes=sum(s.bytes for made in everywhere.values() for s in made if s.on_host),
        at_peak=peak_in_parts(nodes, allocated, last, saved, curve, given, workspace(nodes[peak], device, symbols))
        if peak is not None
        else {},
    )


def peak_in_parts(
    nodes: Sequence[Node],
    made: Mapping[Node, Sequence[Storage]],
    last: Mapping[Storage, Node],
    saved: Collection[Storage],
    curve: Sequence[int],
    given: int,
    work: int,
) -> dict[str, int]:
    """What `LivenessReport.at_peak` says.

    Args:
        nodes: Without the output.
        made: Storages on the device that each node makes.
        last: The last node that reads or makes each storage; the output for what the caller gets.
        saved: Storages that the forward leaves for the backward.
        curve: Bytes alive while each node runs.
        given: Bytes of what belongs to the caller, as far as the curve counts it.
        work: Bytes of the work space of the node at the peak.
    """
    peak = max(range(len(curve)), key=curve.__getitem__)
    place = {node: i for i, node in enumerate(nodes)}
    kept = set(saved)
    parts = dict.fromkeys(("inputs", "saved", "gradients", "workspace", "working"), 0)
    for node in nodes[: peak + 1]:
        for storage in made[node]:
            if not storage.owned or place.get(last.get(storage, node), len(nodes)) < peak:
                continue
            part = "saved" if storage in kept else "working" if last.get(storage) in place else "gradients"
            parts[part] += storage.bytes
    parts |= {"inputs": given, "workspace": work}
    # What is written over an operand is alive once.
    parts["working"] += curve[peak] - sum(parts.values())
    return parts


def _last_uses(graph: Graph, aliasing: Aliasing) -> dict[Storage, Node]:
    """The last node that makes or reads a value on each storage."""
    last: dict[Storage, Node] = {}
    for node in graph.nodes:
        for value in (*node.results, *node.operands):
            last.update(dict.fromkeys(aliasing.storages(value), node))
    return last


def _by_last_use(last: Mapping[Storage, Node]) -> dict[Node, list[Storage]]:
    dying: dict[Node, list[Storage]] = {}
    for storage, node in last.items():
        dying.setdefault(node, []).append(storage)
    return dying


def saved_storages(nodes: list[Node], aliasing: Aliasing) -> list[Storage]:
    """Storages made on the device by forward nodes that later phases read, in order of allocation."""
    found: dict[Storage, None] = {}
    for node in nodes:
        if node.phase is Phase.FORWARD:
            continue
        for value in node.operands:
            for storage in aliasing.storages(value):
                if storage.owned and not storage.on_host and storage.node.phase is Phase.FORWARD:
                    found[storage] = None
    return sorted(found, key=lambda s: s.id)
