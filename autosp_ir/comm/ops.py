"""The layout operators: `torch.ops.autosp.*`.

Each operator changes how a tensor is spread over one mesh axis, and its backward is again such operators, so a
joint trace shows the backward collectives. The logical axis name and its size are arguments: tracing needs no
process group. At run time `comm.groups` finds the group; an axis of size 1 needs none.

| operator | layouts | backward |
|---|---|---|
| `invariant_to_replicate(x)` | I -> R | `all_reduce` |
| `shard(x, dim)` | I -> S(dim) | `all_gather(to="invariant")` |
| `all_gather(x, dim, to="invariant")` | S(dim) -> I | `shard` |
| `all_gather(x, dim, to="replicate")` | S(dim) -> R | `reduce_scatter` |
| `reduce_scatter(x, dim)` | P -> S(dim) | `all_gather(to="replicate")` |
| `all_reduce(x)` | P -> I | `invariant_to_replicate` |
| `all_to_all(x, split_dim, concat_dim)` | S(concat_dim) -> S(split_dim) | `all_to_all`, dimensions swapped |
| `permute(x, perm)` | rank r sends to rank `perm[r]` | `permute` by the inverse |
| `axis_index()` | the rank's index on the axis, int64, 0-d, on the CPU | none |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autosp_ir._torch_compat import all_gather_single, reduce_scatter_single
from autosp_ir.comm.groups import group_of
from autosp_ir.errors import LayoutError

SCHEMAS = (
    "invariant_to_replicate(Tensor x, str axis, int size) -> Tensor",
    "shard(Tensor x, int dim, str axis, int size) -> Tensor",
    'all_gather(Tensor x, int dim, str axis, int size, str to="invariant") -> Tensor',
    "reduce_scatter(Tensor x, int dim, str axis, int size) -> Tensor",
    "all_reduce(Tensor x, str axis, int size) -> Tensor",
    "all_to_all(Tensor x, int split_dim, int concat_dim, str axis, int size) -> Tensor",
    "permute(Tensor x, int[] perm, str axis, int size) -> Tensor",
    "axis_index(str axis, int size) -> Tensor",
)

LIBRARY = torch.library.Library("autosp", "DEF")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_GATHER_TARGETS = ("invariant", "replicate")


def _dimension(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise LayoutError(
            f"dimension {dim} is out of range for a tensor of {x.ndim} dimension(s)",
            hint="name a dimension that the tensor has",
        )
    return dim % x.ndim


def _share(x: Tensor, dim: int, size: int) -> int:
    """The local extent of `dim` after splitting it over `size` ranks."""
    extent = x.shape[dim]
    if isinstance(extent, int) and extent % size:
        raise LayoutError(
            f"dimension {dim} of length {extent} cannot be split evenly over {size} ranks",
            hint="pad the tokens to a multiple of the axis (pad-tokens), or use an axis size that divides the length",
        )
    return extent // size


def _check_target(to: str) -> None:
    if to not in _GATHER_TARGETS:
        raise LayoutError(f"all_gather cannot end in {to!r}", hint=f"use one of {_GATHER_TARGETS}")


def _check_permutation(perm: Sequence[int], size: int) -> None:
    if sorted(perm) != list(range(size)):
        raise LayoutError(
            f"{list(perm)} is not a permutation of {size} ranks",
            hint="name every rank exactly once: rank r sends to perm[r]",
        )


def _all_to_all_dims(x: Tensor, split_dim: int, concat_dim: int) -> tuple[int, int]:
    split, concat = _dimension(x, split_dim), _dimension(x, concat_dim)
    if split == concat:
        raise LayoutError(
            f"all_to_all splits and concatenates the same dimension {split}",
            hint="move the shard between two different dimensions, or use permute",
        )
    return split, concat


def inverse_permutation(perm: Sequence[int]) -> list[int]:
    """The permutation that undoes `perm`."""
    return sorted(range(len(perm)), key=perm.__getitem__)


# Shapes, for tracing -------------------------------------------------------------------------------------------------


def _clone_shape(x: Tensor, axis: str, size: int) -> Tensor:
    return x.clone()


def _shard_shape(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    dim = _dimension(x, dim)
    return x.new_empty([*x.shape[:dim], _share(x, dim, size), *x.shape[dim + 1 :]])


def _all_gather_shape(x: Tensor, dim: int, axis: str, size: int, to: str = "invariant") -> Tensor:
    _check_target(to)
    dim = _dimension(x, dim)
    return x.new_empty([*x.shape[:dim], x.shape[dim] * size, *x.shape[dim + 1 :]])


def _all_reduce_shape(x: Tensor, axis: str, size: int) -> Tensor:
    return x.new_empty(x.shape)


def _all_to_all_shape(x: Tensor, split_dim: int, concat_dim: int, axis: str, size: int) -> Tensor:
    split, concat = _all_to_all_dims(x, split_dim, concat_dim)
    shape = list(x.shape)
    shape[split] = _share(x, split, size)
    shape[concat] = shape[concat] * size
    return x.new_empty(shape)


def _permute_shape(x: Tensor, perm: Sequence[int], axis: str, size: int) -> Tensor:
    _check_permutation(perm, size)
    return x.new_empty(x.shape)


def _axis_index_shape(axis: str, size: int) -> Tensor:
    return torch.empty((), dtype=torch.int64)


# Execution over torch.distributed ------------------------------------------------------------------------------------


def _fresh(x: Tensor) -> Tensor:
    """A contiguous copy: a custom operator may not return its input."""
    return x.clone(memory_format=torch.contiguous_format)


def _rank_first(x: Tensor, dim: int, size: int) -> Tensor:
    """[…, size * n, …] as a contiguous [size, …, n, …]: one block per destination rank."""
    blocks: Tensor = x.unflatten(dim, (size, x.shape[dim] // size))
    return blocks.movedim(dim, 0).contiguous()


def _rank_into(blocks: Tensor, dim: int) -> Tensor:
    """The inverse of `_rank_first`: [size, …, n, …] as a contiguous […, size * n, …]."""
    return blocks.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _exchange(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send block r of a contiguous [size, …] to rank r; block r of the result came from rank r."""
    received = blocks.new_empty(blocks.shape)
    dist.all_to_all_single(received, blocks, group=group)
    return received


