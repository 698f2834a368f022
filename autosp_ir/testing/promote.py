"""Programs in float64 throughout: the casts that a model makes inside are promoted too.

transformers computes norms, rotary tables, softmax and the loss in float32 whatever the model's dtype, so that two
orders of summation differ by 1e-7 although both are right. One rewrite turns every floating dtype of a program into
float64: types of inputs, bound tensors, dtype attributes, and what creation operations and integer arithmetic make
by default. It does not depend on shapes or layouts: a promoted program is as partitioned as it was before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir._torch_compat import HigherOrderOperator, pytree_map
from autosp_ir.comm.chunk_loop import NAMES as LOOPS
from autosp_ir.errors import UnsupportedError, VerifyError
from autosp_ir.ir.graph import Graph, Node, Value, map_values
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.text import parse
from autosp_ir.ir.types import Layout, ObjectType, TensorType, Type, map_tensors, tensors_of

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_REREADS_BITS = frozenset({"aten.view.dtype"})
_EPSILON_OF_DTYPE = ("aten.rms_norm", "aten._fused_rms_norm")


def promote(program: Program) -> Program:
    """A copy of a program of any stage that computes in float64 throughout.

    Args:
        program: The program; it is not changed. Its bound tensors are copied.

    Returns:
        The copy. Feed it a batch from `promote_batch`.

    Raises:
        UnsupportedError: An operation depends on how a narrower dtype is stored.
    """
    promoted = program.clone()
    promoted.tensors = {name: widened(tensor) for name, tensor in program.tensors.items()}
    promoted.attrs = {name: _widened_attribute(held) for name, held in promoted.attrs.items()}
    for graph in (promoted.graph, *(held for held in promoted.attrs.values() if isinstance(held, Graph))):
        for node in graph.nodes:
            _promote_node(node, promoted)
    return promoted


def promote_batch(batch: Any) -> Any:
    """A batch with its floating tensors in float64; containers, ids and flags stay what they are."""
    return pytree_map(lambda leaf: widened(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float64 (complex128), detached; integers and booleans are returned as they are."""
    wide = _WIDE.get(tensor.dtype)
    return tensor if wide is None else tensor.detach().to(wide).requires_grad_(tensor.requires_grad)


def floating_dtypes(program: Program) -> set[torch.dtype]:
    """Every floating dtype that a value of the program has."""
    kinds = (kind for node in program.graph.nodes for value in node.results for kind in tensors_of(value.type))
    return {kind.dtype for kind in kinds if kind.dtype.is_floating_point}


def _widened_attribute(held: Any) -> Any:
    if isinstance(held, Tensor):
        return widened(held)
    return copy.deepcopy(held).double() if isinstance(held, nn.Module) else held


def _promote_node(node: Node, program: Program) -> None:
    if node.op.kind == "output":
        return
    if node.op.name in _REREADS_BITS:
        raise UnsupportedError(
            f"{node.op.name} reads the bits of a tensor as another dtype, which has no float64 counterpart",
            node=node,
            hint="test this model in its own precision",
        )
    if node.is_op(*_EPSILON_OF_DTYPE):
        node.set_args(*node.with_arg("eps", _epsilon(node)))
    if node.is_op(*LOOPS):
        node.set_args(*node.with_arg("body", _promoted_text(node.arg("body"))))
    _set_arguments(node, lambda leaf: _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf)
    if node.arg("half_to_float"):
        node.set_args(*node.with_arg("half_to_float", False))
    if node.op.kind in ("placeholder", "get_attr", "call_module"):
        node.result.type = map_tensors(node.result.type, _wide_type)
        return
    inferred = _inferred(node, program)
    if _narrow(inferred):
        _widen_default(node)
        inferred = _inferred(node, program)
    if _narrow(inferred):
        raise UnsupportedError(
            f"{node.op.name} gives a result narrower than float64 and has no dtype to set",
            node=node,
            hint="test this model in its own precision",
        )
    layouts = (kind.layout for kind in list(tensors_of(node.result.type)))
    node.result.type = map_tensors(inferred, lambda kind: kind.with_layout(next(layouts, Layout())))


def _epsilon(node: Node) -> float:
    """The epsilon that the kernel of a norm adds in the dtype in which it computes: float32 for half types."""
    computed = torch.promote_types(next(tensors_of(node.result.type)).dtype, torch.float32)
    given = node.arg("eps")
    return torch.finfo(computed).eps if given is None else float(torch.tensor(given, dtype=computed))


@lru_cache(maxsize=64)
def _promoted_text(body: str) -> str:
    """The body of a loop over chunks, in float64."""
    return str(promote(parse(body)))


def _inferred(node: Node, program: Program) -> Type:
    opaque = isinstance(node.op.target, HigherOrderOperator) or any(
        isinstance(v.type, ObjectType) for v in node.operands
    )
    if opaque:
        return map_tensors(node.result.type, _wide_type)
    try:
        return program.infer(node)
    except VerifyError as error:
        raise UnsupportedError(
            f"{node.op.name} does not run in float64: {error.reason}",
            node=node,
            hint="test this model in its own precision",
        ) from error


def _widen_default(node: Node) -> None:
    """State the dtype of an operation that takes torch's default one: creation, or arithmetic on integers."""
    schema = node.op.schema
    if schema is not None and any(a.name == "dtype" for a in schema.arguments):
        node.set_args(*node.with_arg("dtype", torch.float64))
        return
    if not node.op.has(Trait.POINTWISE):
        return
    swap = {v: _cast(v, node) for v in node.operands if isinstance(v.type, TensorType)}
    node.set_args(
        map_values(node.args, lambda v: swap.get(v, v)), map_values(dict(node.kwargs), lambda v: swap.get(v, v))
    )


def _cast(value: Value, reader: Node) -> Value:
    cast = reader.graph.create(
        "aten._to_copy",
        (value,),
        {"dtype": torch.float64},
        type=map_tensors(value.type, lambda kind: _with_dtype(kind, torch.float64)),
        before=reader,
        phase=reader.phase,
        origin=reader.origin,
    )
    return cast.result


def _set_arguments(node: Node, leaf: Callable[[Any], Any]) -> None:
    args, kwargs = _map_leaves(node.args, leaf), _map_leaves(dict(node.kwargs), leaf)
    node.set_args(args, kwargs)


def _map_leaves(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(structure, tuple | list):
        return type(structure)([_map_leaves(item, leaf) for item in structure])
    if isinstance(structure, dict):
        return {key: _map_leaves(item, leaf) for key, item in structure.items()}
    return leaf(structure)


def _narrow(kind: Type) -> bool:
    return any(t.dtype in _WIDE for t in tensors_of(kind))


def _wide_type(kind: TensorType) -> TensorType:
    return _with_dtype(kind, _WIDE.get(kind.dtype, kind.dtype))


def _with_dtype(kind: TensorType, dtype: torch.dtype) -> TensorType:
    return TensorType(kind.shape, dtype, kind.device, kind.layout)


__all__ = ["floating_dtypes", "promote", "promote_batch", "widened"]
