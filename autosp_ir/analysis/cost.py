"""What an operation costs: floating-point operations, bytes, and seconds on a device and a link.

The formulas are analytic, from types alone, so that a program for a GPU is priced on a machine without one. Rates are
what large operations reach in practice, not data-sheet peaks: a bf16 product of 8192 x 8192 matrices and cuDNN's causal
attention with head size 128, measured with `benchmarks/gpu`; the others are scaled from data sheets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from autosp_ir.comm.host_memory import starts_copy
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.streams import mesh_axis
from autosp_ir.ir.types import Dim, TensorType, TupleType, Type

T = TypeVar("T")
_HALF = (torch.bfloat16, torch.float16)
# Views whose schema does not say so, and what only takes an element of a tuple.
_FREE = ("operator.getitem", "aten._unsafe_view")


@dataclass(frozen=True)
class Device:
    """Rates of one accelerator.

    Args:
        name: Key in `DEVICES`.
        half_flops: Matrix products in bf16 and fp16, FLOP/s.
        single_flops: Matrix products in float32, FLOP/s.
        attention: Part of `half_flops` that attention reaches, forward.
        attention_backward: The same for its backward.
        bandwidth: Memory, bytes/s.
        launch: Seconds that the smallest kernel takes.
        attention_workspace: Whether its attention backward needs memory beside its results, as cuDNN and
            flash-attention 2 do: the gradient of q in float32, and those of k and v for each head of q.
        crowded: Whether a product or an attention leaves no room for a collective that was not there before it.
    """

    name: str
    half_flops: float
    single_flops: float
    attention: float
    attention_backward: float
    bandwidth: float
    launch: float = 3e-6
    attention_workspace: bool = True
    crowded: bool = True


@dataclass(frozen=True)
class Link:
    """What connects the ranks of an axis, or a device to host memory.

    Args:
        name: Key in `LINKS` or `HOST_LINKS`.
        bandwidth: Bytes per second that one rank sends, or that go each way at once between a device and its host.
        latency: Seconds before the first byte.
    """

    name: str
    bandwidth: float
    latency: float = 15e-6


DEVICES = {
    d.name: d
    for d in (
        Device("h200", 750e12, 50e12, 0.80, 0.70, 4.2e12),
        Device("h100", 750e12, 50e12, 0.80, 0.70, 2.8e12),
        Device("a100", 260e12, 18e12, 0.65, 0.55, 1.7e12),
        Device("cpu", 0.2e12, 0.1e12, 0.5, 0.5, 2e10, 1e-5, attention_workspace=False, crowded=False),
    )
}
LINKS = {
    link.name: link
    for link in (
        Link("nvlink4", 200e9),
        Link("nvlink3", 130e9),
        # Through host memory: PCI Express 5.0 as measured with NCCL_P2P_DISABLE=1, and 4.0.
        Link("pcie5", 26e9, 40e-6),
        Link("pcie", 12e9, 40e-6),
        Link("network-400g", 40e9, 30e-6),
    )
}
# Copies of pinned memory on sixteen lanes: four fifths of the 63 and 31.5 GB/s that PCI Express 5.0 and 4.0 specify for
# each direction, and the same part of the 450 GB/s of a Grace Hopper's NVLink-C2C. Scaled from data sheets.
HOST_LINKS = {
    link.name: link
    for link in (
        Link("pcie5", 50e9),
        Link("pcie4", 25e9),
        Link("nvlink-c2c", 360e9),
    )
}


@dataclass(frozen=True)
class Cost:
    """What one operation does on one rank.

    Args:
        flops: Floating-point operations of products and attention; pointwise work is counted as bytes.
        bytes: Read and written in memory.
        sent: Bytes that a collective sends from this rank, or that are copied to or from host memory.
        dtype: Of the operands, which decides the rate.
        attention: 0, or 1 for attention and 2 for its backward.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    dtype: torch.dtype | None = None
    attention: int = 0


def device(name: str) -> Device:
    """A device of the table.

    Raises:
        UnsupportedError: The table does not have it.
    """
    return _entry(DEVICES, name, "device")


