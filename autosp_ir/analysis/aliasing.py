"""Which results share storage with which operands, and how many bytes the others allocate.

Every operation is run on fake tensors that carry real strides, so that it is known, not guessed, whether a `reshape`
or a `contiguous` copies. Results are remembered by operation, operand shapes and strides: the layers of a model
repeat.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from autosp_ir._torch_compat import new_fake_mode
from autosp_ir.comm.host_memory import on_host
from autosp_ir.errors import AutoSPError, VerifyError
from autosp_ir.ir.graph import Node, Value, map_values
from autosp_ir.ir.infer import call_target
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.types import Dim, ScalarType, TensorType, TupleType, Type

WAIT = "_c10d_functional.wait_tensor"
_STARTS = "_c10d_functional."
_ALL_REDUCE = "_c10d_functional.all_reduce"
_RANKED = frozenset({Trait.COLLECTIVE, Trait.READS_RANK})


@dataclass(frozen=True)
class Storage:
    """One allocation.

    Args:
        id: Its number, in order of allocation.
        bytes: Its size.
        owned: False for parameters, buffers, inputs and constants, which belong to the caller.
        node: The node that allocates it.
        on_host: Whether it stands in host memory, where it takes nothing from the device.
    """

    id: int
    bytes: int
    owned: bool
    node: Node
    on_host: bool = False


@dataclass(frozen=True)
class Described:
    """A tensor as the fake run knows it; `held` is what a started collective reads until its wait."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storages: tuple[Storage, ...]
    held: tuple[Storage, ...] = ()


