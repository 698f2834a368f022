"""Which collectives a program runs, in what order, of what: ranks that differ in it mix up each other's messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from autosp_ir.ir.graph import Node, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType, Type
from autosp_ir.ir.verify import output_leaves

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.layout, torch.memory_format)


def collectives_of(program: Program) -> str:
    """A digest of the collectives of a program.

    Two exchanges of one type, such as those of queries and keys, would pass for each other. So what a collective is
    of counts as well: its name, how its operands are made from the inputs, and the outputs that depend on it. Neither
    a schedule nor rematerialisation changes that.

    Args:
        program: As emitted.
    """
    names = {spec.name: f"{spec.kind} {spec.target}" for spec in program.signature.inputs}
    sinks = _sinks(program)
    made: dict[Node, str] = {}
    told = hashlib.sha256()
    for node in program.graph.nodes:
        if node.op.has(Trait.COLLECTIVE) or "c10d" in node.op.name:
            arguments = map_values((node.args, dict(node.kwargs)), lambda value: _on_any_rank(value.type))
            results = [_on_any_rank(value.type) for value in node.results]
            of = f"{node.name} {[made[v.producer] for v in node.operands]} {sinks[node]:x}"
            told.update(f"{node.phase} {node.op.name} {arguments} {results} {of}\n".encode())
        # What is computed again is made as what it stands for.
        how = names[node.name] if node.op.kind == "placeholder" else _shown((node.args, dict(node.kwargs)), made)
        made[node] = _digest(node.op.name, how)
    return told.hexdigest()[:12]


def _sinks(program: Program) -> dict[Node, int]:
    """The outputs that depend on each node, as the bits of a number, by their names in order."""
    graph = program.graph
    names = [f"{spec.kind} {spec.target}" for spec in program.signature.outputs]
    bits = {name: 1 << place for place, name in enumerate(sorted(set(names)))}
    found: dict[Node, int] = {}
    for name, value in zip(names, output_leaves(graph), strict=True):
        if isinstance(value, Value):
            found[value.producer] = found.get(value.producer, 0) | bits[name]
    for node in reversed(list(graph.nodes)):
        found[node] = found.get(node, 0) | _union(found[user] for user in node.users if user.results)
    return found


def _union(sets: Iterable[int]) -> int:
    total = 0
    for one in sets:
        total |= one
    return total


def _shown(item: Any, made: Mapping[Node, str]) -> str:
    """An argument by what it says on every rank: values by how they are made, devices without their index."""
    if isinstance(item, Value):
        return made[item.producer]
    if isinstance(item, (list, tuple)):
        return f"[{','.join(_shown(i, made) for i in item)}]"
    if isinstance(item, Mapping):
        return f"{{{','.join(f'{k}={_shown(v, made)}' for k, v in item.items())}}}"
    if isinstance(item, slice):
        return f"slice{_shown((item.start, item.stop, item.step), made)}"
    if isinstance(item, torch.device):
        return item.type
    return repr(item) if isinstance(item, _CONSTANTS) else type(item).__name__


def _digest(*parts: str) -> str:
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


def _on_any_rank(kind: Type) -> str:
    """A type without the index of the device, which is another on every rank of a host."""
    if not isinstance(kind, TensorType):
        return str(kind)
    return str(replace(kind, device=torch.device(kind.device.type)))


__all__ = ["collectives_of"]
