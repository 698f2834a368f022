"""Structural rules of collectives: starts and waits pair up, and every rank issues the same collectives.

A program is one straight line for all ranks, so their collectives come in the same order by construction. What can
still differ between ranks is a collective's attributes, the extents of its payload, and whether a branch is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from sympy import Symbol

from autosp_ir.errors import VerifyError
from autosp_ir.ir.graph import Graph, Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import ScalarType, TensorType, TupleType, Type

_ASYNC = "_c10d_functional."
_WAIT = "_c10d_functional.wait_tensor"
_COPY_STARTS = ("autosp.offload", "autosp.reload")
_COPY_WAIT = "autosp.wait_copy"
_EQUALIZING = ("autosp.all_reduce", "autosp.all_gather", f"{_ASYNC}all_reduce", f"{_ASYNC}all_gather_into_tensor")


def check_waits(graph: Graph) -> None:
    """Every asynchronous start has exactly one wait, nothing else reads its result, and every wait has a start.

    Raises:
        VerifyError: A start is never awaited, awaited twice, or read unawaited, or the wait for a copy does not keep
            alive what is copied.
    """
    for node in graph.nodes:
        if node.is_op(_WAIT):
            _check_wait(node)
        elif node.is_op(_COPY_WAIT):
            _check_copy_wait(node)
        elif node.is_op(*_COPY_STARTS):
            _check_copy(node)
        elif node.op.name.startswith(_ASYNC) and node.op.has(Trait.COLLECTIVE):
            for started in _started(node):
                _check_started(started, node)


def _started(node: Node) -> Iterator[Node]:
    """The nodes whose values are in flight: the start itself, or the getitems of a coalesced one."""
    if not isinstance(node.result.type, TupleType):
        yield node
        return
    readers: dict[int, Node] = {}
    for reader in node.users:
        index = reader.args[1] if reader.op.target is operator.getitem else None
        if not isinstance(index, int) or index in readers:
            raise VerifyError(f"%{reader.name} reads the unfinished results of %{node.name}", node=reader, hint=_HINT)
        readers[index] = reader
    for index, _ in enumerate(node.result.type.elements):
        if index not in readers:
            raise VerifyError(f"result {index} of the start %{node.name} is never awaited", node=node, hint=_HINT)
        yield readers[index]


_HINT = "read a collective's result through exactly one _c10d_functional.wait_tensor"


def _check_started(started: Node, start: Node) -> None:
    waits = [u.node for u in started.result.uses if u.node.is_op(_WAIT)]
    what = f"which {start.op.name} has only started"
    _check_one_wait(started, start, waits, what, f"the collective started by %{start.name}", _HINT)


def _check_one_wait(started: Node, start: Node, waits: list[Node], what: str, named: str, hint: str) -> None:
    """Exactly one wait reads what is in flight, and nothing else does."""
    early = next((n for n in started.users if n not in waits), None)
    if early is not None:
        raise VerifyError(f"{early.op.name} reads %{started.name}, {what}", node=early, hint=hint)
    if len(waits) != 1:
        count = "never" if not waits else f"{len(waits)} times"
        raise VerifyError(f"{named} is awaited {count}", node=start, hint=hint)


def _check_wait(node: Node) -> None:
    producer = node.operands[0].producer
    start = producer.operands[0].producer if producer.op.target is operator.getitem else producer
    if not start.op.name.startswith(_ASYNC) or start.is_op(_WAIT):
        raise VerifyError(f"%{node.name} waits for %{producer.name}, which starts no collective", node=node, hint=_HINT)


def _check_copy(start: Node) -> None:
    waits = [u.node for u in start.result.uses if u.node.is_op(_COPY_WAIT) and u.node.operands[0] is start.result]
    what = "a copy that has only been started"
    _check_one_wait(start, start, waits, what, f"the copy started by %{start.name}", _COPY_HINT)


def _check_copy_wait(node: Node) -> None:
    copy, source = node.operands
    if not copy.producer.is_op(*_COPY_STARTS):
        raise VerifyError(f"%{node.name} waits for %{copy.name}, which starts no copy", node=node, hint=_COPY_HINT)
    if source is not copy.producer.operands[0]:
        raise VerifyError(
            f"%{node.name} keeps %{source.name} alive, but %{copy.name} copies %{copy.producer.operands[0].name}",
            node=node,
            hint=_COPY_HINT,
        )


_COPY_HINT = "read a copy through one autosp.wait_copy(copy, source), whose source is what was copied"


def check_same_on_every_rank(program: Program) -> None:
    """No Python number derived from the rank reaches a collective's attributes, payload extents, or a branch over one.

    Raises:
        VerifyError: Ranks would issue different collectives and a run would hang.
    """
    tainted: set[Value] = set()
    symbols: set[Symbol] = set()
    for node in program.graph.nodes:
        if node.op.kind == "output":
            continue
        if node.op.has(Trait.COLLECTIVE):
            _check_collective(node, tainted, symbols)
        _check_branch(node, program, tainted)
        reads = node.op.has(Trait.READS_RANK) or any(v in tainted for v in node.operands)
        if node.is_op("aten.sym_size.int"):
            # Shards have equal extents, whatever they hold: an extent depends on the rank only through its symbols.
            reads = bool(symbols & _symbols(node.operands[0].type))
        if reads and not (node.op.name in _EQUALIZING and len(program.mesh) <= 1):
            tainted.add(node.result)
            if isinstance(node.result.type, ScalarType) and node.result.type.expr is not None:
                symbols |= node.result.type.expr.free_symbols


def _check_collective(node: Node, tainted: set[Value], symbols: set[Symbol]) -> None:
    for value in node.operands:
        if value in tainted and isinstance(value.type, ScalarType):
            raise VerifyError(
                f"%{value.name} depends on the rank and is an attribute of the collective {node.op.name}",
                node=node,
                hint="collectives need the same attributes on every rank; exchange the number first",
            )
        if symbols & _symbols(value.type):
            raise VerifyError(
                f"the extent of %{value.name} depends on the rank, but {node.op.name} sends it",
                node=node,
                hint="pad the payload to one extent on every rank",
            )


def _symbols(kind: Type) -> set[Symbol]:
    if isinstance(kind, TensorType):
        return {s for extent in kind.shape for s in getattr(extent, "free_symbols", ())}
    return {s for e in kind.elements for s in _symbols(e)} if isinstance(kind, TupleType) else set()


def _check_branch(node: Node, program: Program, tainted: set[Value]) -> None:
    conditions = {"hop.cond": node.operands[:1], "hop.while_loop": node.operands}.get(node.op.name, ())
    if not any(v in tainted for v in conditions):
        return
    for value in node.operands:
        nested = program.attrs.get(str(value.producer.args[0])) if value.producer.op.kind == "get_attr" else None
        if isinstance(nested, Graph) and any(n.op.has(Trait.COLLECTIVE) for n in nested.nodes):
            raise VerifyError(
                f"%{node.name} branches on the rank, and the branch %{value.name} holds collectives",
                node=node,
                hint="move the collective out of the branch, so that every rank issues it",
            )


__all__ = ["check_same_on_every_rank", "check_waits"]
