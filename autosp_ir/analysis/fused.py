"""Memory and time of a program that a compiler fuses, such as Inductor, estimated without compiling.

Fusion is modelled by one rule: a pointwise result exists only if something reads it that is not fused with it, which
is whatever is no pointwise operation, reduction or view, or belongs to the other half of the step. Whoever reads a
result that does not exist reads what it is made from. For the default pipeline on two H100 its peaks are within 0.3 %
of those measured and its times 4 to 6 % short; the unfused peak is twice as high (benchmarks/README.md). Of what a
compiler moves it knows one thing: a reduction holds nothing until its place in the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autosp_ir.analysis.aliasing import Aliasing, Storage
from autosp_ir.analysis.cost import (
    HOST_LINKS,
    Device,
    Link,
    compute_seconds,
    cost_of,
    is_costed,
    link_seconds,
    workspace,
)
from autosp_ir.analysis.liveness import LivenessReport, peak_in_parts, saved_storages
from autosp_ir.analysis.timeline import Durations, crowding, is_start
from autosp_ir.comm.host_memory import WAIT_COPY, starts_copy
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program

_REDUCTIONS = ("aten.sum", "aten.amax", "aten.amin", "aten.mean", "aten.var_mean", "aten.argmax")
_FUSED = (
    "prims.convert_element_type", "aten._to_copy", "aten.clone", "aten.full", "aten.scalar_tensor", "aten.arange",
    "aten.gather", "aten.scatter", "aten.constant_pad_nd", "aten.copy", "aten.fill", "aten.iota", "aten.rand",
)  # fmt: skip
# Inductor writes what reads more than this much, or, if several read it in turn, more than that much
# (`realize_acc_reads_threshold`, `realize_reads_threshold`).
_READS, _READS_AGAIN = 8, 4
# Written over an operand that dies there.
_IN_PLACE = ("autosp.addmm_float32", "_c10d_functional.all_reduce")


class Fusion:
    """Which storages of a program exist once it is fused, and who reads them.

    Args:
        program: A program at any stage; lowered ones are the most exact.
        symbols: Numbers for symbolic extents, by symbol name.

    Raises:
        VerifyError: An extent is symbolic and has no number.
    """

    def __init__(self, program: Program, symbols: Mapping[str, int] | None = None) -> None:
        aliasing = Aliasing(symbols)
        self.symbols = symbols
        self.mesh = program.mesh
        self.nodes = list(program.graph.nodes)
        self.made = {n: aliasing.step(n) for n in self.nodes if n.op.kind != "output"}
        read = {n: {s for v in n.operands for s in aliasing.storages(v)} for n in self.nodes}
        self.saved = saved_storages([n for n in self.nodes if n.op.kind != "output"], aliasing)
        self.absent: set[Storage] = set()
        self.reads: dict[Node, set[Storage]] = {}
        readers = self._readers(read)
        for node in self.nodes:
            sources = [self.reads[s.node] if s in self.absent else {s} for s in read[node]]
            self.reads[node] = set().union(*sources)
            if _is_pointwise(node):
                self.absent.update(s for s in self.made[node] if self._fuses(node, s, readers.get(s, [])))

    def _readers(self, read: Mapping[Node, set[Storage]]) -> dict[Storage, list[Node]]:
        readers: dict[Storage, list[Node]] = {}
        for node in self.nodes:
            if node.op.kind == "output" or self.runs(node):
                for storage in read[node]:
                    readers.setdefault(storage, []).append(node)
        return readers

    def _fuses(self, node: Node, storage: Storage, readers: list[Node]) -> bool:
        """Whether what a pointwise node makes is computed where it is read, and never written."""
        if not storage.owned or not _all_fused(node, readers):
            return False
        again = len(readers) > 1 and len(self.reads[node]) > _READS_AGAIN
        return not again and len(self.reads[node]) <= _READS

    def runs(self, node: Node) -> bool:
        """Whether the node does something: views and elements of tuples do not."""
        if node.op.kind != "call_function":
            return False
        if node.is_op(WAIT_COPY):
            return True
        return bool(self.made[node]) or node.op.has(Trait.COLLECTIVE) or node.op.has(Trait.MUTATES)

    def exists(self, node: Node) -> bool:
        """Whether what the node makes is written to memory."""
        return any(s not in self.absent for s in self.made.get(node, ()))

    def lifetimes(self) -> dict[Storage, Node]:
        """The last node that needs each storage that exists.

        A reduction needs what it reads no longer than until the last of that is there: nothing ties it to its place in
        the program, and a compiler computes it along with what else reads the same, as it does the gradient of a norm's
        weight.
        """
        last: dict[Storage, Node] = {}
        place = {node: i for i, node in enumerate(self.nodes)}
        for node in self.nodes:
            last.update((s, node) for s in self.made.get(node, ()) if s not in self.absent)
            if node.op.kind == "output" or self.exists(node) or (self.runs(node) and not self.made[node]):
                at = self._earliest(node, place) if _is_reduction(node) else node
                last.update((s, max(at, last.get(s, at), key=place.__getitem__)) for s in self.reads[node])
        return last

    def _earliest(self, node: Node, place: Mapping[Node, int]) -> Node:
        """Where all that a node reads has been made, in its own half of the step."""
        half = node.phase is Phase.FORWARD
        makers = [s.node for s in self.reads[node] if (s.node.phase is Phase.FORWARD) == half]
        return max(makers, key=place.__getitem__, default=node)


def _is_reduction(node: Node) -> bool:
    return node.is_op(*_REDUCTIONS) or node.op.name.startswith(tuple(f"{r}." for r in _REDUCTIONS))


def _is_pointwise(node: Node) -> bool:
    if is_costed(node) or node.op.has(Trait.COLLECTIVE):
        return False
    return node.op.has(Trait.POINTWISE) or node.op.name.startswith(_FUSED)


def _all_fused(node: Node, readers: list[Node] | tuple[()]) -> bool:
    half = node.phase is Phase.FORWARD
    return bool(readers) and all(
        r.op.kind != "output" and (_is_pointwise(r) or _is_reduction(r)) and (r.phase is Phase.FORWARD) == half
        for r in readers
    )


def fused_liveness(fusion: Fusion, *, count_inputs: bool = False, device: Device | None = None) -> LivenessReport:
    """As `liveness`, for a program that a compiler fuses.

    Args:
        fusion: The program, fused.
        count_inputs: Whether parameters, buffers, constants and inputs count, from the first node on.
        device: What it runs on, whose work space counts; None counts none.
    """
    dying: dict[Node, list[Storage]] = {}
    last = fusion.lifetimes()
    for storage, node in last.items():
        dying.setdefault(node, []).append(storage)
    live = given = sum(s.bytes for made in fusion.made.values() for s in made if not s.owned) if count_inputs else 0
    host = [s.bytes for made in fusion.made.values() for s in made if s.on_host]
    nodes = [n for n in fusion.nodes if n.op.kind != "output"]
    curve: list[int] = []
    allocated: dict[Node, list[Storage]] = {}
    for node in nodes:
        fresh = [s for s in fusion.made[node] if s.owned and not s.on_host and s not in fusion.absent]
        allocated[node] = fresh
        dead = [s for s in dying.get(node, ()) if s.owned and not s.on_host]
        live += sum(s.bytes for s in fresh)
        curve.append(live - _reused(node, fresh, dead) + workspace(node, device, fusion.symbols, fused=True))
        live -= sum(s.bytes for s in dead)
    peak = max(range(len(curve)), key=curve.__getitem__, default=None)
    at_peak: dict[str, int] = {}
    if peak is not None:
        work = workspace(nodes[peak], device, fusion.symbols, fused=True)
        at_peak = peak_in_parts(nodes, allocated, last, fusion.saved, curve, given, work)
    return LivenessReport(
        peak_bytes=curve[peak] if peak is not None else 0,
        peak_node=nodes[peak].name if peak is not None else "",
        curve=tuple(curve),
        names=tuple(n.name for n in nodes),
        saved_bytes=sum(s.bytes for s in fusion.saved),
        saved=tuple(dict.fromkeys(s.node.name for s in fusion.saved)),
        by_node={n.name: sum(s.bytes for s in fusion.made[n] if s not in fusion.absent and not s.on_host)
                 for n in nodes if fusion.exists(n)},
        by_phase={
            phase: max(bytes_ for bytes_, n in zip(curve, nodes, strict=True) if n.phase is phase)
            for phase in dict.fromkeys(n.phase for n in nodes)
        },
        host_bytes=sum(host),
        at_peak=at_peak,
    )  # fmt: skip


def writes_over(node: Node) -> bool:
    """Whether the node may write over an operand that it reads for the last time, if that is as large."""
    return _is_pointwise(node) or node.is_op(*_IN_PLACE)


def _reused(node: Node, fresh: list[Storage], dead: list[Storage]) -> int:
    """Bytes that the node writes over an operand it reads for the last time."""
    if not fresh or not writes_over(node):
        return 0
    return next((s.bytes for s in dead if s not in fresh and s.bytes == fresh[0].bytes), 0)


def fused_durations(fusion: Fusion, device: Device, link: Link, host_link: Link = HOST_LINKS["pcie5"]) -> Durations:
    """As `timeline.durations`, for a program that a compiler fuses: what does not exist is not read or written.

    Args:
        fusion: A joint or lowered program, fused.
        device: What computes.
        link: What connects the ranks.
        host_link: What connects the device to host memory.
    """
    compute: dict[Node, float] = {}
    comm: dict[Node, float] = {}
    for node in fusion.nodes:
        if node.op.kind in ("placeholder", "output"):
            continue
        cost = cost_of(node, fusion.symbols, fusion.mesh)
        if _is_pointwise(node) or _is_reduction(node):
            written = sum(s.bytes for s in fusion.made[node] if s not in fusion.absent)
            read = sum(s.bytes for s in fusion.reads[node]) if written else 0
            cost = replace(cost, bytes=float(written + read))
        compute[node] = compute_seconds(cost, device)
        if starts_copy(node):
            comm[node] = link_seconds(cost, host_link)
        elif is_start(node):
            comm[node] = link_seconds(cost, link)
        else:
            compute[node] += link_seconds(cost, link)
    return Durations(compute, comm, crowding(compute, device))


__all__ = ["Fusion", "fused_durations", "fused_liveness", "writes_over"]
