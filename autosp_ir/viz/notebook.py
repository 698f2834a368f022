"""How programs and results show themselves in a notebook: static HTML, readable in light and dark."""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import TYPE_CHECKING

from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.printer import format_origin, show_argument, show_type
from autosp_ir.ir.program import Program

if TYPE_CHECKING:
    from autosp_ir.pipeline.manager import PassResult

_MOST_LINES = 400
_DEPTH = 4
"""Modules nested deeper are shown with the module they are in: `model.layers.0.self_attn` has its projections."""

_COLOURS = {"S": "#2da44e", "R": "#3b82d6", "P": "#e0742b"}
_LAYOUT = re.compile(r"\{[^}]*\}")
_PRE = "font: 12px/1.45 ui-monospace, monospace; overflow: auto; max-height: 30em; margin: 0"


def program_html(program: Program) -> str:
    """The program by module, each foldable, layouts coloured."""
    nodes = list(program.graph.nodes)
    collectives = sum(n.op.has(Trait.COLLECTIVE) for n in nodes)
    mesh = ", ".join(f"{axis}={size}" for axis, size in program.mesh.items())
    facts = [f"{program.stage} program", f"{len(nodes)} nodes", *([f"mesh {mesh}"] if mesh else [])]
    facts += [f"{collectives} collectives"] if collectives else []
    parts = [f"<p><b>{html.escape(', '.join(facts))}</b></p>"]
    shown = 0
    for title, group in _groups(nodes):
        if shown >= _MOST_LINES:
            parts.append(f"<p>… and {len(nodes) - shown} more lines; print(program) shows all</p>")
            break
        body = "\n".join(_line(n) for n in group)
        count = f"{len(group)} line{'s' if len(group) > 1 else ''}"
        parts.append(
            f"<details><summary><code>{html.escape(title)}</code> {count}</summary>"
            f'<pre style="{_PRE}">{body}</pre></details>'
        )
        shown += len(group)
    return "\n".join(parts)


def result_html(result: PassResult) -> str:
    """One row per pass, then the program."""
    head = "".join(f'<th style="text-align:left">{h}</th>' for h in ("pass", "", "rewrites", "ms", "counted"))
    rows = []
    for record in result.trace:
        counted = ", ".join(f"{k} {v}" for k, v in record.statistics.items())
        cells = (
            record.text,
            "modified" if record.modified else "unchanged",
            str(len(record.rewrites)),
            f"{record.seconds * 1e3:.1f}",
            counted,
        )
        columns = "".join(f'<td style="text-align:left">{html.escape(c)}</td>' for c in cells)
        rows.append(f"<tr>{columns}</tr>")
    missed = Counter(r.message for r in result.remarks if r.kind == "missed")
    notes = "".join(f"<li>{html.escape(message)}{f' ({n}×)' if n > 1 else ''}</li>" for message, n in missed.items())
    remarks = f"<p>Left alone:</p><ul>{notes}</ul>" if notes else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"{table}{remarks}{program_html(result.program)}"


def _groups(nodes: list[Node]) -> list[tuple[str, list[Node]]]:
    """Runs of lines of one module, in order."""
    found: list[tuple[str, list[Node]]] = []
    for node in nodes:
        module = ".".join((node.origin.module or "").split(".")[:_DEPTH])
        title = "inputs" if node.op.kind == "placeholder" else module or "(no module)"
        if node.phase != "forward":
            title = f"{title} · {node.phase}"
        if found and found[-1][0] == title:
            found[-1][1].append(node)
        else:
            found.append((title, [node]))
    return found


def _line(node: Node) -> str:
    arguments = [show_argument(a) for a in node.args]
    arguments += [f"{k}={show_argument(v)}" for k, v in node.kwargs.items()]
    if node.op.kind == "output":
        return html.escape(f"return {', '.join(arguments)}")
    kind = _coloured(html.escape(show_type(node.result.type)))
    call = html.escape(f"{node.op.name}({', '.join(arguments)})")
    origin = format_origin(node.origin)
    comment = f' <span style="opacity:.6"># {html.escape(origin)}</span>' if origin else ""
    return f"<b>%{html.escape(node.name)}</b>: {kind} = {call}{comment}"


def _coloured(kind: str) -> str:
    """A type with its layouts coloured; `kind` is escaped already."""

    def colour(match: re.Match[str]) -> str:
        placement = re.search(r": ([SRP])", match.group())
        shade = _COLOURS.get(placement.group(1)) if placement is not None else None
        return f'<b style="color:{shade}">{match.group()}</b>' if shade else match.group()

    return _LAYOUT.sub(colour, kind)


__all__ = ["program_html", "result_html"]
