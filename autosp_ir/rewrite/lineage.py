"""Where values come from, rewrite by rewrite, so that rules that undo each other are caught at once."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable
from typing import Any

from autosp_ir.ir.graph import Node, Value

_REMEMBERED = 64
"""Rewrites of one value, and rewrites in all, that are remembered: more rules do not take part in a quarrel."""

_DEPTH = 6
"""How deep made nodes are compared; what is below is told apart by node."""


class Lineages:
    """The history of values that rewrites made.

    A value has a key: its expression down to nodes that no rewrite made. When a value is replaced by one whose key it
    had before, or one that it replaced, the rewrites in between have led nowhere.
    """

    def __init__(self) -> None:
        self._made: set[Node] = set()
        self._before: dict[Node, tuple[tuple[Hashable, str], ...]] = {}
        self._recent: deque[str] = deque(maxlen=_REMEMBERED)

    def note_created(self, nodes: Iterable[Node]) -> None:
        """Note nodes that a rewrite made."""
        self._made.update(nodes)

    def key(self, value: Value, depth: int = _DEPTH) -> Hashable:
        """The expression of a value, equal for equal expressions over the same nodes of the original program."""
        node = value.producer
        if node not in self._made or depth == 0:
            return node.id
        return (node.op, self._frozen(node.args, depth), self._frozen(dict(node.kwargs), depth))

    def step(self, rule: str, before: Hashable, root: Node, new: Value | None, created: Collection[Node]) -> list[str]:
        """Note that a rule replaced a root, or changed it in place.

        Args:
            rule: The rule's name.
            before: The root's key before that.
            root: The root.
            new: What replaced it; None when it was changed in place.
            created: What the rewrite made.

        Returns:
            The rules that led from an earlier state of the value back to it; empty while it is new.
        """
        self._recent.append(rule)
        node = root if new is None else new.producer
        if new is None:
            self._made.add(root)
        history = (*self._before.get(root, ()), (before, rule))[-_REMEMBERED:]
        after = self.key(node.result)
        if node is root or node in created:
            self._before[node] = history
            earlier = [i for i, (key, _) in enumerate(history) if key == after]
        else:
            # Two equal values may well become one; a value that becomes what it was made from has come full circle.
            earlier = [i for i, (key, _) in enumerate(history[:-1]) if key == after]
        return [name for _, name in history[earlier[-1] :]] if earlier else []

    def recent(self) -> list[tuple[str, int]]:
        """The rules of the last rewrites, with how often, the most frequent first."""
        return Counter(self._recent).most_common(8)

    def _frozen(self, item: Any, depth: int) -> Hashable:
        if isinstance(item, Value):
            return ("%", self.key(item, depth - 1))
        if isinstance(item, tuple | list):
            return tuple([self._frozen(i, depth) for i in item])
        if isinstance(item, dict):
            return tuple([(k, self._frozen(v, depth)) for k, v in item.items()])
        # 1, True and 1.0 are equal as keys but not as arguments.
        return (type(item), repr(item))


__all__ = ["Lineages"]