def link(name: str) -> Link:
    """A link of the table.

    Raises:
        UnsupportedError: The table does not have it.
    """
    return _entry(LINKS, name, "link")


def host_link(name: str) -> Link:
    """A link between a device and host memory, of the table.

    Raises:
        UnsupportedError: The table does not have it.
    """
    return _entry(HOST_LINKS, name, "host link")


def _entry(table: Mapping[str, T], name: str, what: str) -> T:
    if name in table:
        return table[name]
    raise UnsupportedError(f"the cost model has no {what} {name!r}", hint=f"choose one of {', '.join(sorted(table))}")


def is_costed(node: Node) -> bool:
    """Whether the node is a product or attention, or says what it costs: work that communication can hide behind."""
    return node.op.name in _FLOPS or node.op.cost is not None


def cost_of(node: Node, symbols: Mapping[str, int] | None = None, mesh: Mapping[str, int] | None = None) -> Cost:
    """The cost of one node.

    Args:
        node: Any node; placeholders and views are free.
        symbols: Numbers for symbolic extents, by symbol name.
        mesh: Axis sizes, for collectives that do not say among how many ranks they run; without it, among two.

    Raises:
        UnsupportedError: An extent is symbolic and has no number.
    """
    if node.op.kind != "call_function" or not node.results:
        return Cost()
    sizes = _Sizes(symbols or {})
    if node.op.has(Trait.COLLECTIVE):
        return Cost(sent=_sent(node, sizes, mesh or {}))
    if starts_copy(node):
        return Cost(sent=sizes.bytes(node.result.type))
    if node.op.has(Trait.VIEW) or node.op.has(Trait.IDENTITY) or node.is_op(*_FREE):
        return Cost()
    moved = sum(sizes.bytes(v.type) for v in (*node.operands, *node.results))
    if node.op.cost is not None:
        given = node.op.cost(node)
        return Cost(given.get("flops", 0.0), given.get("bytes", moved), dtype=_narrowest(node))
    if node.op.name not in _FLOPS:
        return Cost(bytes=moved)
    attention = (1 if node.is_op("autosp.attention") else 2) if _attends(node) else 0
    # What is added to may be wider than what is multiplied.
    dtype = node.operands[-1 if node.is_op("autosp.addmm_float32") else 0].tensor_type.dtype
    return Cost(_FLOPS[node.op.name](node, sizes), moved, dtype=dtype, attention=attention)


