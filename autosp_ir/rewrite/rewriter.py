"""The rewriter: every mutation that a pass makes goes through it.

It infers the types and layouts of what it creates, carries the user's source line and the chain of passes over to
replacements, and tells listeners what each rewrite removed, created and changed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor

from autosp_ir.comm.layout import GradientFlow
from autosp_ir.errors import TerminationError, VerifyError
from autosp_ir.ir.graph import Graph, Node, Origin, Phase, Value, map_values
from autosp_ir.ir.ops import OpDef
from autosp_ir.ir.program import InputKind, InputSpec, OutputSpec, Program
from autosp_ir.ir.types import Layout, Placement, TupleType, Type
from autosp_ir.rewrite.events import EventLog, Listener, RewriteScope, caller_location
from autosp_ir.rewrite.layouts import infer_typed, layouts_of
from autosp_ir.rewrite.limit import RewriteLimit

_TYPED_BY_HAND = ("placeholder", "get_attr", "output")
_LEAST_CHANGES, _CHANGES_PER_NODE = 100_000, 100


class InsertionPoint:
    """`with rewriter.before(node):` puts what is created inside in front of `node`; one such block is one rewrite."""

    def __init__(self, rewriter: Rewriter, anchor: Node, behind: bool) -> None:
        self._rewriter = rewriter
        self.anchor = anchor
        self.last = anchor if behind else None

    def __enter__(self) -> Rewriter:
        self._rewriter._points.append(self)
        self._rewriter._log.open()
        return self._rewriter

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rewriter._points.remove(self)
        self._rewriter._log.close()

    def place(self) -> dict[str, Node]:
        """Where the next node goes.

        Raises:
            VerifyError: The node that the point stands at was erased.
        """
        at = self.last or self.anchor
        if at.erased:
            raise VerifyError(
                f"the insertion point stands at %{at.op.name}, which was erased",
                hint="create everything before replacing or erasing the node that before() or after() was given",
            )
        return {"before": at} if self.last is None else {"after": at}

    def created(self, node: Node) -> None:
        """Let the next node follow this one."""
        if self.last is not None:
            self.last = node


class Rewriter:
    """Rewrites one program in place.

    Args:
        program: The program to rewrite.
        pass_name: Appended to the origin of what is created or changed; None leaves origins alone.
        listeners: Called with a `RewriteEvent` after each rewrite.
        limit: Says which sites may be rewritten; None allows all.
    """

    def __init__(
        self,
        program: Program,
        pass_name: str | None = None,
        listeners: Sequence[Listener] = (),
        limit: RewriteLimit | None = None,
    ) -> None:
        self.program = program
        self.pass_name = pass_name
        self._log = EventLog(pass_name or "", listeners)
        self._limit = limit
        self._points: list[InsertionPoint] = []
        self._created: set[Node] = set()
        self._changes_left = max(_LEAST_CHANGES, _CHANGES_PER_NODE * len(program.graph))

    @property
    def graph(self) -> Graph:
        """The program's graph."""
        return self.program.graph

    def before(self, node: Node) -> InsertionPoint:
        """Create in front of `node` inside this `with`; origin and phase come from it."""
        return InsertionPoint(self, node, behind=False)

    def after(self, node: Node) -> InsertionPoint:
        """Create behind `node`, in order, inside this `with`; origin and phase come from it."""
        return InsertionPoint(self, node, behind=True)

    def rewrite(self, rule: str | None = None) -> RewriteScope:
        """Record everything inside this `with` as one rewrite, by `rule` or by the caller's file and line."""
        return RewriteScope(self._log, rule)

    def allows(self, node: Node, rule: str | None = None, *, location: str | None = None) -> bool:
        """Whether a pass may rewrite this site; always, except while a wrong rewrite is being looked for.

        A pass that has sites asks once for each, when it is certain to rewrite it and before the first mutation. On
        False it leaves the site as it is, wholly, and goes on: the program must be valid and compute the same with
        any of its sites left alone. A pass for which that does not hold does not ask.

        Args:
            node: The site.
            rule: The name of the rewrite; the caller's file and line when None.
            location: Where the rewrite is written down, when not at the caller.
        """
        if self._limit is None:
            return True
        return self._limit.allows(node, self.pass_name or "", rule, location or caller_location())

    def create(
        self,
        op: OpDef | str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        type: Type | None = None,
        layout: Layout | Mapping[str, Placement] | None = None,
        name: str | None = None,
        phase: Phase | None = None,
        origin_from: Node | None = None,
        meta: dict[str, Any] | None = None,
    ) -> Value:
        """Insert a node at the insertion point (the end of the graph outside any) and return its value.

        Args:
            op: An `OpDef` or its IR name.
            args: Positional arguments; Values and plain attributes.
            kwargs: Keyword arguments, likewise.
            type: The whole type with its layout; inferred when None.
            layout: The layout of every tensor in an inferred type; inferred when None.
            name: Wanted name.
            phase: Phase; the anchor's when None.
            origin_from: Whose source line, module and passes to inherit; the anchor when None.
            meta: FX metadata to export.

        Returns:
            The new node's value; of `TupleType` for several results, see `unpack`.

        Raises:
            VerifyError: The operation rejects these operands. LayoutError when its layout does not follow.
            TerminationError: There have been far more changes than a program of this size needs.
        """
        self._spend()
        point = self._points[-1] if self._points else None
        inherit = origin_from or (point.anchor if point is not None else None)
        node = self.graph.create(
            op,
            args,
            kwargs,
            name=name,
            type=type,
            **(point.place() if point is not None else {}),
            phase=phase or (inherit.phase if inherit is not None else Phase.FORWARD),
            origin=self._origin(inherit.origin if inherit is not None else Origin()),
            meta=meta,
        )
        if type is None and node.op.kind not in _TYPED_BY_HAND:
            self._type_or_erase(node, layout)
        if point is not None:
            point.created(node)
        self._created.add(node)
        self._log.created(node)
        return node.result

    def unpack(self, value: Value, count: int | None = None) -> tuple[Value, ...]:
        """Read the first `count` elements (all when None) of a multi-result value through `operator.getitem`.

        Raises:
            VerifyError: The value is not of `TupleType`.
        """
        if not isinstance(value.type, TupleType):
            raise VerifyError(f"%{value.name} has one result and cannot be unpacked", node=value.producer)
        elements = value.type.elements[:count]
        if self._points:
            return tuple(self.create("operator.getitem", (value, i)) for i in range(len(elements)))
        with self.after(value.producer):
            return tuple(self.create("operator.getitem", (value, i)) for i in range(len(elements)))

    def clone_node(
        self,
        node: Node,
        *,
        before: Node | None = None,
        after: Node | None = None,
        mapping: Mapping[Value, Value] | None = None,
        phase: Phase | None = None,
    ) -> Value:
        """Copy a node, by default to the insertion point.

        Args:
            node: The node to copy; it must define a value.
            before: Insert in front of this node.
            after: Insert behind this node.
            mapping: Operands to read instead; the type is inferred again when one of them has another type.
            phase: Another phase for the copy.

        Returns:
            The copy's value.
        """
        if before is not None or after is not None:
            with self.before(before) if before is not None else self.after(after or node):
                return self.clone_node(node, mapping=mapping, phase=phase)
        swap = mapping or {}
        retyped = any(v in swap and swap[v].type != v.type for v in node.operands)
        keep_type = None if retyped and node.op.kind not in _TYPED_BY_HAND else node.result.type
        return self.create(
            node.op,
            map_values(node.args, lambda v: swap.get(v, v)),
            map_values(dict(node.kwargs), lambda v: swap.get(v, v)),
            type=keep_type,
            name=node.name,
            phase=phase or node.phase,
            origin_from=node,
            meta=node.meta,
        )

    def replace(self, old: Node | Value, new: Value, *, keep: tuple[Node, ...] = ()) -> None:
        """Make every reader of `old` read `new`, then erase `old` if nothing reads it any more.

        Nodes of this rewriter that `new` is computed from keep reading `old`, so that wrapping a value is
        `replace(x, f(x))`. Types of readers are not touched: call `reinfer` when `new` has another type.

        Args:
            old: The node or value to replace.
            new: What to read instead; it inherits nothing, since `create` gave it its origin.
            keep: Further readers that keep reading `old`.
        """
        value = old if isinstance(old, Value) else old.result
        if value is new:
            return
        keep = (*keep, *self._wrapping(value, new))
        for reader in value.users:
            if reader not in keep:
                reader.replace_operand(value, new)
                self._touch(reader)
        if not value.uses and value.producer.op.kind != "placeholder":
            self._erase(value.producer)
        self._log.settle()

    def erase(self, node: Node) -> None:
        """Erase a node that nothing reads.

        Raises:
            VerifyError: Its value is still read.
        """
        self._erase(node)
        self._log.settle()

    def dead_code(self) -> int:
        """Erase what nothing reads and what has no effect; returns how many nodes went."""
        nodes = list(self.graph.nodes)
        erased = self.graph.dead_code()
        for node in nodes:
            if node.erased:
                self._log.removed(node)
        self._log.settle()
        return erased

    def set_args(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Give a node other arguments; call `reinfer` when its type may change."""
        self._spend()
        node.set_args(args, kwargs)
        self._touch(node)
        self._log.settle()

    def set_arg(self, node: Node, name: str, value: Any) -> None:
        """Replace one argument by its name in the torch schema."""
        self.set_args(node, *node.with_arg(name, value))

    def set_type(self, value: Value, type: Type) -> None:
        """Give a value another type, layout included; call `reinfer` on its readers."""
        if value.type == type:
            return
        value.type = type
        self._touch(value.producer)
        self._log.settle()

    def set_phase(self, node: Node, phase: Phase) -> None:
        """Move a node to another phase of the training step."""
        node.phase = phase
        self._touch(node)
        self._log.settle()

    def move(self, node: Node, *, before: Node | None = None, after: Node | None = None) -> None:
        """Move a node in front of or behind another."""
        self.graph.move(node, before=before, after=after)
        self._touch(node)
        self._log.moved(node)
        self._log.settle()

    def reinfer(self, nodes: Iterable[Node]) -> None:
        """Infer types and layouts of `nodes` again, and of everything downstream whose operands changed.

        Placeholders, get_attr nodes and the output keep the types they have. Where several layouts hold, the stored
        one decides only while the layouts of all operands stay what they were.

        Raises:
            VerifyError: An operation rejects its new operands. LayoutError when a layout does not follow.
        """
        order = self.graph.index()
        flow = GradientFlow(self.program)
        queue = [(order[n], n.id, n) for n in nodes]
        moved = {n for _, _, n in queue}
        heapq.heapify(queue)
        done: set[Node] = set()
        while queue:
            _, _, node = heapq.heappop(queue)
            if node in done or node.op.kind in _TYPED_BY_HAND:
                continue
            done.add(node)
            stored = node.result.type
            inferred = infer_typed(node, self.program, hint=None if node in moved else stored, flow=flow)
            if inferred == stored:
                continue
            self._touch(node)
            for reader in node.users:
                heapq.heappush(queue, (order[reader], reader.id, reader))
                if layouts_of(inferred) != layouts_of(stored):
                    moved.add(reader)
        self._log.settle()

    def add_input(
        self, kind: InputKind, target: str, type: Type, *, tensor: Tensor | None = None, requires_grad: bool = False
    ) -> Value:
        """Add a placeholder behind the others, with its signature entry.

        Args:
            kind: What it stands for.
            target: Name of the parameter, buffer, constant or user input.
            type: Its type.
            tensor: What to bind (parameters, buffers, constants).
            requires_grad: Whether a gradient is wanted.

        Returns:
            The placeholder's value.
        """
        inputs = self.graph.inputs
        first = next(iter(self.graph.nodes), None)
        node = self.graph.create(
            "placeholder",
            name=target,
            type=type,
            after=inputs[-1] if inputs else None,
            before=None if inputs else first,
            origin=self._origin(Origin()),
        )
        self.program.signature.inputs.append(InputSpec(node.name, kind, target, requires_grad))
        if tensor is not None:
            self.program.tensors[target] = tensor
        self._created.add(node)
        self._log.created(node)
        return node.result

    def set_outputs(self, outputs: Sequence[tuple[OutputSpec, Value]]) -> None:
        """Return other values, with their signature entries."""
        self.program.signature.outputs = [spec for spec, _ in outputs]
        self.set_args(self.graph.output_node, (tuple(value for _, value in outputs),))

    def finish(self) -> None:
        """Close the last event; the pass manager calls it when a pass is done."""
        self._log.flush()

    def _spend(self) -> None:
        """Stop a pass that would go on rewriting for ever."""
        self._changes_left -= 1
        if self._changes_left < 0:
            raise TerminationError(
                f"more changes than {_CHANGES_PER_NODE} for each node of the program that the pass was given",
                hint="the pass visits what it makes: walk a list of the nodes that were there before it began",
                pass_name=self.pass_name,
            )

    def _origin(self, origin: Origin) -> Origin:
        return origin.touched_by(self.pass_name) if self.pass_name else origin

    def _touch(self, node: Node) -> None:
        node.origin = self._origin(node.origin)
        self._log.changed(node)

    def _erase(self, node: Node) -> None:
        self.graph.erase(node)
        self._log.removed(node)

    def _type_or_erase(self, node: Node, layout: Layout | Mapping[str, Placement] | None) -> None:
        wanted = Layout(layout) if layout is not None else None
        try:
            infer_typed(node, self.program, layout=wanted, flow=GradientFlow(self.program))
        except Exception:
            self.graph.erase(node)
            raise

    def _wrapping(self, value: Value, new: Value) -> list[Node]:
        """Readers of `value` among the nodes created here that `new` is computed from."""
        candidates = {n for n in value.users if n in self._created}
        found: list[Node] = []
        seen: set[Node] = set()
        stack = [new.producer] if candidates else []
        while stack:
            node = stack.pop()
            if node in seen or node not in self._created:
                continue
            seen.add(node)
            if node in candidates:
                found.append(node)
            stack.extend(v.producer for v in node.operands if v is not value)
        return found


__all__ = ["InsertionPoint", "Rewriter"]
