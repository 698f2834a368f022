"""Graphs of nodes: an ordered, mutation-safe dataflow list with exact use lists.

One node stands for one FX node, so that import and export are exact. A node with several results has one result of
`TupleType`, read by `operator.getitem` nodes, as in FX.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx.immutable_collections import immutable_dict, immutable_list

from autosp_ir.errors import VerifyError
from autosp_ir.ir.ops import OpDef, Trait, op_by_name
from autosp_ir.ir.types import ObjectType, TensorType, Type


class Phase(enum.StrEnum):
    """Which part of the training step a node belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the user's source line, the module path, and the passes that made or changed it."""

    source: str | None = None
    module: str | None = None
    passes: tuple[str, ...] = ()
    stack: str | None = field(default=None, repr=False)

    def touched_by(self, pass_name: str) -> Origin:
        """This origin with `pass_name` appended to its chain (once in a row)."""
        if self.passes and self.passes[-1] == pass_name:
            return self
        return replace(self, passes=(*self.passes, pass_name))


@dataclass(frozen=True)
class Use:
    """One read of a value: the reading node and the position among its operands."""

    node: Node
    index: int


class Value:
    """The result of a node. `type` may be None only while a graph is being built."""

    __slots__ = ("_type", "_users", "name", "producer")

    def __init__(self, name: str, producer: Node, type: Type) -> None:
        self.name = name
        self.producer = producer
        self._type = type
        self._users: dict[Node, int] = {}

    @property
    def type(self) -> Type:
        """The type; assigning another counts as a mutation of the graph."""
        return self._type

    @type.setter
    def type(self, type: Type) -> None:
        self._type = type
        self.producer.graph.version += 1

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every read of this value, with multiplicity."""
        return tuple(Use(n, i) for n in self._users for i, v in enumerate(n.operands) if v is self)

    @property
    def users(self) -> list[Node]:
        """The distinct nodes that read this value, in program order."""
        return sorted(self._users, key=lambda n: n._order)

    @property
    def tensor_type(self) -> TensorType:
        """The type, which must be a tensor's.

        Raises:
            VerifyError: The value is not a tensor.
        """
        if isinstance(self.type, TensorType):
            return self.type
        raise VerifyError(f"%{self.name} is a {type(self.type).__name__}, not a tensor", node=self.producer)

    def replace_all_uses_with(self, other: Value, keep: tuple[Node, ...] = ()) -> None:
        """Make every user read `other`, except the nodes in `keep`."""
        for node in list(self._users):
            if node in keep:
                continue
            node.replace_operand(self, other)

    def __repr__(self) -> str:
        return f"%{self.name}"


def map_values(structure: Any, fn: Callable[[Value], Any]) -> Any:
    """Rebuild nested args, applying `fn` to every `Value`; lists and dicts become FX's immutable ones."""
    if isinstance(structure, Value):
        return fn(structure)
    if isinstance(structure, tuple):
        mapped = (map_values(s, fn) for s in structure)
        return type(structure)(*mapped) if hasattr(structure, "_fields") else tuple(mapped)
    if isinstance(structure, list):
        return immutable_list([map_values(s, fn) for s in structure])
    if isinstance(structure, dict):
        return immutable_dict({k: map_values(v, fn) for k, v in structure.items()})
    if isinstance(structure, slice):
        return slice(map_values(structure.start, fn), map_values(structure.stop, fn), map_values(structure.step, fn))
    return structure


def values_in(structure: Any) -> list[Value]:
    """Every `Value` in nested args, in order, with multiplicity."""
    found: list[Value] = []
    _collect(structure, found)
    return found


def _collect(structure: Any, into: list[Value]) -> None:
    if isinstance(structure, Value):
        into.append(structure)
    elif isinstance(structure, tuple | list):
        for item in structure:
            _collect(item, into)
    elif isinstance(structure, dict):
        for item in structure.values():
            _collect(item, into)
    elif isinstance(structure, slice):
        _collect((structure.start, structure.stop, structure.step), into)