def _invariant_to_replicate(x: Tensor, axis: str, size: int) -> Tensor:
    return x.clone()


def _shard(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    dim = _dimension(x, dim)
    share = _share(x, dim, size)
    group = group_of(axis, size)
    rank = 0 if group is None else dist.get_rank(group)
    return _fresh(x.narrow(dim, rank * share, share))


def _all_gather(x: Tensor, dim: int, axis: str, size: int, to: str = "invariant") -> Tensor:
    _check_target(to)
    dim = _dimension(x, dim)
    group = group_of(axis, size)
    if group is None:
        return _fresh(x)
    gathered = x.new_empty([size * x.shape[0], *x.shape[1:]])
    all_gather_single(gathered, x.contiguous(), group)
    return _rank_into(gathered.view(size, *x.shape), dim)


def _reduce_scatter(x: Tensor, dim: int, axis: str, size: int) -> Tensor:
    dim = _dimension(x, dim)
    _share(x, dim, size)
    group = group_of(axis, size)
    if group is None:
        return _fresh(x)
    blocks = _rank_first(x, dim, size)
    if x.is_cpu:
        # Not every gloo has reduce-scatter; an exchange and a local sum move the same bytes in a fixed order.
        return _exchange(blocks, group).sum(0, dtype=x.dtype)
    result = blocks.new_empty(blocks.shape[1:])
    reduce_scatter_single(result, blocks.flatten(0, 1), group)
    return result


def _all_reduce(x: Tensor, axis: str, size: int) -> Tensor:
    group = group_of(axis, size)
    result = _fresh(x)
    if group is not None:
        dist.all_reduce(result, group=group)
    return result


def _all_to_all(x: Tensor, split_dim: int, concat_dim: int, axis: str, size: int) -> Tensor:
    split, concat = _all_to_all_dims(x, split_dim, concat_dim)
    _share(x, split, size)
    group = group_of(axis, size)
    if group is None:
        return _fresh(x)
    return _rank_into(_exchange(_rank_first(x, split, size), group), concat)


def _permute(x: Tensor, perm: Sequence[int], axis: str, size: int) -> Tensor:
    _check_permutation(perm, size)
    group = group_of(axis, size)
    if group is None:
        return _fresh(x)
    rank = dist.get_rank(group)
    source = inverse_permutation(perm)[rank]
    received = x.new_empty(x.shape)
    dist.all_to_all_single(
        received.view(-1),
        x.reshape(-1),
        output_split_sizes=[x.numel() if peer == source else 0 for peer in range(size)],
        input_split_sizes=[x.numel() if peer == perm[rank] else 0 for peer in range(size)],
        group=group,
    )
    return received


def _axis_index(axis: str, size: int) -> Tensor:
    group = group_of(axis, size)
    return torch.tensor(0 if group is None else dist.get_rank(group))


# Backward ------------------------------------------------------------------------------------------------------------


def _invariant_to_replicate_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    _, axis, size = ctx.inputs
    return torch.ops.autosp.all_reduce(grad, axis, size), None, None


def _shard_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    _, dim, axis, size = ctx.inputs
    return torch.ops.autosp.all_gather(grad, dim, axis, size, "invariant"), None, None, None


def _all_gather_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    _, dim, axis, size, to = ctx.inputs
    transpose = torch.ops.autosp.shard if to == "invariant" else torch.ops.autosp.reduce_scatter
    return transpose(grad, dim, axis, size), None, None, None, None


def _reduce_scatter_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    _, dim, axis, size = ctx.inputs
    return torch.ops.autosp.all_gather(grad, dim, axis, size, "replicate"), None, None, None


def _all_reduce_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    _, axis, size = ctx.inputs
    return torch.ops.autosp.invariant_to_replicate(grad, axis, size), None, None


def _all_to_all_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    _, split_dim, concat_dim, axis, size = ctx.inputs
    return torch.ops.autosp.all_to_all(grad, concat_dim, split_dim, axis, size), None, None, None, None


def _permute_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    _, perm, axis, size = ctx.inputs
    return torch.ops.autosp.permute(grad, inverse_permutation(perm), axis, size), None, None, None


def _keep_attributes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The tensor is not kept: these operators are linear and their backwards need its attributes only.
    ctx.inputs = (None, *inputs[1:])


def _register(
    name: str,
    shape: Callable[..., Tensor],
    execute: Callable[..., Tensor],
    gradient: Callable[..., Any] | None,
) -> None:
    torch.library.register_fake(f"autosp::{name}", shape, lib=LIBRARY)
    LIBRARY.impl(name, execute, "CompositeExplicitAutograd")
    if gradient is not None:
        torch.library.register_autograd(f"autosp::{name}", gradient, setup_context=_keep_attributes, lib=LIBRARY)


_register("invariant_to_replicate", _clone_shape, _invariant_to_replicate, _invariant_to_replicate_grad)
_register("shard", _shard_shape, _shard, _shard_grad)
_register("all_gather", _all_gather_shape, _all_gather, _all_gather_grad)
_register("reduce_scatter", _shard_shape, _reduce_scatter, _reduce_scatter_grad)
_register("all_reduce", _all_reduce_shape, _all_reduce, _all_reduce_grad)
_register("all_to_all", _all_to_all_shape, _all_to_all, _all_to_all_grad)
_register("permute", _permute_shape, _permute, _permute_grad)
_register("axis_index", _axis_index_shape, _axis_index, None)
