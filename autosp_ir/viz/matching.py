"""Which line of one program is which line of another: by identity where nodes kept it, by structure elsewhere."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from autosp_ir.viz.recording import Line

_NAME = re.compile(r"%\w+")
_LAYOUT = re.compile(r" \{[^}]*\}")

Kind = Literal["same", "changed", "removed", "added", "moved"]


@dataclass(frozen=True)
class Row:
    """One row of a side-by-side comparison.

    Args:
        kind: `moved` rows stand on one side only: where the line was, or where it is.
        before: The line before, if it is shown here.
        after: The line after, if it is shown here.
    """

    kind: Kind
    before: Line | None
    after: Line | None


def match_lines(before: Sequence[Line], after: Sequence[Line]) -> list[tuple[int, int]]:
    """Pairs of keys of lines that are the same operation, by structure and not by name.

    First lines that compute the same thing from the same inputs; then, among the rest, in order, lines of one
    operation and type from one place of the model.
    """
    pairs: list[tuple[int, int]] = []
    left, right = _structures(before), _structures(after)
    rest_before, rest_after = _pair([(left[n.key], n) for n in before], [(right[n.key], n) for n in after], pairs)
    rest_before, rest_after = _pair(_places(rest_before, typed=True), _places(rest_after, typed=True), pairs)
    _pair(_places(rest_before, typed=False), _places(rest_after, typed=False), pairs)
    return pairs


def compare(
    before: Sequence[Line], after: Sequence[Line], matches: Sequence[tuple[int, int]] | None = None
) -> list[Row]:
    """Lay two programs side by side.

    Args:
        before: The one program.
        after: The other.
        matches: Keys that belong together; equal keys when None.

    Returns:
        Every line of both, in an order that keeps both programs' orders.
    """
    right = {n.key: i for i, n in enumerate(after)}
    partner = dict(matches) if matches is not None else {n.key: n.key for n in before}
    position = [right.get(partner.get(n.key, -1), -1) for n in before]
    anchors = _increasing(position)
    matched = {p: i for i, p in enumerate(position) if p >= 0}
    rows: list[Row] = []
    i = j = 0
    while i < len(before) or j < len(after):
        while i < len(before) and i not in anchors:
            rows.append(Row("removed" if position[i] < 0 else "moved", before[i], None))
            i += 1
        while j < len(after) and matched.get(j, -1) not in anchors:
            rows.append(Row("added" if j not in matched else "moved", None, after[j]))
            j += 1
        if i < len(before) and j < len(after):
            identity = matches is None
            same = before[i] is after[j] or _shown(before[i], identity) == _shown(after[j], identity)
            rows.append(Row("same" if same else "changed", before[i], after[j]))
            i, j = i + 1, j + 1
    return rows


def _shown(line: Line, identity: bool) -> Hashable:
    """What has to differ for a line to count as changed; across graphs names mean nothing."""
    return line.content if identity else (line.op, line.type, line.phase)


def _structures(lines: Sequence[Line]) -> dict[int, int]:
    """A hash of what each line computes, by key."""
    hashes: dict[int, int] = {}
    for line in lines:
        attributes = _NAME.sub("%", line.args)
        hashes[line.key] = hash((line.op, attributes, _bare(line), tuple(hashes.get(o, 0) for o in line.operands)))
    return hashes


def _bare(line: Line) -> str:
    """The type without layouts: the backward of a program may be laid out otherwise than its forward was."""
    return _LAYOUT.sub("", line.type)


def _places(lines: Sequence[Line], *, typed: bool) -> list[tuple[Hashable, Line]]:
    return [
        ((n.op, n.module, n.source if n.op != "placeholder" else n.args, _bare(n) if typed else ""), n) for n in lines
    ]


def _pair(
    before: Sequence[tuple[Hashable, Line]], after: Sequence[tuple[Hashable, Line]], pairs: list[tuple[int, int]]
) -> tuple[list[Line], list[Line]]:
    """Pair equal tokens in order; the lines that are left on each side."""
    waiting: dict[Hashable, deque[Line]] = defaultdict(deque)
    for token, line in before:
        waiting[token].append(line)
    rest_after = []
    taken: set[int] = set()
    for token, line in after:
        if waiting[token]:
            partner = waiting[token].popleft()
            taken.add(partner.key)
            pairs.append((partner.key, line.key))
        else:
            rest_after.append(line)
    return [n for _, n in before if n.key not in taken], rest_after


def _increasing(positions: Sequence[int]) -> set[int]:
    """Indices of a longest increasing subsequence of the positions that are not -1: what did not move."""
    tails: list[int] = []
    ends: list[int] = []
    previous: dict[int, int] = {}
    for index, position in enumerate(positions):
        if position < 0:
            continue
        place = bisect_left(tails, position)
        previous[index] = ends[place - 1] if place else -1
        tails[place : place + 1] = [position]
        ends[place : place + 1] = [index]
    found: set[int] = set()
    cursor = ends[-1] if ends else -1
    while cursor >= 0:
        found.add(cursor)
        cursor = previous[cursor]
    return found


__all__ = ["Kind", "Row", "compare", "match_lines"]
