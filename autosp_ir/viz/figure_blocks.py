"""What a figure of a rewrite draws: the lines of one module, with what the pass left alone folded into few boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from autosp_ir.viz.matching import Row
from autosp_ir.viz.recording import Line

Status = Literal["same", "changed", "removed", "added"]
_LAYOUT = re.compile(r" ?\{([^}]*)\}")
_WIDEST = 11
"""Characters of a title that fit a third of half a column."""

_INVISIBLE = ("placeholder", "output")
_OF_PARAMETERS = ("autosp.invariant_to_replicate", "aten.t", "aten.detach")


@dataclass
class Box:
    """One box: an operation, several folded ones, or a value that enters the module.

    Args:
        lines: Its operations, in order; empty for a value that enters.
        status: What the pass did to them.
        title: First line of text.
        notes: Further lines: shape and layout.
        sources: Boxes it reads.
    """

    lines: list[Line]
    status: Status
    title: str
    notes: list[str]
    sources: list[Box] = field(default_factory=list)

    @property
    def enters(self) -> bool:
        """Whether it stands for a value from outside."""
        return not self.lines


def boxes_of(program: Sequence[Line], module: str, status: dict[int, Status]) -> list[Box]:
    """The boxes of one module, sources first.

    Args:
        program: The whole program.
        module: Module path; submodules belong to it.
        status: What the pass did, by key.
    """
    inside = [n for n in program if belongs(n, module)]
    groups = _Groups(inside, status)
    groups.fold()
    return _drawn(groups, {n.key: n for n in program})


def belongs(line: Line, module: str) -> bool:
    """Whether a line is drawn with a module."""
    if line.op in _INVISIBLE:
        return False
    return line.module == module or line.module.startswith(f"{module}.")


def statuses(rows: Sequence[Row]) -> tuple[dict[int, Status], dict[int, Status]]:
    """What a pass did to each line before and after; reading another operand is no change by itself."""
    before: dict[int, Status] = {}
    after: dict[int, Status] = {}
    for row in rows:
        if row.before is not None and row.after is not None:
            same = (row.before.op, row.before.type) == (row.after.op, row.after.type)
            before[row.before.key] = after[row.after.key] = "same" if same else "changed"
        elif row.before is not None:
            before[row.before.key] = "removed" if row.kind == "removed" else "changed"
        elif row.after is not None:
            after[row.after.key] = "added" if row.kind == "added" else "changed"
    return before, after


class _Groups:
    """Lines in groups; two groups are merged only where that makes no cycle."""

    def __init__(self, lines: Sequence[Line], status: dict[int, Status]) -> None:
        self.lines = lines
        self.status = status
        self.of = {n.key: n.key for n in lines}
        self.members = {n.key: [n] for n in lines}

    def fold(self) -> None:
        """Merge results of one operation into it, then what the pass did not add or remove, until nothing changes."""
        for line in self.lines:
            if line.op == "operator.getitem" and line.operands[0] in self.of:
                self._merge(self.of[line.operands[0]], self.of[line.key])
        while any(self._fold_into_reader(g) or self._fold_into_source(g) for g in list(self.members)):
            pass

    def _fold_into_reader(self, group: int) -> bool:
        """A group with one reader goes into it: every way out of it leads there."""
        if group not in self.members:
            return False
        readers = {r for r, sources in self.edges().items() if group in sources}
        return len(readers) == 1 and self._try(group, next(iter(readers)))

    def _fold_into_source(self, group: int) -> bool:
        """A group with one source goes into it: every way in comes from there."""
        if group not in self.members:
            return False
        sources = self.edges()[group]
        return len(sources) == 1 and self._try(next(iter(sources)), group)

    def _try(self, first: int, second: int) -> bool:
        if not (self._foldable(first) and self._foldable(second)):
            return False
        if self.status[self.members[first][0].key] != self.status[self.members[second][0].key]:
            return False
        self._merge(first, second)
        return True

    def _foldable(self, group: int) -> bool:
        return all(
            self.status[n.key] in ("same", "changed") and not {"collective", "attention"} & set(n.traits)
            for n in self.members[group]
        )

    def _merge(self, first: int, second: int) -> None:
        self.members[first] += self.members.pop(second)
        for line in self.members[first]:
            self.of[line.key] = first

    def edges(self) -> dict[int, set[int]]:
        """The groups that each group reads."""
        return {
            g: {self.of[o] for n in members for o in n.operands if o in self.of and self.of[o] != g}
            for g, members in self.members.items()
        }


def _drawn(groups: _Groups, program: dict[int, Line]) -> list[Box]:
    edges = groups.edges()
    order = _ordered(edges)
    boxes = {g: _box(groups.members[g], groups.status) for g in order}
    entering: dict[int, Box] = {}
    for group in order:
        boxes[group].sources = [boxes[s] for s in order if s in edges[group]]
        for operand in dict.fromkeys(o for n in groups.members[group] for o in n.operands if o not in groups.of):
            outer = program.get(operand)
            if outer is None or _is_parameter(outer, program):
                continue
            box = entering.setdefault(operand, Box([], "same", f"%{outer.name}", _notes(outer)))
            boxes[group].sources.append(box)
    return [*entering.values(), *boxes.values()]


def _ordered(edges: dict[int, set[int]]) -> list[int]:
    """Groups, sources first."""
    done: dict[int, None] = {}

    def visit(group: int) -> None:
        if group in done:
            return
        for source in sorted(edges[group]):
            visit(source)
        done[group] = None

    for group in edges:
        visit(group)
    return list(done)


def _box(lines: list[Line], status: dict[int, Status]) -> Box:
    real = [n for n in lines if n.op != "operator.getitem"] or lines
    first, last = short(real[0].op), short(real[-1].op)
    if len(real) == 1:
        return Box(lines, status[real[0].key], first, _notes(real[0]))
    joint = f"{first}, {last}" if len(real) == 2 else f"{first} … {last}"
    rows = [joint] if len(joint) <= _WIDEST else [f"{first} …", last]
    count = [f"{len(real)} ops"] if len(real) > 2 else []
    return Box(lines, status[real[0].key], rows[0], [*rows[1:], *count, *_notes(lines[-1])])


def short(op: str) -> str:
    """`view` for `aten.view`, `add` for `aten.add.Tensor`."""
    parts = op.strip("`").split(".")
    return parts[1] if parts[0] in ("aten", "autosp", "_c10d_functional", "operator") and len(parts) > 1 else parts[-1]


def _notes(line: Line) -> list[str]:
    """Shape and layout of a line's first tensor."""
    shape = re.search(r"\[([^\]]*)\]", line.type)
    layout = _LAYOUT.search(line.type)
    return [
        *([shape.group(1).replace(", ", "×")] if shape is not None and shape.group(1) else []),
        *([layout.group(1)] if layout is not None else []),
    ]


def _is_parameter(line: Line, program: dict[int, Line]) -> bool:
    """Whether a value is a parameter, or a parameter in another layout."""
    while line.op in _OF_PARAMETERS and line.operands and line.operands[0] in program:
        line = program[line.operands[0]]
    return line.op == "placeholder" and line.args.startswith(("parameter", "buffer", "constant"))


__all__ = ["Box", "Status", "belongs", "boxes_of", "short", "statuses"]
