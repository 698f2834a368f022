"""Types of IR values: local shapes, dtypes, and where each value lives on the mesh.

The layout vocabulary is that of torch's SPMD types and of JAX's varying/invariant distinction: a layout fixes the
layout of the value's gradient, so that a missing reduction is a type error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch

Dim: TypeAlias = "int | sympy.Expr"
"""An extent: a number, or an expression over the symbols of a dynamic capture."""


@dataclass(frozen=True)
class Placement:
    """Where a value lives along one mesh axis."""


@dataclass(frozen=True)
class Invariant(Placement):
    """The same on every rank and used the same on every rank; its gradient is Invariant."""

    def __str__(self) -> str:
        return "I"


@dataclass(frozen=True)
class Replicate(Placement):
    """The same on every rank but used in rank-dependent work; its gradient is Partial."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Shard(Placement):
    """Each rank holds its contiguous slice of dimension `dim`.

    Args:
        dim: The dimension cut.
        outer: Elements in front of the shard inside that dimension: `[B*S, V]` cut along S is `Shard(0, outer=B)`.
    """

    dim: int
    outer: Dim = 1

    def __str__(self) -> str:
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim}, {self.outer})"


@dataclass(frozen=True)
class Partial(Placement):
    """The value is the sum over ranks; its gradient is Replicate."""

    reduce_op: str = "sum"

    def __str__(self) -> str:
        return "P" if self.reduce_op == "sum" else f"P({self.reduce_op})"


INVARIANT = Invariant()
REPLICATE = Replicate()
PARTIAL = Partial()


class Layout(Mapping[str, Placement]):
    """A frozen map from mesh axis to `Placement`; an axis that is not named is Invariant."""

    __slots__ = ("_hash", "_items")

    def __init__(self, placements: Mapping[str, Placement] | None = None) -> None:
        kept = {a: p for a, p in (placements or {}).items() if not isinstance(p, Invariant)}
        self._items: dict[str, Placement] = dict(sorted(kept.items()))
        self._hash = hash(tuple(self._items.items()))

    def __getitem__(self, axis: str) -> Placement:
        return self._items.get(axis, INVARIANT)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._items == other._items

    def __repr__(self) -> str:
        return f"Layout({self})"

    def __str__(self) -> str:
        return "{" + ", ".join(f"{a}: {p}" for a, p in self._items.items()) + "}"

    def with_axis(self, axis: str, placement: Placement) -> Layout:
        """Return this layout with one axis replaced."""
        return Layout({**self._items, axis: placement})


@dataclass(frozen=True)
class TensorType:
    """A tensor's local shape, dtype, device and layout."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    layout: Layout = Layout()

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        """Number of local elements."""
        total: Dim = 1
        for extent in self.shape:
            total = total * extent
        return total

    def with_layout(self, layout: Layout) -> TensorType:
        """Return this type with another layout."""
        return TensorType(self.shape, self.dtype, self.device, layout)

    def on_axis(self, axis: str, placement: Placement) -> TensorType:
        """Return this type with one axis of its layout replaced."""
        return self.with_layout(self.layout.with_axis(axis, placement))


@dataclass(frozen=True)
class ScalarType:
    """A Python number: a size of a dynamic dimension, or arithmetic on one. `expr` is None for a plain number."""

    kind: str
    expr: sympy.Expr | None = None


@dataclass(frozen=True)
class TupleType:
    """The result of an operation with several results, read by `operator.getitem`."""

    elements: tuple[Type, ...]


@dataclass(frozen=True)
class NoneType:
    """A result that is None, such as the gradient of an input that needs none."""


@dataclass(frozen=True)
class ObjectType:
    """A value the IR only passes along: a nested graph, a string, a module's output of unknown kind."""

    name: str


Type: TypeAlias = TensorType | ScalarType | TupleType | NoneType | ObjectType
"""The type of an IR value."""


def dim_of(extent: Any) -> Dim:
    """Convert an `int`, `torch.SymInt` or sympy expression to a `Dim`."""
    if isinstance(extent, torch.SymInt):
        expr: sympy.Expr = extent.node.expr
        return int(expr) if expr.is_Integer else expr
    if isinstance(extent, sympy.Expr):
        return int(extent) if extent.is_Integer else extent
    return int(extent)


def type_of(value: Any) -> Type:
    """The IR type of an FX `meta["val"]`: tensors (fake or real), SymInts, numbers, tuples, None."""
    if isinstance(value, torch.Tensor):
        return TensorType(tuple(dim_of(s) for s in value.shape), value.dtype, value.device)
    if value is None:
        return NoneType()
    if isinstance(value, bool | torch.SymBool):
        return ScalarType("bool", value.node.expr if isinstance(value, torch.SymBool) else None)
    if isinstance(value, int | torch.SymInt):
        return ScalarType("int", value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value))
    if isinstance(value, float | torch.SymFloat):
        return ScalarType("float", value.node.expr if isinstance(value, torch.SymFloat) else None)
    if isinstance(value, tuple | list):
        return TupleType(tuple(type_of(v) for v in value))
    return ObjectType(type(value).__name__)


def tensors_of(kind: Type) -> Iterator[TensorType]:
    """The tensor types in a type, those in nested tuples included."""
    if isinstance(kind, TensorType):
        yield kind
    elif isinstance(kind, TupleType):
        for element in kind.elements:
            yield from tensors_of(element)


def map_tensors(kind: Type, fn: Any) -> Type:
    """Apply `fn` to every `TensorType` inside a type."""
    if isinstance(kind, TensorType):
        mapped: Type = fn(kind)
        return mapped
    if isinstance(kind, TupleType):
        return TupleType(tuple(map_tensors(e, fn) for e in kind.elements))
    return kind


def without_layout(kind: Type) -> Type:
    """The same type with every layout Invariant."""
    return map_tensors(kind, lambda t: t.with_layout(Layout()))
