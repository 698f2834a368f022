"""Which collectives a program runs, in what order, of what: ranks that differ in it mix up each other's messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from autosp_ir.ir.graph import Graph, Node, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import TensorType, Type

_Places = dict[Node, int]
"""A set of inputs or outputs for each node, as the bits of a number."""


def collectives_of(program: Program) -> str:
    """A digest of the collectives of a program.

    Two exchanges of one type, such as those of queries and keys, would pass for each other. So what a collective is
    of counts as well: its name, the inputs that it depends on and the outputs that depend on it, which neither a
    schedule nor rematerialisation nor chunks change.

    Args:
        program: As emitted; what it computes between its collectives does not count.
    """
    graph = program.graph
    sources, sinks = _sources(graph), _sinks(graph)
    told = hashlib.sha256()
    for node in graph.nodes:
        if node.op.has(Trait.COLLECTIVE) or "c10d" in node.op.name:
            arguments = map_values((node.args, dict(node.kwargs)), lambda value: _on_any_rank(value.type))
            results = [_on_any_rank(value.type) for value in node.results]
            of = f"{node.name} {sources[node]:x} {sinks[node]:x}"
            told.update(f"{node.phase} {node.op.name} {arguments} {results} {of}\n".encode())
    return told.hexdigest()[:12]


def _sources(graph: Graph) -> _Places:
    """The inputs that each node depends on, as bits by their places."""
    found = {node: 1 << place for place, node in enumerate(graph.inputs)}
    for node in graph.nodes:
        if node not in found:
            found[node] = _union(found[value.producer] for value in node.operands)
    return found


def _sinks(graph: Graph) -> _Places:
    """The outputs that depend on each node, as bits by their places."""
    found: _Places = {}
    for place, value in enumerate(graph.output_node.operands):
        found[value.producer] = found.get(value.producer, 0) | 1 << place
    for node in reversed(list(graph.nodes)):
        found[node] = found.get(node, 0) | _union(found[user] for user in node.users if user.results)
    return found


def _union(sets: Iterable[int]) -> int:
    total = 0
    for one in sets:
        total |= one
    return total


def _on_any_rank(kind: Type) -> str:
    """A type without the index of the device, which is another on every rank of a host."""
    if not isinstance(kind, TensorType):
        return str(kind)
    return str(replace(kind, device=torch.device(kind.device.type)))


__all__ = ["collectives_of"]
