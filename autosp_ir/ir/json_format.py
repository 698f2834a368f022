"""Programs as JSON, for other tools; types and arguments are written as in the IR text."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from autosp_ir.errors import ParseError
from autosp_ir.ir.graph import Graph, Node, Origin
from autosp_ir.ir.parser import parse
from autosp_ir.ir.printer import FORMAT_VERSION, format_type, print_program
from autosp_ir.ir.program import Program


def to_json(program: Program) -> str:
    """The program as a JSON document.

    Besides the program's IR text, which is what `from_json` reads, the document lists every node with its operation,
    operands, type and origin, so that a tool needs no parser for the text.

    Raises:
        UnsupportedError: The program holds something that the text cannot express.
    """
    document = {
        "format": FORMAT_VERSION,
        "text": print_program(program),
        "stage": program.stage.value,
        "mesh": program.mesh,
        "facts": sorted(program.facts),
        "inputs": [asdict(i) for i in program.signature.inputs],
        "outputs": [asdict(o) for o in program.signature.outputs],
        "nodes": [_node(n) for n in program.graph.nodes],
        "graphs": {k: [_node(n) for n in g.nodes] for k, g in program.attrs.items() if isinstance(g, Graph)},
    }
    return json.dumps(document, indent=1)


def _node(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op.name,
        "kind": node.op.kind,
        "operands": [v.name for v in node.operands],
        "type": format_type(node.result.type) if node.results else None,
        "phase": node.phase.value,
        "origin": _origin(node.origin),
    }


def _origin(origin: Origin) -> dict[str, Any]:
    return {"source": origin.source, "module": origin.module, "passes": list(origin.passes)}


def from_json(text: str) -> Program:
    """The unbound program of a document that `to_json` wrote.

    Raises:
        ParseError: The document is no JSON, is of a newer format, or its IR text is malformed.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ParseError(f"not valid JSON: {error.msg}", line=error.lineno, column=error.colno) from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ParseError('expected a JSON object with the IR under "text"', line=1, column=1)
    return parse(document["text"])


__all__ = ["from_json", "to_json"]
