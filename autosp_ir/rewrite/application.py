"""Applying a rule where it matches: one rewrite, checked before it takes effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from autosp_ir.ir.graph import Node, Value, values_in
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.printer import format_type
from autosp_ir.ir.types import TupleType
from autosp_ir.ir.verify_types import same_type
from autosp_ir.rewrite.layouts import layouts_of
from autosp_ir.rewrite.operations import Operations
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_ir.rewrite.rules import Match, Rule


class Results:
    """An operation with several results, in a replacement: `[i]` and unpacking read them."""

    def __init__(self, value: Value, rewriter: Rewriter) -> None:
        self.value = value
        self._rewriter = rewriter
        self._read: dict[int, Value] = {}

    def __getitem__(self, index: int) -> Value:
        if index not in range(len(self)):
            raise IndexError(f"%{self.value.name} has {len(self)} results")
        if index not in self._read:
            self._read[index] = self._rewriter.create("operator.getitem", (self.value, index))
        return self._read[index]

    def __len__(self) -> int:
        return len(self.value.type.elements) if isinstance(self.value.type, TupleType) else 0

    def __iter__(self) -> Iterator[Value]:
        return (self[i] for i in range(len(self)))


def apply_rule(rule: Rule, match: Match, rewriter: Rewriter) -> tuple[Value | None, ...]:
    """Replace what a rule matched, as one rewrite of the rule's name.

    The replacement goes in front of the match's anchor, and behind a root that it reads; it takes origin and phase from
    the anchor. Types and layouts are
    inferred; what is replaced and what replaces it must have the same. Matched nodes that nothing reads any more are
    erased, and what only they read.

    Args:
        rule: The rule.
        match: Where it matches.
        rewriter: Of the program.

    Returns:
        What replaced each root; None for a root that was changed in place.

    Raises:
        RuleError: The replacement does not fit; the nodes that it made are gone. UnsupportedError from the rule.
    """
    graph = rewriter.graph
    first_new, version = graph.next_id, graph.version
    with rewriter.rewrite(rule.name):
        try:
            made = _made(rule, match, rewriter)
            if graph.version == version and all(new is None for new in made):
                raise rule.error("its replacement changed nothing", "return what replaces the root", match.root)
            for root, new in zip(match.roots, made, strict=True):
                _check(rule, root, new, rewriter)
        except Exception:
            _discard(rewriter, first_new)
            raise
        for root, new in zip(match.roots, made, strict=True):
            if new is not None:
                rewriter.replace(root, new)
        erase_dead(rewriter, match.nodes)
    return made


def erase_dead(rewriter: Rewriter, nodes: Iterable[Node]) -> None:
    """Erase those of `nodes` that nothing reads and that have no effect, then what only they read."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.erased or not node.results or node.users or node.op.kind == "placeholder":
            continue
        if not node.op.traits & {Trait.PURE, Trait.COLLECTIVE} or node.op.has(Trait.MUTATES):
            continue
        pending.extend(dict.fromkeys(value.producer for value in node.operands))
        rewriter.erase(node)


def _made(rule: Rule, match: Match, rewriter: Rewriter) -> tuple[Value | None, ...]:
    """Call the replacement."""
    if rule.builder is None:
        raise rule.error("it has no replacement", "decorate one with .replacement")

    point = rewriter.before(match.anchor)

    def create(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tuple(item.value if isinstance(item, Results) else item for item in args)
        read = [value.producer for value in values_in((given, kwargs)) if value.producer in match.roots]
        if read:
            # What wraps a root goes behind it.
            point.last = rewriter.graph.ordered([*read, point.last or match.anchor])[-1]
        value = rewriter.create(name, given, kwargs)
        return Results(value, rewriter) if isinstance(value.type, TupleType) else value

    scope = {**match.bindings, "op": Operations(create), "match": match, "rewriter": rewriter}
    with point:
        returned = rule.call("its replacement", rule.builder, rule.builder_parameters, scope)
    single = len(match.roots) == 1
    made = (returned,) if single or returned is None else returned
    if returned is None:
        made = (None,) * len(match.roots)
    wanted = "a value" if single else f"{len(match.roots)} values"
    if not isinstance(made, tuple) or len(made) != len(match.roots):
        raise rule.error(f"its replacement returned {returned!r}, not {wanted}", "return one per root", match.root)
    values = tuple(new.value if isinstance(new, Results) else new for new in made)
    for value in values:
        if value is not None and not isinstance(value, Value):
            raise rule.error(f"its replacement returned {value!r}, not {wanted}", "make it with op", match.root)
    return values


def _check(rule: Rule, root: Node, new: Value | None, rewriter: Rewriter) -> None:
    """Refuse a replacement of another type or layout."""
    before = root.result.type
    if new is None:
        rewriter.reinfer([root])
    after = root.result.type if new is None else new.type
    if new is not None and new.producer.graph is not root.graph:
        raise rule.error(f"%{new.name} belongs to another program", "use the variables of the match", root)
    if new is not None and not _defined_in_time(root, new):
        raise rule.error(
            f"what replaces %{root.name} is %{new.name}, which comes too late for its readers",
            "ask for roots in program order: where(…)(lambda match: match.in_order)",
            root,
        )
    if same_type(before, after, rewriter.program.fake_mode.shape_env) and layouts_of(before) == layouts_of(after):
        return
    raise rule.error(
        f"%{root.name} is {format_type(before)}, but what replaces it is {format_type(after)}",
        "ask for the types and layouts that it relies on with having() or where()",
        root,
    )


def _defined_in_time(root: Node, new: Value) -> bool:
    """Whether a value is there before anything reads the root, except on the way to the value itself."""
    ordered = root.graph.ordered([new.producer, root])
    if ordered[0] is new.producer or not root.users:
        return True
    late = [user for user in root.users if root.graph.ordered([user, new.producer])[0] is user]
    return all(_leads_to(user, new.producer) for user in late if user is not new.producer)


def _leads_to(node: Node, target: Node) -> bool:
    """Whether `target` is computed from `node`."""
    pending, seen = [target], set()
    while pending:
        current = pending.pop()
        if current is node:
            return True
        if current not in seen and node.graph.ordered([node, current])[0] is node:
            seen.add(current)
            pending.extend(value.producer for value in current.operands)
    return False


def _discard(rewriter: Rewriter, first_new: int) -> None:
    """Erase the nodes made since."""
    made = [node for node in rewriter.graph.nodes if node.id >= first_new]
    for node in reversed(made):
        if not node.users:
            rewriter.erase(node)


__all__ = ["Results", "apply_rule", "erase_dead"]
