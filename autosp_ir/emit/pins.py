"""Pins: what a schedule and a chunk loop arranged, as dependencies that Inductor's scheduler may not break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir._torch_compat import graph_pass, order_nodes
from autosp_ir.emit.head_starts import give_head_starts

# A result this many times smaller than an operand is a sum over it, such as a loss or the gradient of a bias.
_REDUCED = 8


def pinning_pass(anchors: Callable[[fx.Node], bool], chunked: bool, version: str) -> Any:
    """`give_head_starts` and `pins` as a pass of Inductor.

    Args:
        anchors: Which nodes are costed.
        chunked: As in `pins`.
        version: Identifies what `anchors` accepts, for Inductor's cache of compiled graphs.
    """

    def run(graph: fx.Graph) -> None:
        give_head_starts(graph, anchors)
        order_nodes(graph, pins(graph, anchors, chunked))

    return graph_pass(run, f"autosp_ir.pins 6 {chunked} {version}")


def pins(graph: fx.Graph, anchors: Callable[[fx.Node], bool], chunked: bool = False) -> dict[fx.Node, list[fx.Node]]:
    """What each node has to stand behind so that collectives and chunks keep their order.

    The first costed operation behind a start depends on the start, and so does a head start between them; a wait
    depends on the last costed operation in front of it and on what was started since. A wait right behind its start is
    left alone: pins cost fusion. In a program of chunks every costed operation depends on the one in front of it and on
    the sums computed since: otherwise chunks are fused with each other, or all their losses with the sum of them, which
    reads the logits of every chunk.
    Copies to host memory and back are tied in from both sides: no data says that one from host memory begins late, nor
    that the wait of one to host memory, behind which the memory of its source is free, comes early. Where there are
    copies all costed operations keep their order, or what a copy hides under moves away.

    Args:
        graph: A graph of Inductor after its own passes.
        anchors: Which nodes are costed.
        chunked: Whether the graph runs parts of the program chunk by chunk.
    """
    functional, copies = torch.ops._c10d_functional, torch.ops.autosp
    found: dict[fx.Node, list[fx.Node]] = {}
    last: fx.Node | None = None
    started: dict[fx.Node, fx.Node | None] = {}
    fresh: list[fx.Node] = []
    begin = 0
    nodes = list(graph.nodes)
    copying = any(n.target in (copies.offload.default, copies.reload.default) for n in nodes)
    for place, node in enumerate(nodes):
        if node.target in (functional.wait_tensor.default, copies.wait_copy.default):
            start: Any = node.args[0]
            earlier = [n for n in fresh if n is not start]
            if start in started and started[start] is not last and last is not None:
                found[node] = [last, *earlier]
            elif earlier:
                found[node] = earlier
            if node.target is copies.wait_copy.default:
                fresh.append(node)
        elif node.target in (copies.offload.default, copies.reload.default):
            if last is not None and node.target is copies.reload.default:
                found[node] = [last]
            started[node] = last
            fresh.append(node)
        elif node.target is copies.head_start.default:
            found[node], fresh = fresh, [*fresh, node]
        elif str(getattr(node.target, "namespace", "")) == "_c10d_functional":
            started[node] = last
            fresh.append(node)
        elif node.op == "call_function" and anchors(node):
            behind, fresh = fresh, []
            if last is not None and (chunked or copying):
                behind = [*behind, last, *_reductions(nodes[begin:place] if chunked else ())]
            if behind:
                found[node] = behind
            last, begin = node, place + 1
    return _not_implied(nodes, found)


def _reductions(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those that reduce a tensor to a much smaller floating-point one."""

    def reduces(node: fx.Node) -> bool:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        sources = [n.meta.get("val") for n in node.all_input_nodes]
        return any(isinstance(s, Tensor) and s.numel() >= _REDUCED * value.numel() for s in sources)

    return [n for n in nodes if reduces(n)]


def _not_implied(nodes: Sequence[fx.Node], found: Mapping[fx.Node, list[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    """The pins that no data and no other pin implies.

    Inductor counts a pin as one more reader of what it names, and computes nothing in place of what is read again: the
    gradient of a chunk's logits would get memory of its own beside the logits.
    """
    bit = {node: 1 << place for place, node in enumerate(nodes)}
    ahead: dict[fx.Node, int] = {}
    kept: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        ahead[node] = _union(bit[n] | ahead[n] for n in node.all_input_nodes)
        # The latest first: it may stand behind the others itself.
        for other in sorted(set(found.get(node, ())), key=bit.__getitem__, reverse=True):
            if not ahead[node] & bit[other]:
                kept.setdefault(node, []).append(other)
                ahead[node] |= bit[other] | ahead[other]
    return kept


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


__all__ = ["pinning_pass", "pins"]
