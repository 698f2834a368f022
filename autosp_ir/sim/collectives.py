"""Collectives as pure functions over the list of all ranks' tensors.

`COLLECTIVES[op_name](tensors, **attributes)` takes one tensor per rank of the axis, in rank order, and gives one
result per rank. It covers the `autosp::` operators and the `_c10d_functional` ones that they are lowered to. No
process group is involved, every function is differentiable, and sums run in rank order, so results are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from autosp_ir.errors import SimulationError

Collective = Callable[..., list[Tensor]]


def _check(tensors: Sequence[Tensor], size: int | None, *, same_shape: bool = True) -> None:
    if size is not None and len(tensors) != size:
        raise SimulationError(
            f"a collective of {size} rank(s) was run on {len(tensors)}",
            hint="simulate the program on the mesh that it was partitioned for",
        )
    first = tensors[0]
    if any(x.dtype != first.dtype for x in tensors) or (same_shape and any(x.shape != first.shape for x in tensors)):
        described = ", ".join(f"{x.dtype}{list(x.shape)}" for x in tensors)
        raise SimulationError(
            f"the ranks of one collective pass different tensors: {described}",
            hint="every rank must reach a collective with the same shape and dtype",
        )


def _blocks(x: Tensor, dim: int, size: int) -> tuple[Tensor, ...]:
    if x.shape[dim] % size:
        raise SimulationError(
            f"dimension {dim} of length {x.shape[dim]} cannot be split evenly over {size} ranks",
            hint="pad the tokens to a multiple of the axis (pad-tokens)",
        )
    return x.tensor_split(size, dim)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


# The layout operators ------------------------------------------------------------------------------------------------


def invariant_to_replicate(tensors: Sequence[Tensor], *, axis: str, size: int) -> list[Tensor]:
    """Copy each rank's tensor."""
    _check(tensors, size)
    return [x.clone() for x in tensors]


def shard(tensors: Sequence[Tensor], *, dim: int, axis: str, size: int) -> list[Tensor]:
    """Keep rank r's r-th contiguous slice of `dim`."""
    _check(tensors, size)
    return [_blocks(x, dim, size)[rank].clone() for rank, x in enumerate(tensors)]


def all_gather(tensors: Sequence[Tensor], *, dim: int, axis: str, size: int, to: str = "invariant") -> list[Tensor]:
    """Concatenate all ranks' tensors along `dim`, on every rank."""
    _check(tensors, size)
    return [torch.cat(list(tensors), dim) for _ in tensors]


def reduce_scatter(tensors: Sequence[Tensor], *, dim: int, axis: str, size: int) -> list[Tensor]:
    """Sum over the ranks; rank r keeps the r-th contiguous slice of `dim`."""
    _check(tensors, size)
    return [x.clone() for x in _blocks(_sum(tensors), dim, size)]


def all_reduce(tensors: Sequence[Tensor], *, axis: str, size: int) -> list[Tensor]:
    """Sum over the ranks, on every rank."""
    _check(tensors, size)
    return [_sum(tensors).clone() for _ in tensors]


def all_to_all(tensors: Sequence[Tensor], *, split_dim: int, concat_dim: int, axis: str, size: int) -> list[Tensor]:
    """Send block r of `split_dim` to rank r; concatenate what arrives along `concat_dim`, in rank order."""
    _check(tensors, size)
    sent = [_blocks(x, split_dim, size) for x in tensors]
    return [torch.cat([blocks[rank] for blocks in sent], concat_dim) for rank in range(size)]


def permute(tensors: Sequence[Tensor], *, perm: Sequence[int], axis: str, size: int) -> list[Tensor]:
    """Send rank r's tensor to rank `perm[r]`."""
    _check(tensors, size)
    if sorted(perm) != list(range(size)):
        raise SimulationError(f"{list(perm)} is not a permutation of {size} ranks", hint="name every rank exactly once")
    return [tensors[list(perm).index(rank)].clone() for rank in range(size)]


def axis_index(tensors: Sequence[Tensor], *, axis: str, size: int) -> list[Tensor]:
    """Each rank's index on the axis; takes no tensors."""
    return [torch.tensor(rank) for rank in range(size)]


# What they are lowered to --------------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "avg": torch.add,
}


