"""What a bisection found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Graph, Node
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.limit import Site

_SHOWN = 20


@dataclass(frozen=True)
class Changes:
    """Lines of IR that a rewrite removed and created, each with its source line; a changed node is in both."""

    removed: tuple[str, ...] = ()
    created: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*_shown("-", self.removed), *_shown("+", self.created)])


@dataclass(frozen=True)
class Bisection:
    """The first rewrite after which a program is bad.

    Args:
        pass_name: Its pass.
        pass_text: The pass with its options.
        site: The rewrite; None when the pass has none of its own, or is wrong without any of them.
        sites: How many rewrites the pass makes.
        units: How many rewrites, and passes without any, were searched.
        runs: How often the predicate was asked.
        inconclusive: Rewrites just before this one that could not be judged: each of them may be the guilty one.
        error: What making the program raises, when that is what is wrong.
        changes: What the rewrite removed and created.
    """

    pass_name: str
    pass_text: str
    site: Site | None
    sites: int
    units: int
    runs: int
    inconclusive: tuple[str, ...] = ()
    error: AutoSPError | None = None
    changes: Changes = field(default_factory=Changes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "pass": self.pass_text,
            "rewrite": vars(self.site) if self.site is not None else None,
            "rewrites": self.sites,
            "units": self.units,
            "runs": self.runs,
            "inconclusive": list(self.inconclusive),
            "error": str(self.error) if self.error is not None else None,
            "removed": list(self.changes.removed),
            "created": list(self.changes.created),
        }

    def __str__(self) -> str:
        lines = [f"first bad pass: {self.pass_text}"]
        if self.site is not None:
            lines.append(f"first bad rewrite: {self.site}; the pass makes {self.sites}")
        elif self.sites:
            lines.append(f"the pass is wrong without any of its {self.sites} rewrites")
        else:
            lines.append("the pass names no rewrites of its own, so it is wrong as a whole")
        if self.inconclusive:
            lines.append("these could not be judged, and may be the first bad one instead:")
            lines += [f"    {label}" for label in self.inconclusive]
        if self.error is not None:
            lines.append(f"{type(self.error).__name__}: {self.error}")
        if self.changes.removed or self.changes.created:
            lines.append(str(self.changes))
        lines.append(f"{self.runs} programs judged, of {self.units}")
        return "\n".join(lines)


def changes(before: Program | AutoSPError, after: Program | AutoSPError) -> Changes:
    """Compare two programs made from copies of one program, node by node and by name.

    Args:
        before: A program, or why there is none.
        after: Likewise; without one of the two there is nothing to compare.
    """
    if isinstance(before, AutoSPError) or isinstance(after, AutoSPError):
        return Changes()
    old, new = _lines(before), _lines(after)
    removed = [line for name, line in old.items() if _code(new.get(name)) != _code(line)]
    created = [line for name, line in new.items() if _code(old.get(name)) != _code(line)]
    return Changes(tuple(removed), tuple(created))


def _lines(program: Program) -> dict[str, str]:
    found = {f"%{node.name}": _line(node) for node in program.graph.nodes}
    for name, graph in program.attrs.items():
        if isinstance(graph, Graph):
            found |= {f"{name}%{node.name}": _line(node) for node in graph.nodes}
    return found


def _line(node: Node) -> str:
    line = node.describe(context=0).splitlines()[0].removeprefix("--> ")
    code, separator, origin = line.partition("   # ")
    source = node.origin.source
    return f"{code}   # {source} {origin.partition(' ')[2]}".rstrip() if source and separator else line


def _code(line: str | None) -> str | None:
    """A line without its origin, which names every pass that touched it."""
    return line.partition("   # ")[0] if line is not None else None


def _shown(mark: str, lines: tuple[str, ...]) -> Iterator[str]:
    yield from (f"{mark} {line}" for line in lines[:_SHOWN])
    if len(lines) > _SHOWN:
        yield f"{mark} … {len(lines) - _SHOWN} more"


__all__ = ["Bisection", "Changes", "changes"]
