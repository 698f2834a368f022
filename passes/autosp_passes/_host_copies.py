"""What of a joint program can be kept in host memory between forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autosp_ir.analysis.aliasing import Aliasing, Storage
from autosp_ir.emit.split import crossing_values
from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType
from autosp_ir.ir.verify import output_leaves


@dataclass(frozen=True)
class Copy:
    """One saved value, to be copied to the host and back.

    Args:
        value: The value.
        bytes: Its size.
        made: Place of the node that makes it, in the order of `Candidates.order`.
        read: Place of the first later node that reads it.
    """

    value: Value
    bytes: int
    made: int
    read: int


@dataclass(frozen=True)
class Candidate:
    """One storage on the device that the backward needs.

    Args:
        copies: The saved values on it.
        bytes: What its storage takes.
        used: Place of the last forward node that makes or reads a value on it.
        dies: Place of the last node of all that does.
    """

    copies: tuple[Copy, ...]
    bytes: int
    used: int
    dies: int

    @property
    def node(self) -> Node:
        """The node that makes the first saved value."""
        return self.copies[0].value.producer

    @property
    def host_bytes(self) -> int:
        """Pinned memory that it takes: torch's allocator rounds each block up to a power of two."""
        return sum(1 << (copy.bytes - 1).bit_length() for copy in self.copies)


class Candidates:
    """The storages that may be offloaded, and why others may not.

    Args:
        program: A joint program behind `remat`, without symbolic extents and operations in place.
        smallest: Storages of fewer bytes stay.

    Attributes:
        order: What runs, the forward in front.
        forward: How many of these are the forward.
        found: The candidates.
        stays: The node and the bytes of each storage that stays, by reason.
    """

    def __init__(self, program: Program, smallest: float) -> None:
        nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
        ahead = [n for n in nodes if n.phase is Phase.FORWARD]
        self.forward = len(ahead)
        self.order = ahead + [n for n in nodes if n.phase is not Phase.FORWARD]
        self._place = {n: i for i, n in enumerate(self.order)}
        self.found: list[Candidate] = []
        self.stays: dict[str, list[tuple[Node, int]]] = {}
        aliasing = Aliasing()
        for node in program.graph.nodes:
            if node.op.kind != "output":
                aliasing.step(node)
        self._uses = self._uses_of(aliasing)
        returned = {s for v in output_leaves(program.graph) if isinstance(v, Value) for s in aliasing.storages(v)}
        on_cpu = all(v.tensor_type.device.type == "cpu" for v in self._saved(program))
        groups: dict[tuple[Storage, ...], list[Value]] = {}
        for value in self._saved(program):
            if on_cpu or value.tensor_type.device.type != "cpu":
                groups.setdefault(aliasing.storages(value), []).append(value)
        for storages, values in groups.items():
            if not all(s.owned for s in storages):
                continue
            size = sum(s.bytes for s in storages)
            reason = _reason_to_stay(storages, values, returned, smallest, groups)
            if reason is not None:
                self.stays.setdefault(reason, []).append((values[0].producer, size))
            else:
                self.found.append(self._candidate(storages[0], values))

    def _saved(self, program: Program) -> list[Value]:
        return [v for v in crossing_values(program) if isinstance(v.type, TensorType)]

    def _uses_of(self, aliasing: Aliasing) -> dict[Storage, list[int]]:
        uses: dict[Storage, list[int]] = {}
        for place, node in enumerate(self.order):
            for value in (*node.results, *node.operands):
                for storage in aliasing.storages(value):
                    uses.setdefault(storage, []).append(place)
        return uses

    def _candidate(self, storage: Storage, values: Sequence[Value]) -> Candidate:
        copies = tuple(
            Copy(
                value,
                size_of(value),
                self._place[value.producer],
                min(self._place[u] for u in value.users if self._place.get(u, -1) >= self.forward),
            )
            for value in values
        )
        uses = self._uses[storage]
        return Candidate(copies, storage.bytes, max(u for u in uses if u < self.forward), max(uses))


def _reason_to_stay(
    storages: tuple[Storage, ...],
    values: Sequence[Value],
    returned: set[Storage],
    smallest: float,
    groups: dict[tuple[Storage, ...], list[Value]],
) -> str | None:
    if any(s in returned for s in storages):
        return "the caller gets it as well"
    if len(storages) != 1 or any(storages[0] in other for other in groups if other != storages):
        return "it shares memory with other saved values"
    if storages[0].bytes < smallest:
        return "it is smaller than smallest="
    if sum(size_of(v) for v in values) > storages[0].bytes:
        return "it is saved through views that overlap, which would be copied one by one"
    return None


def size_of(value: Value) -> int:
    """Bytes of a tensor of known extents."""
    kind = value.tensor_type
    return int(kind.numel) * kind.dtype.itemsize


__all__ = ["Candidate", "Candidates", "Copy", "size_of"]
