"""A structural hash of programs: equal for equal programs, whatever their values are called.

It covers operations, arguments, types with layouts, phases, order, signature, stage, mesh, info and nested graphs. It
leaves out names, origins, FX metadata, facts and the contents of tensors. It is the same in every process, so that
hashes of two runs can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from autosp_ir.ir.graph import Graph, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Layout, ScalarType, TensorType, TupleType, Type


def structural_hash(program: Program) -> str:
    """The hash as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    signature = program.signature
    header = [
        program.stage.value,
        json.dumps(program.mesh),
        json.dumps(program.info, sort_keys=True, default=repr),
        *(f"in {i.kind.value} {i.target} {i.requires_grad}" for i in signature.inputs),
        *(f"out {o.kind.value} {o.target} {o.name}" for o in signature.outputs),
    ]
    digest.update("\n".join(header).encode())
    digest.update(_graph_text(program.graph).encode())
    for name, item in sorted(program.attrs.items()):
        text = _graph_text(item) if isinstance(item, Graph) else type(item).__qualname__
        digest.update(f"\nattr {name}\n{text}".encode())
    return digest.hexdigest()


def bindings_of(program: Program) -> dict[str, int]:
    """Identities of bound tensors and objects, which the hash leaves out; comparable within one process."""
    bound = {f"tensor {k}": id(v) for k, v in program.tensors.items()}
    bound |= {f"attr {k}": id(v) for k, v in program.attrs.items() if not isinstance(v, Graph)}
    return bound


def _graph_text(graph: Graph) -> str:
    numbers: dict[Value, int] = {}
    types: dict[Type, str] = {}
    lines = []
    for node in graph.nodes:
        shown = ""
        if node.results:
            value = node.results[0]
            numbers[value] = len(numbers)
            kind = value.type
            shown = types.get(kind) or types.setdefault(kind, _type_text(kind))
        args = ",".join([_text(a, numbers) for a in node.args])
        kwargs = _mapping(node.kwargs, numbers) if node.kwargs else ""
        lines.append(f"{node.op.name}({args};{kwargs}){node.phase.value}:{shown}")
    return "\n".join(lines)


def _text(item: Any, numbers: Mapping[Value, int]) -> str:
    if isinstance(item, Value):
        # A value of another graph, or one read before it is made, is invalid; it still hashes.
        return f"%{numbers.get(item, item.name)}"
    if isinstance(item, list):
        return f"[{','.join([_text(i, numbers) for i in item])}]"
    if isinstance(item, tuple):
        return f"({','.join([_text(i, numbers) for i in item])})"
    if isinstance(item, Mapping):
        return f"{{{_mapping(item, numbers)}}}"
    if isinstance(item, slice):
        return f"slice{_text((item.start, item.stop, item.step), numbers)}"
    return repr(item)


def _mapping(items: Mapping[str, Any], numbers: Mapping[Value, int]) -> str:
    return ",".join([f"{k}={_text(v, numbers)}" for k, v in items.items()])


def _type_text(kind: Type) -> str:
    if isinstance(kind, TensorType):
        return f"{kind.dtype}{list(kind.shape)}@{kind.device}{_layout_text(kind.layout)}"
    if isinstance(kind, TupleType):
        return f"({','.join([_type_text(e) for e in kind.elements])})"
    if isinstance(kind, ScalarType):
        return f"{kind.kind}:{kind.expr}"
    return repr(kind)


def _layout_text(layout: Layout) -> str:
    return "" if not layout else str(layout)
