"""Result types: every operation's own fake kernel says what it returns, so nothing about shapes is guessed.

Inference runs on contiguous fake tensors made from operand types. Strides are not part of the types: a `view` that
real strides forbid is emitted as `reshape`, which has the same value.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import sympy
import torch

from autosp_ir._torch_compat import (
    FakeTensorMode,
    HigherOrderOperator,
    exact_autocast,
    without_fake_tensor_log,
    without_specializing,
)
from autosp_ir.errors import AutoSPError, VerifyError
from autosp_ir.ir.graph import Node, Value, map_values
from autosp_ir.ir.ops import overload_names
from autosp_ir.ir.types import Dim, NoneType, ScalarType, TensorType, TupleType, Type, type_of, without_layout

# Types without symbols are the same under every mode; the others last as long as the mode that owns their symbols.
_memo: dict[Any, Type] = {}
_memo_of_mode: weakref.WeakKeyDictionary[FakeTensorMode, dict[Any, Type]] = weakref.WeakKeyDictionary()
_SHAPE_ARGUMENTS = {"aten.view": "aten.reshape", "aten._unsafe_view": "aten.reshape"}


def infer_type(node: Node, fake_mode: FakeTensorMode) -> Type:
    """The type a node's operation returns for its operands' types, layouts left Invariant.

    Args:
        node: A node whose operands have types.
        fake_mode: The mode to make fake tensors in; it owns the symbols of a dynamic capture.

    Returns:
        The inferred type; the stored one for placeholders, get_attr and higher-order operators.

    Raises:
        VerifyError: The operation rejects these operands; the message carries torch's own reason.
    """
    if node.op.kind in ("placeholder", "get_attr", "call_module"):
        return without_layout(node.result.type)
    if node.op.kind == "output":
        return NoneType()
    if node.op.infer is not None:
        try:
            return without_layout(node.op.infer(node))
        except AutoSPError as error:
            # An operation knows what is wrong with its operands, but not where it stands.
            error.context = error.context or node.describe()
            raise
    if isinstance(node.op.target, HigherOrderOperator):
        return without_layout(node.result.type)
    key = _memo_key(node)
    own = _memo_of_mode.setdefault(fake_mode, {})
    found = _memo.get(key) or own.get(key)
    if found is not None:
        return found
    inferred = _run_on_fakes(node, fake_mode)
    if key is not None:
        symbolic = _has_symbols(inferred) or any(_has_symbols(v.type) for v in node.operands)
        (own if symbolic else _memo)[key] = inferred
    return inferred


def _has_symbols(kind: Type) -> bool:
    if isinstance(kind, TensorType):
        return not all(isinstance(extent, int) for extent in kind.shape)
    if isinstance(kind, ScalarType):
        return kind.expr is not None and bool(kind.expr.free_symbols)
    return isinstance(kind, TupleType) and any(_has_symbols(e) for e in kind.elements)


def _run_on_fakes(node: Node, fake_mode: FakeTensorMode) -> Type:
    def fake(value: Value) -> Any:
        return fake_of(value.type, fake_mode)

    try:
        symbolic = any(_has_symbols(v.type) for v in node.operands)
        quietly = without_specializing(fake_mode.shape_env) if symbolic else contextlib.nullcontext()
        with fake_mode, torch.no_grad(), exact_autocast(), without_fake_tensor_log(), quietly:
            args = map_values(node.args, fake)
            kwargs = map_values(dict(node.kwargs), fake)
            return type_of(call_target(node, args, dict(kwargs)))
    except AutoSPError:
        raise
    except Exception as error:  # any torch failure becomes a named error at this node
        from autosp_ir.ir.printer import format_type  # the printer imports Program

        types = ", ".join(f"%{v.name}: {format_type(v.type)}" for v in node.operands)
        reason = str(error).partition("\n")[0]  # torch appends its own Python stack
        raise VerifyError(
            f"{node.op.name} rejects its operands ({types}): {type(error).__name__}: {reason}",
            node=node,
            hint=_advice(node, reason),
        ) from error


def _advice(node: Node, reason: str) -> str:
    """What to do about torch's reason: take another overload where the arguments do not fit this one's schema."""
    schema = node.op.schema
    if schema is not None and reason.startswith(f"{schema.name}()"):
        others = [name for name in overload_names(*schema.name.split("::", 1), tensors=True) if name != node.op.name]
        if others:
            return f"give it the arguments of its schema, or use another overload: {', '.join(others)}"
        return f"give it the arguments of its schema: {schema}"
    return "check the shapes, dtypes and attributes that this node was given"


def call_target(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a node's target on concrete operands, views as reshapes."""
    if node.op.kind == "call_method":
        return getattr(args[0], node.op.target)(*args[1:], **kwargs)
    if node.op.name in _SHAPE_ARGUMENTS:
        return torch.ops.aten.reshape.default(*args, **kwargs)
    return node.op.target(*args, **kwargs)


def fake_of(kind: Type, fake_mode: FakeTensorMode) -> Any:
    """A fake tensor, SymInt or number of a type; must run under `fake_mode`."""
    if isinstance(kind, TensorType):
        shape = [_extent(d, fake_mode) for d in kind.shape]
        return torch.empty(shape, dtype=kind.dtype, device=kind.device)
    if isinstance(kind, ScalarType):
        return _scalar(kind, fake_mode)
    if isinstance(kind, TupleType):
        return tuple(fake_of(e, fake_mode) for e in kind.elements)
    if isinstance(kind, NoneType):
        return None
    raise VerifyError(f"no fake value can be made of {kind}", hint="give the node a type when it is created")


def _extent(extent: Dim, fake_mode: FakeTensorMode) -> Any:
    if isinstance(extent, int):
        return extent
    if fake_mode.shape_env is None:
        raise VerifyError(f"the extent {extent} is symbolic but the program has no symbols")
    return fake_mode.shape_env.create_symintnode(extent, hint=None)


def _scalar(kind: ScalarType, fake_mode: FakeTensorMode) -> Any:
    if kind.kind == "int" and isinstance(kind.expr, sympy.Expr):
        return int(kind.expr) if kind.expr.is_Integer else _extent(kind.expr, fake_mode)
    return {"int": 1, "float": 1.0, "bool": True}[kind.kind]


def _memo_key(node: Node) -> Any:
    def frozen(item: Any) -> Any:
        if isinstance(item, Value):
            return ("%", without_layout(item.type))
        if isinstance(item, tuple | list):
            return tuple(frozen(i) for i in item)
        if isinstance(item, dict):
            return tuple((k, frozen(v)) for k, v in item.items())
        if isinstance(item, slice):
            return ("slice", frozen(item.start), frozen(item.stop), frozen(item.step))
        # 1, True and 1.0 are equal as keys but not as arguments.
        return (type(item), item)

    key = (node.op.name, node.op.target, frozen(node.args), frozen(dict(node.kwargs)))
    try:
        hash(key)
    except TypeError:
        return None
    return key