def _reduced(tensors: Sequence[Tensor], reduce_op: str) -> Tensor:
    if reduce_op not in _REDUCTIONS:
        raise SimulationError(f"reduction {reduce_op!r} is not known", hint=f"use one of {sorted(_REDUCTIONS)}")
    total = reduce(_REDUCTIONS[reduce_op], tensors)
    return (total / len(tensors)).to(total.dtype) if reduce_op == "avg" else total


def c10d_all_reduce(tensors: Sequence[Tensor], *, reduce_op: str, group_name: object) -> list[Tensor]:
    """Reduce over the ranks, on every rank."""
    _check(tensors, None)
    return [_reduced(tensors, reduce_op).clone() for _ in tensors]


def c10d_all_gather_into_tensor(tensors: Sequence[Tensor], *, group_size: int, group_name: object) -> list[Tensor]:
    """Concatenate all ranks' tensors along dimension 0, on every rank."""
    _check(tensors, group_size)
    return [torch.cat(list(tensors), 0) for _ in tensors]


def c10d_reduce_scatter_tensor(
    tensors: Sequence[Tensor], *, reduce_op: str, group_size: int, group_name: object
) -> list[Tensor]:
    """Reduce over the ranks; rank r keeps the r-th contiguous slice of dimension 0."""
    _check(tensors, group_size)
    return [x.clone() for x in _blocks(_reduced(tensors, reduce_op), 0, group_size)]


def c10d_all_to_all_single(
    tensors: Sequence[Tensor],
    *,
    output_split_sizes: Sequence[int] | Sequence[Sequence[int]],
    input_split_sizes: Sequence[int] | Sequence[Sequence[int]],
    group_name: object,
) -> list[Tensor]:
    """Exchange blocks of dimension 0: rank r receives block r of every rank, in rank order.

    Args:
        tensors: One tensor per rank.
        output_split_sizes: Rows received from each rank; one list for all ranks, or one list per rank.
        input_split_sizes: Rows sent to each rank; likewise.
        group_name: Ignored.
    """
    size = len(tensors)
    _check(tensors, None, same_shape=False)
    sent = []
    for rank, x in enumerate(tensors):
        splits = _splits(input_split_sizes, rank)
        if len(splits) != size or sum(splits) != x.shape[0]:
            raise SimulationError(
                f"rank {rank} sends {x.shape[0]} row(s) to {size} rank(s) in blocks of {splits}",
                hint="give one block size per rank; together they must cover dimension 0",
            )
        sent.append(x.split(splits, 0))
    results = []
    for rank in range(size):
        received = [blocks[rank] for blocks in sent]
        expected, actual = _splits(output_split_sizes, rank), [block.shape[0] for block in received]
        if actual != expected:
            raise SimulationError(
                f"rank {rank} expects blocks of {expected} row(s) but is sent {actual}",
                hint="the output sizes of a rank must equal what the other ranks send to it",
            )
        results.append(torch.cat(received, 0))
    return results


def _splits(sizes: Sequence[int] | Sequence[Sequence[int]], rank: int) -> list[int]:
    own = sizes[rank] if sizes and isinstance(sizes[0], Sequence) else sizes
    return [int(extent) for extent in cast(Sequence[int], own)]


def wait_tensor(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each rank's tensor itself: nothing is asynchronous here."""
    return list(tensors)


COLLECTIVES: dict[str, Collective] = {
    "autosp.invariant_to_replicate": invariant_to_replicate,
    "autosp.shard": shard,
    "autosp.all_gather": all_gather,
    "autosp.reduce_scatter": reduce_scatter,
    "autosp.all_reduce": all_reduce,
    "autosp.all_to_all": all_to_all,
    "autosp.permute": permute,
    "autosp.axis_index": axis_index,
    "_c10d_functional.all_reduce": c10d_all_reduce,
    "_c10d_functional.all_gather_into_tensor": c10d_all_gather_into_tensor,
    "_c10d_functional.reduce_scatter_tensor": c10d_reduce_scatter_tensor,
    "_c10d_functional.all_to_all_single": c10d_all_to_all_single,
    "_c10d_functional.wait_tensor": wait_tensor,
}
"""One function per collective, by IR op name."""
