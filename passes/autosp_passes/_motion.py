"""Moving communication apart from what reads it: new orders of a program's nodes, no node is changed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from autosp_ir.analysis.cost import is_costed
from autosp_ir.analysis.timeline import Durations, is_start, is_wait, run, start_of
from autosp_ir.comm.host_memory import WAIT_COPY, starts_copy
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait

_KEEPS_ORDER = frozenset({Trait.MUTATES, Trait.RANDOM})
# How far in front of a start work is looked for that can run beside it.
_WINDOW = 8


def is_light(node: Node) -> bool:
    """Whether a node may follow a start or a wait when that moves: neither costed work, communication nor a copy."""
    moves = node.op.kind == "call_function" and not is_costed(node) and not starts_copy(node)
    apart = is_start(node) or is_wait(node) or node.is_op(WAIT_COPY)
    return moves and not apart and not node.op.traits & _KEEPS_ORDER


def start_early(order: Sequence[Node]) -> list[Node]:
    """Put every start, and the light work it needs, right behind the last costed work or wait that it needs."""
    result = list(order)
    for start in [n for n in order if is_start(n)]:
        position = {n: i for i, n in enumerate(result)}
        needed, stack = {start}, [start]
        barrier = -1
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
        moved = [n for n in result[barrier + 1 : position[start] + 1] if n in needed]
        rest = [n for n in result[barrier + 1 : position[start] + 1] if n not in needed]
        result[barrier + 1 : position[start] + 1] = moved + rest
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


def fill_stalls(order: Sequence[Node], priced: Durations) -> list[Node]:
    """Put costed work that stands in front of a start, and that the start does not need, between it and its wait.

    Only as much is moved, and from as near, as shortens the whole: what moves keeps its operands alive for longer.
    """
    best = list(order)
    timeline = run(best, priced)
    for wait in list(timeline.stalls):
        while wait in timeline.stalls and (filler := _filler(best, wait)) is not None:
            first, last, group = filler
            middle = best[first:last]
            moved = [*(n for n in middle if n not in group), *(n for n in middle if n in group)]
            tried = best[:first] + moved + best[last:]
            after = run(tried, priced)
            if after.makespan >= timeline.makespan:
                break
            best, timeline = tried, after
    return best


def _filler(order: Sequence[Node], wait: Node) -> tuple[int, int, set[Node]] | None:
    """The nearest costed node in front of the wait's start that can move behind it, with what depends on it."""
    position = {n: i for i, n in enumerate(order)}
    start, end = position[start_of(wait)], position[wait]
    needed = _ancestors(start_of(wait), order[max(0, start - 400) : start])
    seen = 0
    for index in range(start - 1, -1, -1):
        node = order[index]
        if is_wait(node) or seen == _WINDOW:
            return None
        if not is_costed(node):
            continue
        seen += 1
        if node in needed:
            continue
        group = _descendants(node, order[index:end])
        # What is awaited in between would be started later, and stall in its turn.
        if not any(is_wait(n) or n.op.traits & _KEEPS_ORDER for n in group):
            return index, end, group
    return None


def _ancestors(node: Node, among: Sequence[Node]) -> set[Node]:
    found, inside = {node}, set(among)
    for each in reversed(among):
        if any(u in found for u in each.users):
            found.add(each)
    return found & inside


def _descendants(node: Node, among: Iterable[Node]) -> set[Node]:
    found = {node}
    for each in among:
        if any(v.producer in found for v in each.operands):
            found.add(each)
    return found


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


__all__ = ["fill_stalls", "is_light", "out_of_place", "start_early", "wait_late"]