class Node:
    """One operation in a graph.

    Attributes:
        id: Number that is unique in its graph and never used again; clones keep it.
        op: What it does.
        args: Positional arguments: nested tuples and lists of Values and plain attributes.
        kwargs: Keyword arguments, likewise.
        operands: The Values among the arguments, flattened in order, with multiplicity.
        results: The values it defines: one, or none for `output`.
        phase: forward, backward or recompute.
        origin: Source line, module path and chain of passes.
        meta: FX metadata, kept for exact round trips; no pass may rely on it.
        erased: Whether the node was erased from its graph.
    """

    __slots__ = (
        "_next",
        "_order",
        "_prev",
        "args",
        "erased",
        "graph",
        "id",
        "kwargs",
        "meta",
        "op",
        "operands",
        "origin",
        "phase",
        "results",
    )

    def __init__(self, graph: Graph, op: OpDef, phase: Phase, origin: Origin, meta: dict[str, Any]) -> None:
        self.graph = graph
        self.id = graph._take_id()
        self.op = op
        self.args: tuple[Any, ...] = ()
        self.kwargs: Mapping[str, Any] = immutable_dict()
        self.operands: tuple[Value, ...] = ()
        self.results: list[Value] = []
        self.phase = phase
        self.origin = origin
        self.meta = meta
        self.erased = False
        self._order = 0
        self._prev: Node = self
        self._next: Node = self

    @property
    def result(self) -> Value:
        """The value it defines.

        Raises:
            VerifyError: The node defines none (`output`).
        """
        if self.results:
            return self.results[0]
        raise VerifyError(f"{self.op.name} defines no value", node=self)

    @property
    def name(self) -> str:
        """The name of its value, or `output`."""
        return self.results[0].name if self.results else "output"

    @property
    def users(self) -> list[Node]:
        """The distinct nodes that read its result, in program order."""
        return self.results[0].users if self.results else []

    @property
    def next(self) -> Node | None:
        """The node behind this one, None at the end."""
        return None if self._next is self.graph._root else self._next

    @property
    def prev(self) -> Node | None:
        """The node in front of this one, None at the start."""
        return None if self._prev is self.graph._root else self._prev

    def set_args(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Replace the arguments, keeping use lists exact."""
        operands: list[Value] = []
        _collect(args, operands)
        _collect(dict(kwargs or {}), operands)
        for value in self.operands:
            value._users.pop(self, None)
        self.args = map_values(tuple(args), lambda v: v)
        self.kwargs = map_values(dict(kwargs or {}), lambda v: v)
        self.operands = tuple(operands)
        self.graph.version += 1
        for value in operands:
            value._users[self] = value._users.get(self, 0) + 1

    def replace_operand(self, old: Value, new: Value) -> None:
        """Read `new` wherever this node reads `old`."""

        def swap(value: Value) -> Value:
            return new if value is old else value

        self.set_args(map_values(self.args, swap), map_values(dict(self.kwargs), swap))

    def is_op(self, *names: str) -> bool:
        """Whether the operation's IR name is one of `names`."""
        return self.op.name in names

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the torch schema, however it was passed; schema defaults are filled in."""
        if name in self.kwargs:
            return self.kwargs[name]
        schema = self.op.schema
        if schema is None:
            return default
        for position, argument in enumerate(schema.arguments):
            if argument.name != name:
                continue
            if position < len(self.args) and not argument.kwarg_only:
                return self.args[position]
            return argument.default_value if argument.has_default_value() else default
        return default

    def with_arg(self, name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's (args, kwargs) with the schema argument `name` replaced."""
        schema = self.op.schema
        position = [a.name for a in schema.arguments].index(name) if schema is not None else len(self.args)
        if name in self.kwargs or position >= len(self.args):
            return self.args, {**self.kwargs, name: value}
        return (*self.args[:position], value, *self.args[position + 1 :]), dict(self.kwargs)

    def describe(self, context: int = 5) -> str:
        """This node with `context` lines of IR on each side and its source line, for error messages."""
        from autosp_ir.ir.text import describe_node  # the printer depends on this module

        return describe_node(self, context)

    def __repr__(self) -> str:
        return f"<{self.name} = {self.op.name}>"


_ORDER_STEP = 1 << 48


class Graph:
    """An ordered list of nodes; insertion and erasure are O(1), iteration survives mutation.

    Attributes:
        version: Grows with every mutation of nodes, their order, arguments and types.
    """

    def __init__(self) -> None:
        self.version = 0
        self._next_id = 0
        self._root = Node(self, op_by_name("output"), Phase.FORWARD, Origin(), {})
        self._names: dict[str, Value] = {}
        self._counters: dict[str, int] = {}
        self._length = 0
        self._index: dict[Node, int] | None = None
        self._by_id: dict[int, Node] | None = None
        self._output: Node | None = None

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    @property
    def next_id(self) -> int:
        """The id that the next node will get: every node made from now on has at least this one."""
        return self._next_id

    @property
    def nodes(self) -> Iterator[Node]:
        """Iterate in order; the current node may be erased and nodes may be inserted while iterating."""
        node = self._root._next
        while node is not self._root:
            yield node
            # An erased node keeps its link forward, so that iteration finds the next live node.
            node = node._next
            while node.erased:
                node = node._next

    def __len__(self) -> int:
        return self._length

    @property
    def inputs(self) -> list[Node]:
        """The placeholder nodes, in order."""
        return [n for n in self.nodes if n.op.kind == "placeholder"]

    @property
    def output_node(self) -> Node:
        """The `output` node.

        Raises:
            VerifyError: The graph has none yet.
        """
        if self._output is None:
            raise VerifyError("the graph has no output node", hint="create one with graph.create('output', (values,))")
        return self._output

    def value(self, name: str) -> Value:
        """The value called `name` (with or without `%`).

        Raises:
            VerifyError: There is no such value.
        """
        found = self._names.get(name.removeprefix("%"))
        if found is None:
            raise VerifyError(f"no value is called %{name}", hint="print the program to see its names")
        return found

    def node(self, id: int) -> Node | None:
        """The node with this id, or None when it was erased or never here; O(1) after the first call."""
        if self._by_id is None:
            self._by_id = {n.id: n for n in self.nodes}
        return self._by_id.get(id)

    def index(self) -> dict[Node, int]:
        """Position of every node; cached until the next mutation."""
        if self._index is None:
            self._index = {n: i for i, n in enumerate(self.nodes)}
        return self._index

    def ordered(self, nodes: Iterable[Node]) -> list[Node]:
        """The distinct `nodes` in program order, found without counting."""
        return sorted(set(nodes), key=lambda n: n._order)

    def unique_name(self, hint: str) -> str:
        """A name not taken in this graph, from `hint`."""
        base = re.sub(r"\W", "_", hint) or "v"
        base = f"_{base}" if base[0].isdigit() else base
        if base not in self._names:
            return base
        stem = re.sub(r"_\d+$", "", base)
        count = self._counters.get(stem, 0)
        while True:
            count += 1
            candidate = f"{stem}_{count}"
            if candidate not in self._names:
                self._counters[stem] = count
                return candidate

    def create(
        self,
        op: OpDef | str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        type: Type | None = None,
        before: Node | None = None,
        after: Node | None = None,
        phase: Phase = Phase.FORWARD,
        origin: Origin | None = None,
        meta: dict[str, Any] | None = None,
    ) -> Node:
        """Insert a node; by default in front of the output node, or at the end when there is none.

        Args:
            op: An `OpDef` or its IR name.
            args: Positional arguments.
            kwargs: Keyword arguments.
            name: Wanted name of the result; made unique.
            type: Result type; `ObjectType("untyped")` when unknown.
            before: Insert in front of this node.
            after: Insert behind this node.
            phase: Phase of the training step.
            origin: Where it comes from.
            meta: FX metadata.

        Returns:
            The new node.
        """
        definition = op_by_name(op) if isinstance(op, str) else op
        node = Node(self, definition, phase, origin or Origin(), dict(meta or {}))
        if definition.kind == "output":
            if self._output is not None:
                raise VerifyError(
                    "the graph has an output node already",
                    node=self._output,
                    hint="a program is built once; what it returns is changed with rewriter.set_outputs",
                )
            self._output = node
        else:
            unique = self.unique_name(name or definition.short_name)
            node.results.append(Value(unique, node, type if type is not None else ObjectType("untyped")))
            self._names[unique] = node.results[0]
        node.set_args(tuple(args), kwargs)
        self._link(node, self._anchor(before, after, node))
        self._length += 1
        if self._by_id is not None:
            self._by_id[node.id] = node
        return node

    def _anchor(self, before: Node | None, after: Node | None, node: Node) -> Node:
        """The node in front of which to link."""
        if before is not None:
            return before
        if after is not None:
            return after._next
        if self._output is not None and self._output is not node:
            return self._output
        return self._root

    def _link(self, node: Node, behind: Node) -> None:
        node._prev, node._next = behind._prev, behind
        behind._prev._next = node
        behind._prev = node
        self._index = None
        self.version += 1
        self._label(node)

    def _label(self, node: Node) -> None:
        """Give a linked node a number between its neighbours', so that order is known without counting."""
        first, last = node._prev is self._root, node._next is self._root
        if last:
            node._order = 0 if first else node._prev._order + _ORDER_STEP
            return
        gap = node._next._order - node._prev._order if not first else 2 * _ORDER_STEP
        if gap < 2:
            for position, other in enumerate(self.nodes):
                other._order = position * _ORDER_STEP
            return
        # Close behind the previous node: most insertions run forwards in front of one fixed node.
        node._order = node._next._order - _ORDER_STEP if first else node._prev._order + min(gap // 2, _ORDER_STEP >> 24)

    def _unlink(self, node: Node) -> None:
        node._prev._next, node._next._prev = node._next, node._prev
        self._index = None
        self.version += 1

    def erase(self, node: Node) -> None:
        """Remove a node that nothing reads.

        Raises:
            VerifyError: Its result is still used.
        """
        if node.results and node.result._users:
            readers = ", ".join(f"%{n.name}" for n in node.users[:5])
            raise VerifyError(f"%{node.name} cannot be erased: {readers} still read it", node=node)
        node.set_args(())
        self._unlink(node)
        node.erased = True
        self._length -= 1
        if self._by_id is not None:
            self._by_id.pop(node.id, None)
        if node is self._output:
            self._output = None
        for value in node.results:
            self._names.pop(value.name, None)

    def move(self, node: Node, *, before: Node | None = None, after: Node | None = None) -> None:
        """Move a node in front of or behind another."""
        anchor = before or after
        if anchor is node or anchor is None:
            return
        self._unlink(node)
        self._link(node, before if before is not None else anchor._next)

    def rename(self, value: Value, name: str) -> None:
        """Give a value another name, made unique."""
        self._names.pop(value.name, None)
        value.name = self.unique_name(name)
        self._names[value.name] = value

    def dead_code(self) -> int:
        """Erase nodes that nothing reads and that have no effect; returns how many.

        Placeholders and effects stay. A dead collective goes: it is dead on every rank.
        """
        erased = 0
        for node in reversed(list(self.nodes)):
            if node.op.kind in ("placeholder", "output") or node.result._users:
                continue
            if not node.op.traits & {Trait.PURE, Trait.COLLECTIVE} or node.op.has(Trait.MUTATES):
                continue
            self.erase(node)
            erased += 1
        return erased

    def clone(self) -> tuple[Graph, dict[Value, Value]]:
        """A copy with the same names, and the map from old values to new ones."""
        copy = Graph()
        mapping: dict[Value, Value] = {}

        def copied(value: Value) -> Value:
            if value in mapping:
                return mapping[value]
            raise VerifyError(
                f"%{value.name} is read before it is defined, or belongs to another graph",
                node=value.producer,
                hint="call program.verify() to find the reader",
            )

        for node in self.nodes:
            made = copy.create(
                node.op,
                map_values(node.args, copied),
                map_values(dict(node.kwargs), copied),
                name=node.name,
                type=node.results[0].type if node.results else None,
                phase=node.phase,
                origin=node.origin,
                meta=node.meta,
            )
            made.id = node.id
            if node.results:
                mapping[node.result] = made.result
        copy._next_id = self._next_id
        copy._counters = dict(self._counters)
        return copy, mapping

    def __repr__(self) -> str:
        return f"<Graph of {len(self)} nodes>"


__all__ = ["Graph", "Node", "Origin", "Phase", "Use", "Value", "map_values", "values_in"]