def workspace(node: Node, on: Device | None, symbols: Mapping[str, int] | None = None, *, fused: bool = False) -> int:
    """Bytes that a node needs on a device beside operands and results, while it runs.

    Args:
        node: Any node.
        on: The device; None has none.
        symbols: Numbers for symbolic extents, by symbol name.
        fused: Whether a compiler fuses the program.

    Raises:
        UnsupportedError: An extent is symbolic and has no number.
    """
    if node.op.workspace is not None:
        return node.op.workspace(node, fused)
    # That of a learned bias runs block by block.
    if on is None or not on.attention_workspace or not node.is_op("autosp.attention_backward"):
        return 0
    sizes = _Sizes(symbols or {})
    q, k, v = (node.arg(name) for name in ("q", "k", "v"))
    batch, heads, queries, width = sizes.shape(q)
    row_sums = 4 * batch * heads * queries
    own_heads = heads == sizes.shape(k)[1]
    expanded = 0 if own_heads else sum(sizes.bytes(x.type) // sizes.shape(x)[1] * heads for x in (k, v))
    return row_sums * (width + 1) + expanded


def _narrowest(node: Node) -> torch.dtype | None:
    """The narrowest floating dtype among the operands, in which the bulk of the work is taken to be."""
    dtypes = [v.type.dtype for v in node.operands if isinstance(v.type, TensorType)]
    return min((d for d in dtypes if d.is_floating_point), key=lambda d: d.itemsize, default=None)


def compute_seconds(cost: Cost, on: Device) -> float:
    """Seconds on the compute stream: the slower of arithmetic and memory; 0 for what launches nothing."""
    if not cost.flops and not cost.bytes:
        return 0.0
    rate = on.half_flops if cost.dtype in _HALF else on.single_flops
    rate *= (1.0, on.attention, on.attention_backward)[cost.attention]
    return max(cost.flops / rate, cost.bytes / on.bandwidth, on.launch)


def link_seconds(cost: Cost, over: Link) -> float:
    """Seconds on the communication stream; 0 for what sends nothing."""
    return over.latency + cost.sent / over.bandwidth if cost.sent else 0.0


class _Sizes:
    """Extents and bytes of types as numbers."""

    def __init__(self, symbols: Mapping[str, int]) -> None:
        self._symbols = symbols

    def extent(self, dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        found = dim.subs({s: self._symbols[s.name] for s in dim.free_symbols if s.name in self._symbols})
        if found.is_Integer:
            return int(found)
        raise UnsupportedError(f"the extent {dim} has no number", hint="pass symbols={'s0': length, …}")

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(self.extent(d) for d in value.tensor_type.shape)

    def bytes(self, kind: Type) -> int:
        if isinstance(kind, TupleType):
            return sum(self.bytes(e) for e in kind.elements)
        if not isinstance(kind, TensorType):
            return 0
        return math.prod(self.extent(d) for d in kind.shape) * kind.dtype.itemsize


def _sent(node: Node, sizes: _Sizes, mesh: Mapping[str, int]) -> float:
    """Bytes one rank sends; ring algorithms for reductions, as NCCL uses for large payloads."""
    payload = sum(sizes.bytes(v.type) for v in node.operands)
    name = node.op.short_name
    if name == "wait_tensor":
        return 0.0
    ranks = _ranks(node, mesh)
    share = (ranks - 1) / ranks
    factor = {"all_reduce": 2 * share, "all_gather": ranks - 1, "all_gather_into_tensor": ranks - 1}.get(name, share)
    return payload * factor


def _ranks(node: Node, mesh: Mapping[str, int]) -> int:
    splits = node.arg("input_split_sizes") if _has(node, "input_split_sizes") else None
    if splits is not None:
        return len(splits)
    for name in ("size", "group_size"):
        if _has(node, name):
            return int(node.arg(name))
    # A functional all-reduce does not say.
    return mesh.get(mesh_axis(str(node.arg("group_name"))), 2)


def _has(node: Node, argument: str) -> bool:
    return node.op.schema is not None and any(a.name == argument for a in node.op.schema.arguments)


def _attends(node: Node) -> bool:
    return node.op.has(Trait.ATTENTION) or node.op.name.startswith("autosp.attention")


def _product(node: Node, sizes: _Sizes) -> float:
    """2 x elements of the result x the contracted extent."""
    left = node.operands[-2] if node.op.short_name in ("addmm", "baddbmm", "addmm_float32") else node.operands[0]
    contracted = sizes.shape(left)[-1]
    return 2.0 * math.prod(sizes.shape(node.result)) * contracted


def _attention(factor: float) -> Callable[[Node, _Sizes], float]:
    def flops(node: Node, sizes: _Sizes) -> float:
        batch, heads, queries, width = sizes.shape(node.arg("q"))
        keys = sizes.shape(node.arg("k"))[2]
        seen = min(keys, int(node.arg("window") or keys)) * queries
        half = 0.5 if node.arg("causal") and not node.arg("window") else 1.0
        return factor * 4.0 * batch * heads * seen * width * half

    return flops


_FLOPS: dict[str, Callable[[Node, _Sizes], float]] = {
    **dict.fromkeys(("aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.linear", "aten.matmul"), _product),
    **dict.fromkeys(("autosp.mm_float32", "autosp.addmm_float32"), _product),
    "autosp.attention": _attention(1.0),
    "autosp.attention_backward": _attention(2.5),
    "autosp.attention_bias_backward": _attention(2.5),
}


__all__ = ["DEVICES", "HOST_LINKS", "LINKS", "Cost", "Device", "Link", "compute_seconds", "cost_of", "device",
           "host_link", "is_costed", "link", "link_seconds", "workspace"]  # fmt: skip
