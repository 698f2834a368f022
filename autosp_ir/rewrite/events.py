"""What a rewrite did, for whoever records it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from autosp_ir.ir.graph import Node

_THIS_PACKAGE = str(Path(__file__).parent)


@dataclass(frozen=True)
class RewriteEvent:
    """One rewrite: what a rule removed, created and changed, by node id.

    Args:
        pass_name: The pass that rewrote.
        rule: `file:line` of the code that asked for it, or the name it gave.
        removed: Ids of erased nodes.
        created: Ids of new nodes that are still in the graph.
        changed: Ids of nodes that stayed but read other operands, have another type or moved.
        ms: Milliseconds from its first mutation to its last.
        moved: Those of `changed` that stand elsewhere in the program.
    """

    pass_name: str
    rule: str
    removed: tuple[int, ...]
    created: tuple[int, ...]
    changed: tuple[int, ...]
    ms: float
    moved: tuple[int, ...] = ()


Listener = Callable[[RewriteEvent], None]


def caller_location() -> str:
    """`file:line` of the nearest caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_THIS_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass
class EventLog:
    """Gathers mutations into events.

    One event is an outermost `with` and the replacements and erasures that follow it, until something new is created;
    a replacement for which nothing was created is an event of its own.

    Args:
        pass_name: The pass that rewrites.
        listeners: Called with each finished event.
    """

    pass_name: str
    listeners: Sequence[Listener] = ()
    _rule: str | None = None
    _depth: int = 0
    _settled: bool = False
    _start: float = 0.0
    _created: dict[Node, None] = field(default_factory=dict)
    _changed: dict[Node, None] = field(default_factory=dict)
    _removed: dict[int, None] = field(default_factory=dict)
    _moved: dict[int, None] = field(default_factory=dict)

    def created(self, node: Node) -> None:
        """Note a new node."""
        if self._settled and self._depth == 0:
            self.flush()
        self._begin()
        self._created[node] = None

    def changed(self, node: Node) -> None:
        """Note a node that reads other operands, has another type or moved."""
        self._begin()
        if node not in self._created:
            self._changed[node] = None

    def moved(self, node: Node) -> None:
        """Note a node that stands elsewhere; it counts as changed."""
        self.changed(node)
        if node in self._changed:
            self._moved[node.id] = None

    def removed(self, node: Node) -> None:
        """Note an erased node."""
        self._begin()
        self._changed.pop(node, None)
        self._moved.pop(node.id, None)
        # A node that came and went within one rewrite was never there.
        if node in self._created:
            del self._created[node]
        else:
            self._removed[node.id] = None

    def settle(self) -> None:
        """Mark the end of a mutation: the event closes now, or with the next creation if it created something."""
        if self._depth > 0:
            return
        if self._created:
            self._settled = True
        else:
            self.flush()

    def flush(self) -> None:
        """Hand the gathered mutations to the listeners as one event."""
        if self._created or self._changed or self._removed:
            event = RewriteEvent(
                self.pass_name,
                self._rule or "",
                tuple(self._removed),
                tuple(n.id for n in self._created),
                tuple(n.id for n in self._changed),
                (time.perf_counter() - self._start) * 1e3,
                tuple(self._moved),
            )
            for listener in self.listeners:
                listener(event)
        self._created, self._changed, self._removed, self._moved = {}, {}, {}, {}
        self._rule = None
        self._settled = False

    def open(self, rule: str | None = None) -> None:
        """Enter a rewrite; everything until the matching `close` is one event."""
        if self._depth == 0:
            self.flush()
            self._rule = rule
        self._depth += 1
        self._begin()

    def close(self) -> None:
        """Leave a rewrite."""
        self._depth -= 1
        self.settle()

    def _begin(self) -> None:
        if not self.listeners:
            return
        if self._rule is None:
            self._rule = caller_location()
        if not (self._created or self._changed or self._removed):
            self._start = time.perf_counter()


class RewriteScope:
    """`with rewriter.rewrite("fold-repeat-kv"):` makes one event of everything inside."""

    def __init__(self, log: EventLog, rule: str | None) -> None:
        self._log = log
        self._rule = rule

    def __enter__(self) -> None:
        self._log.open(self._rule)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
