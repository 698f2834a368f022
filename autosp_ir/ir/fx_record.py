"""What FX knows of a node and the IR does not: kept beside the node so that export undoes import exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RECORD_KEY = "autosp.fx"
"""The key of the `FxRecord` in `Node.meta`; export takes it out again."""


@dataclass(frozen=True)
class FxRecord:
    """Facts of an imported FX node.

    Args:
        name: The FX name of an `output` node; other nodes are called like their value.
        target: The target of a placeholder called otherwise (`*args`, a name that was taken).
        annotation: The FX node's type annotation.
        has_val: Whether its meta held `"val"`; a node made by a pass gets one at export.
        calling: Of an output node: the calling convention (FX code generator) of the graph.
        arity: Of an output node: how many placeholders and output leaves that convention was written for.
    """

    name: str | None = None
    target: str | None = None
    annotation: Any = None
    has_val: bool = True
    calling: Any = None
    arity: tuple[int, int] = (0, 0)


_DEFAULT = FxRecord()


def record_of(meta: Mapping[str, Any]) -> FxRecord:
    """The record kept in a node's meta; the default one for nodes that were not imported."""
    found = meta.get(RECORD_KEY)
    return found if isinstance(found, FxRecord) else _DEFAULT


def with_record(meta: Mapping[str, Any], record: FxRecord) -> dict[str, Any]:
    """A copy of `meta` that carries `record`, unless it says nothing."""
    return dict(meta) if record == _DEFAULT else {**meta, RECORD_KEY: record}


def without_record(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `meta` as FX had it."""
    return {k: v for k, v in meta.items() if k != RECORD_KEY}
