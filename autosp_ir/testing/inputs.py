"""Random inputs for programs that nobody bound: parameters, and a batch whose ids are valid indices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import InputKind, Program
from autosp_ir.ir.types import Dim, ScalarType, TensorType

_LARGEST_DEFAULT_ID = 2
# Where an integer tensor indexes another one: the argument that holds the index, the one indexed, its dimension.
_INDEXED: dict[str, tuple[str, str, int | str]] = {
    "aten.embedding": ("indices", "weight", 0),
    "aten.index_select": ("index", "self", "dim"),
    "aten.gather": ("index", "self", "dim"),
    "aten.cross_entropy_loss": ("target", "self", 1),
    "aten.nll_loss": ("target", "self", 1),
    "aten.nll_loss_nd": ("target", "self", 1),
    "aten.nll_loss_forward": ("target", "self", 1),
}


@dataclass(frozen=True)
class RandomInputs:
    """Inputs for one program.

    Args:
        batch: User inputs by name.
        tensors: Parameters, buffers and constants that the program does not hold, by name.
        tangents: Gradients of the outputs that are not scalars, by output name.
    """

    batch: dict[str, Any]
    tensors: dict[str, Tensor]
    tangents: dict[str, Tensor]


def random_inputs(program: Program, *, length: int, seed: int = 0) -> RandomInputs:
    """Draw inputs of the types that a program's placeholders have.

    Args:
        program: The program in global shapes.
        length: What every symbol stands for.
        seed: The same seed gives the same inputs.

    Returns:
        Normal floats, ids below the smallest extent that they index, booleans of either kind.

    Raises:
        AutoSPError: A placeholder has no tensor type or an extent that is not determined by symbols.
    """
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for spec in program.signature.inputs:
        value = program.graph.value(spec.name)
        if spec.kind is InputKind.TANGENT or isinstance(value.type, ScalarType):
            continue
        if not isinstance(value.type, TensorType):
            raise AutoSPError(
                f"input {spec.target!r} is no tensor, so none can be drawn", hint="pass batch= to check_pass"
            )
        if spec.kind is InputKind.USER_INPUT:
            batch[spec.target] = _draw(value, length, generator)
        elif spec.target not in program.tensors:
            tensors[spec.target] = _draw(value, length, generator)
    return RandomInputs(batch, tensors, _tangents(program, length, generator))


def _tangents(program: Program, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    returned = program.graph.output_node.args[0]
    found: dict[str, Tensor] = {}
    for spec, value in zip(program.signature.outputs, returned, strict=True):
        kind = value.type if isinstance(value, Value) else None
        if isinstance(kind, TensorType) and kind.dtype.is_floating_point and kind.ndim:
            found[spec.target] = torch.randn(_shape(value, length), generator=generator, dtype=torch.float64)
    return found


def _draw(value: Value, length: int, generator: torch.Generator) -> Tensor:
    kind, shape = value.tensor_type, _shape(value, length)
    if kind.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if kind.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind.dtype)
    return torch.randint(0, _index_bound(value, length), shape, generator=generator).to(kind.dtype)


def _shape(value: Value, length: int) -> list[int]:
    return [_extent(d, length, value.producer) for d in value.tensor_type.shape]


def _extent(extent: Dim, length: int, node: Node) -> int:
    if isinstance(extent, int):
        return extent
    number = sympy.sympify(extent).subs(dict.fromkeys(extent.free_symbols, length))
    if not number.is_Integer:
        raise AutoSPError(f"the extent {extent} is no number", node=node, hint="pass batch= and tensors= instead")
    return int(number)


def _index_bound(ids: Value, length: int) -> int:
    """The smallest extent that values computed from `ids` index: padding and shifting keep ids ids."""
    bound: float = math.inf
    reached, stack = {ids}, [ids]
    while stack:
        value = stack.pop()
        for node in value.users:
            if node.op.name in _INDEXED:
                index, source, dim = _INDEXED[node.op.name]
                indexed = node.arg(source)
                if node.arg(index) is value and isinstance(indexed, Value):
                    position = dim if isinstance(dim, int) else int(node.arg(dim))
                    bound = min(bound, _extent(indexed.tensor_type.shape[position], length, node))
                    continue
            carries_ids = node.results and isinstance(node.result.type, TensorType)
            if carries_ids and not node.result.tensor_type.dtype.is_floating_point and node.result not in reached:
                reached.add(node.result)
                stack.append(node.result)
    return _LARGEST_DEFAULT_ID if bound is math.inf else max(1, int(bound))


__all__ = ["RandomInputs", "random_inputs"]