@dataclass(frozen=True)
class _Result:
    """One tensor result: its form, and either the operands it may alias or the bytes it allocates."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aliases: tuple[int, ...]
    allocation: int | None
    bytes: int


def passes_through(node: Node) -> bool:
    """Whether a layout operator gives what it is given: an identity, or any operator over one rank.

    They return copies when run one by one, but `lower-comm` erases them, so they are not part of a program's memory.
    """
    if not node.op.name.startswith("autosp.") or not node.operands:
        return False
    return node.op.has(Trait.IDENTITY) or (node.arg("size") == 1 and bool(node.op.traits & _RANKED))


def holds_operand(node: Node) -> bool:
    """Whether a started collective reads its operand until its wait; an all-reduce copies it first."""
    return node.op.has(Trait.COLLECTIVE) and node.op.name.startswith(_STARTS) and node.op.name != _ALL_REDUCE


class Aliasing:
    """Follows storages through a graph, one node at a time, in program order.

    Args:
        symbols: Numbers for the symbols of a dynamic program, by symbol name.
    """

    def __init__(self, symbols: Mapping[str, int] | None = None) -> None:
        self._symbols = dict(symbols or {})
        self._known: dict[Value, Any] = {}
        self._memo: dict[Any, Any] = {}
        self._mode = new_fake_mode()
        self._count = 0

    def storages(self, value: Value) -> tuple[Storage, ...]:
        """The storages that `value` keeps alive."""
        return tuple(s for t in _tensors(self._known[value]) for s in (*t.storages, *t.held))

    def step(self, node: Node) -> list[Storage]:
        """Follow one node; its operands must have been followed. Returns what it allocates.

        Raises:
            VerifyError: An extent is symbolic and has no number.
        """
        before = self._count
        self._known[node.result] = self._describe(node)
        return [s for s in dict.fromkeys(self.storages(node.result)) if s.id >= before]

    def _describe(self, node: Node) -> Any:
        if node.op.kind in ("placeholder", "get_attr"):
            return self._fresh(node, node.result.type, owned=False)
        if node.op.target is operator.getitem:
            found = self._known[node.args[0]]
            return found[node.args[1]] if isinstance(found, tuple) else found
        if passes_through(node):
            return self._known[node.operands[0]]
        if node.op.name == WAIT:
            return replace(self._known[node.operands[0]], held=())
        operands = [t for v in node.operands for t in _tensors(self._known[v])]
        if not operands:
            return self._fresh(node, node.result.type, owned=True)
        described = self._place(node, self._run(node, operands), operands, {})
        if holds_operand(node):
            return replace(described, held=tuple(s for o in operands for s in o.storages))
        return described

    def _fresh(self, node: Node, kind: Type, owned: bool) -> Any:
        """Contiguous storage for everything in a type."""
        if isinstance(kind, TupleType):
            return tuple(self._fresh(node, element, owned) for element in kind.elements)
        if not isinstance(kind, TensorType):
            return None
        shape = tuple(self._extent(d) for d in kind.shape)
        storage = self._allocate(node, math.prod(shape) * kind.dtype.itemsize, owned)
        return Described(shape, _contiguous(shape), kind.dtype, kind.device, (storage,))

    def _allocate(self, node: Node, size: int, owned: bool) -> Storage:
        self._count += 1
        return Storage(self._count - 1, size, owned, node, on_host(node))

    def _extent(self, extent: Dim) -> int:
        if isinstance(extent, int):
            return extent
        # By name: symbols of a shape environment carry assumptions, so that a plain symbol is not equal to them.
        value = extent.subs({s: self._symbols[s.name] for s in extent.free_symbols if s.name in self._symbols})
        if not value.is_Integer:
            raise VerifyError(
                f"memory depends on the extent {extent}, which has no number",
                hint="pass symbols={'s0': length, …} for the length to plan for",
            )
        return int(value)

    def _place(self, node: Node, result: Any, operands: list[Described], made: dict[int, Storage]) -> Any:
        if isinstance(result, tuple):
            return tuple(self._place(node, r, operands, made) for r in result)
        if result is None:
            return None
        storages = {s: None for i in result.aliases for s in operands[i].storages}
        if result.allocation is not None:
            if result.allocation not in made:
                made[result.allocation] = self._allocate(node, result.bytes, owned=True)
            storages[made[result.allocation]] = None
        return Described(result.shape, result.strides, result.dtype, result.device, tuple(storages))

    def _run(self, node: Node, operands: list[Described]) -> Any:
        def form(value: Value) -> Any:
            known = self._known[value]
            if isinstance(value.type, ScalarType):
                return self._scalar(value.type)
            return ("tensors", tuple((t.shape, t.strides, t.dtype, t.device) for t in _tensors(known)))

        key = (node.op.name, repr(map_values(node.args, form)), repr(map_values(dict(node.kwargs), form)))
        if key not in self._memo:
            self._memo[key] = self._run_on_fakes(node, operands)
        return self._memo[key]

    def _run_on_fakes(self, node: Node, operands: list[Described]) -> Any:
        fakes: list[Tensor] = []

        def fake(known: Any) -> Any:
            if isinstance(known, tuple):
                return tuple(fake(k) for k in known)
            if known is None:
                return None
            fakes.append(torch.empty_strided(known.shape, known.strides, dtype=known.dtype, device=known.device))
            return fakes[-1]

        def argument(value: Value) -> Any:
            return self._scalar(value.type) if isinstance(value.type, ScalarType) else fake(self._known[value])

        try:
            with self._mode, torch.no_grad():
                results = _call(node, map_values(node.args, argument), dict(map_values(dict(node.kwargs), argument)))
        except AutoSPError:
            raise
        except Exception:  # an operation without a fake kernel for static shapes: fall back to its declared types
            return self._declared(node, operands)
        return _results(results, fakes, {})

    def _scalar(self, kind: ScalarType) -> Any:
        if kind.kind == "int" and isinstance(kind.expr, sympy.Expr):
            return self._extent(kind.expr)
        return {"int": 1, "float": 1.0, "bool": True}[kind.kind]

    def _declared(self, node: Node, operands: list[Described]) -> Any:
        """Conservative: what may be a view both keeps its operands alive and allocates."""
        pure_math = node.op.has(Trait.PURE) and not node.op.has(Trait.VIEW)
        aliases = () if pure_math and node.op.schema is not None else tuple(range(len(operands)))
        counter = iter(range(10**6))

        def declared(kind: Type) -> Any:
            if isinstance(kind, TupleType):
                return tuple(declared(e) for e in kind.elements)
            if not isinstance(kind, TensorType):
                return None
            shape = tuple(self._extent(d) for d in kind.shape)
            size = math.prod(shape) * kind.dtype.itemsize
            return _Result(shape, _contiguous(shape), kind.dtype, kind.device, aliases, next(counter), size)

        return declared(node.result.type)


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the node; a view whose operator must copy says by `evaluate` what it is a view of."""
    if node.op.has(Trait.VIEW) and node.op.evaluate is not None:
        return node.op.evaluate(*args, **kwargs)
    return call_target(node, args, kwargs)


def _results(made: Any, fakes: list[Tensor], numbers: dict[int, int]) -> Any:
    if isinstance(made, tuple | list):
        return tuple(_results(m, fakes, numbers) for m in made)
    if not isinstance(made, Tensor):
        return None
    storage = made.untyped_storage()
    aliases = tuple(i for i, f in enumerate(fakes) if f.untyped_storage() is storage)
    # The storage object outlives this call only if it is the same allocation as an earlier result.
    allocation = None if aliases else numbers.setdefault(id(storage), len(numbers))
    return _Result(
        tuple(made.shape), tuple(made.stride()), made.dtype, made.device, aliases, allocation, storage.nbytes()
    )


def _tensors(known: Any) -> Iterator[Described]:
    if isinstance(known, Described):
        yield known
    elif isinstance(known, tuple):
        for item in known:
            yield from _tensors(item)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * max(extent, 1))
    return tuple(reversed(strides)) if shape else ()
