"""Moving communication apart from what reads it: new orders of a program's nodes, no node is changed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

from autosp_ir.analysis.cost import is_costed
from autosp_ir.analysis.timeline import is_start, is_wait, stream_of
from autosp_ir.comm.host_memory import WAIT_COPY, starts_copy
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait

_KEEPS_ORDER = frozenset({Trait.MUTATES, Trait.RANDOM})


def is_light(node: Node) -> bool:
    """Whether a node may follow a start or a wait when that moves: neither costed work, communication nor a copy."""
    moves = node.op.kind == "call_function" and not is_costed(node) and not starts_copy(node)
    apart = is_start(node) or is_wait(node) or node.is_op(WAIT_COPY)
    return moves and not apart and not node.op.traits & _KEEPS_ORDER


def start_early(order: Sequence[Node], *, overtake: bool = True) -> list[Node]:
    """Put every start, and the light work it needs, right behind the last costed work or wait that it needs.

    Args:
        order: Nodes in a topological order.
        overtake: Whether a start may come to stand in front of one that stands in front of it.
    """
    result = list(order)
    before: dict[str, Node] = {}
    position = {n: i for i, n in enumerate(result)}
    for start in [n for n in order if is_start(n)]:
        needed, stack = {start}, [start]
        barrier = -1
        if not overtake:
            barrier = position[before[stream_of(start)]] if stream_of(start) in before else -1
            before[stream_of(start)] = start
        while stack:
            for producer in (v.producer for v in stack.pop().operands):
                if producer not in position or producer in needed:
                    continue
                if is_light(producer):
                    needed.add(producer)
                    stack.append(producer)
                else:
                    barrier = max(barrier, position[producer])
        if barrier < 0:
            continue
        first, behind = barrier + 1, position[start] + 1
        passed = result[first:behind]
        result[first:behind] = [n for n in passed if n in needed] + [n for n in passed if n not in needed]
        position.update((n, i) for i, n in enumerate(result[first:behind], first))
    return result


def wait_late(order: Sequence[Node]) -> list[Node]:
    """Put every wait, and the light work behind it, right in front of the first costed work or start that reads it."""
    late: set[Node] = set()
    for node in order:
        if is_wait(node) or (is_light(node) and any(v.producer in late for v in node.operands)):
            late.add(node)
    # From the end: what reads a node stands where it will stay when the node is placed.
    placed: dict[Node, list[Node]] = {}
    first: dict[Node, Node] = {}
    position = {n: i for i, n in enumerate(order)}
    for node in reversed(order):
        if node not in late:
            continue
        readers = [first.get(u, u) for u in node.users if u in position]
        if readers:
            first[node] = min(readers, key=position.__getitem__)
            placed.setdefault(first[node], []).append(node)
    result: list[Node] = []
    for node in order:
        result += reversed(placed.get(node, ()))
        if node not in first:
            result.append(node)
    return result


def loose_waits(order: Sequence[Node]) -> list[Node]:
    """The waits that nothing costed and no start reads, not even through light work: those that the caller reads.

    Args:
        order: Nodes in a topological order.
    """
    position = {n: i for i, n in enumerate(order)}
    loose: set[Node] = set()
    for node in reversed(order):
        if (is_wait(node) or is_light(node)) and all(u in loose for u in node.users if u in position):
            loose.add(node)
    return [n for n in order if is_wait(n) and n in loose]


def wait_last(order: Sequence[Node], waits: Collection[Node]) -> list[Node]:
    """Put some waits, and the light work behind them, at the end.

    An estimate says when a collective is done; where nothing reads it, there is no need to rely on that.

    Args:
        order: Nodes in a topological order.
        waits: Some of `loose_waits`.
    """
    chosen, moved = set(waits), set[Node]()
    for node in order:
        if node in chosen or any(v.producer in moved for v in node.operands):
            moved.add(node)
    return [n for n in order if n not in moved] + [n for n in order if n in moved]


def out_of_place(before: Sequence[Node], after: Sequence[Node]) -> list[tuple[Node, Node | None]]:
    """The fewest moves that turn one order into another: `(node, the node it comes to stand behind)`, in order."""
    rank = {n: i for i, n in enumerate(before)}
    tails: list[int] = []
    last: list[Node] = []
    behind: dict[Node, Node | None] = {}
    for node in after:
        at = bisect_left(tails, rank[node])
        behind[node] = last[at - 1] if at else None
        tails[at : at + 1] = [rank[node]]
        last[at : at + 1] = [node]
    stays: set[Node] = set()
    step: Node | None = last[-1] if last else None
    while step is not None:
        stays.add(step)
        step = behind[step]
    moves: list[tuple[Node, Node | None]] = []
    previous: Node | None = None
    for node in after:
        if node not in stays:
            moves.append((node, previous))
        previous = node
    return moves


__all__ = ["is_light", "loose_waits", "out_of_place", "start_early", "wait_last", "wait_late"]
