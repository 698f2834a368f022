"""Which collectives a program runs, in what order, of what: ranks that differ in it mix up each other's messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from autosp_ir.analysis.cost import is_costed
from autosp_ir.ir.graph import Node, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType, Type
from autosp_ir.ir.verify import output_leaves

_Names = dict[Node, int]
"""A set of names of inputs or outputs for each node, as the bits of a number."""

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.layout, torch.memory_format)


def collectives_of(program: Program) -> str:
    """A digest of the collectives of a program.

    Two exchanges of one type, such as those of queries and keys, would pass for each other. So what a collective is
    of counts as well: its name, the inputs that it depends on, the outputs that depend on it, and how its operands
    are made from what products, attentions and other collectives give. Neither a schedule nor rematerialisation
    changes that.

    Args:
        program: As emitted; what it computes between its collectives does not count.
    """
    sources, sinks = _sources(program), _sinks(program)
    made: dict[Node, str] = {}
    told = hashlib.sha256()
    for node in program.graph.nodes:
        if _communicates(node):
            arguments = map_values((node.args, dict(node.kwargs)), lambda value: _on_any_rank(value.type))
            results = [_on_any_rank(value.type) for value in node.results]
            of = f"{node.name} {sources[node]:x} {sinks[node]:x} {[made[v.producer] for v in node.operands]}"
            told.update(f"{node.phase} {node.op.name} {arguments} {results} {of}\n".encode())
        # What is computed again leads to fewer outputs than what it stands for, but comes from the same inputs.
        how = f"{sources[node]:x}" if _is_kept(node) else _shown((node.args, dict(node.kwargs)), made)
        made[node] = _digest(node.op.name, how)
    return told.hexdigest()[:12]


def _communicates(node: Node) -> bool:
    return node.op.has(Trait.COLLECTIVE) or "c10d" in node.op.name


def _is_kept(node: Node) -> bool:
    """Whether only its operation and the inputs that it depends on tell how a node is made."""
    chunked = node.is_op("autosp.unchunk")
    return node.op.kind != "call_function" or is_costed(node) or _communicates(node) or chunked


def _sources(program: Program) -> _Names:
    """The inputs that each node depends on."""
    graph = program.graph
    names = {spec.name: f"{spec.kind} {spec.target}" for spec in program.signature.inputs}
    bits = _bits(names.values())
    found = {node: bits[names[node.name]] for node in graph.inputs}
    for node in graph.nodes:
        if node not in found:
            found[node] = _union(found[value.producer] for value in node.operands)
    return found


def _sinks(program: Program) -> _Names:
    """The outputs that depend on each node."""
    graph = program.graph
    names = [f"{spec.kind} {spec.target}" for spec in program.signature.outputs]
    bits = _bits(names)
    found: _Names = {}
    for name, value in zip(names, output_leaves(graph), strict=True):
        if isinstance(value, Value):
            found[value.producer] = found.get(value.producer, 0) | bits[name]
    for node in reversed(list(graph.nodes)):
        found[node] = found.get(node, 0) | _union(found[user] for user in node.users if user.results)
    return found


def _bits(names: Iterable[str]) -> dict[str, int]:
    """A bit for each name, the same whatever their order."""
    return {name: 1 << place for place, name in enumerate(sorted(set(names)))}


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
