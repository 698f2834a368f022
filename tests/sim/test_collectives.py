"""The collectives as functions over rank lists: their meaning, their transposes, and their refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autosp_ir.comm.ops import inverse_permutation
from autosp_ir.errors import SimulationError
from autosp_ir.sim.collectives import COLLECTIVES

WORLD = 3
AXIS: dict[str, Any] = {"axis": "sp", "size": WORLD}
GROUP: dict[str, Any] = {"group_name": "sp"}


def run(name: str, tensors: list[Tensor], **attributes: Any) -> list[Tensor]:
    return COLLECTIVES[f"autosp.{name}"](tensors, **attributes, **AXIS)


def ranks(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(WORLD)]


def same(x: Tensor) -> list[Tensor]:
    return [x] * WORLD


def test_shard_then_gather_is_the_whole() -> None:
    x = ranks(4, 6)[0]
    for to in ("invariant", "replicate"):
        for gathered in run("all_gather", run("shard", same(x), dim=1), dim=1, to=to):
            assert torch.equal(gathered, x)


def test_reduce_scatter_is_a_slice_of_all_reduce() -> None:
    tensors = ranks(4, 6)
    expected = run("shard", run("all_reduce", tensors), dim=-1)
    assert all(map(torch.equal, run("reduce_scatter", tensors, dim=-1), expected))


@pytest.mark.parametrize(("split_dim", "concat_dim"), [(0, 1), (1, 0), (2, 0), (1, -1)])
def test_all_to_all_moves_the_shard(split_dim: int, concat_dim: int) -> None:
    x = ranks(6, 3, 9)[0]
    moved = run("all_to_all", run("shard", same(x), dim=concat_dim), split_dim=split_dim, concat_dim=concat_dim)
    assert all(map(torch.equal, moved, run("shard", same(x), dim=split_dim)))


def test_permute_sends_to_the_named_rank() -> None:
    tensors = ranks(2)
    received = run("permute", tensors, perm=[1, 2, 0])
    assert all(torch.equal(received[to], tensors[source]) for source, to in enumerate([1, 2, 0]))


def test_axis_index() -> None:
    assert [int(x) for x in run("axis_index", [])] == [0, 1, 2]


def test_results_share_no_memory() -> None:
    tensors = ranks(3, 6)
    for name, attributes in (("invariant_to_replicate", {}), ("all_reduce", {}), ("all_gather", {"dim": 0})):
        pointers = {x.data_ptr() for x in (*tensors, *run(name, tensors, **attributes))}
        assert len(pointers) == 2 * WORLD


# A value with layout I or R is one value that all ranks hold; its gradient is one value (I) or the sum over ranks (R).
# So a linear map from x's layout to y's is transposed by the operator that its backward emits.
INV, REP, SHARD, PARTIAL = "invariant", "replicate", "shard", "partial"
TRANSPOSES: list[tuple[str, dict[str, Any], str, str, str, dict[str, Any]]] = [
    ("invariant_to_replicate", {}, INV, REP, "all_reduce", {}),
    ("shard", {"dim": 1}, INV, SHARD, "all_gather", {"dim": 1, "to": "invariant"}),
    ("all_gather", {"dim": 1, "to": "invariant"}, SHARD, INV, "shard", {"dim": 1}),
    ("all_gather", {"dim": 1, "to": "replicate"}, SHARD, REP, "reduce_scatter", {"dim": 1}),
    ("reduce_scatter", {"dim": 1}, PARTIAL, SHARD, "all_gather", {"dim": 1, "to": "replicate"}),
    ("all_reduce", {}, PARTIAL, INV, "invariant_to_replicate", {}),
    ("all_to_all", {"split_dim": 0, "concat_dim": 1}, SHARD, SHARD, "all_to_all", {"split_dim": 1, "concat_dim": 0}),
    ("permute", {"perm": [1, 2, 0]}, SHARD, SHARD, "permute", {"perm": inverse_permutation([1, 2, 0])}),
]


@pytest.mark.parametrize(("name", "attributes", "source", "target", "backward", "backward_attributes"), TRANSPOSES)
def test_backward_is_the_transpose(
    name: str, attributes: dict[str, Any], source: str, target: str, backward: str, backward_attributes: dict[str, Any]
) -> None:
    leaves = [x.requires_grad_() for x in (ranks(3, 6)[:1] if source == INV else ranks(3, 6))]
    results = run(name, leaves * WORLD if source == INV else leaves, **attributes)
    # The loss weighs an invariant value once, and every rank's copy of a replicated value by that rank's own work.
    grads = [torch.randn_like(y) for y in results]
    grads = [grads[0]] * WORLD if target == INV else grads
    counted = 1 if target == INV else WORLD
    loss = sum(((y * g).sum() for y, g in zip(results[:counted], grads, strict=False)), torch.zeros(()))
    expected = torch.autograd.grad(loss, leaves)
    actual = run(backward, grads, **backward_attributes)
    for rank, grad in enumerate(actual):
        torch.testing.assert_close(grad, expected[0 if source == INV else rank])


@pytest.mark.parametrize("row", TRANSPOSES, ids=lambda row: f"{row[0]} to {row[3]}")
def test_gradcheck(row: tuple[str, dict[str, Any], str, str, str, dict[str, Any]]) -> None:
    tensors = [x.requires_grad_() for x in ranks(3, 3)]
    assert torch.autograd.gradcheck(lambda *x: tuple(run(row[0], list(x), **row[1])), tensors)


def test_lowered_collectives_agree_with_the_operators() -> None:
    tensors = ranks(6, 2)
    blocks = {"output_split_sizes": [2] * WORLD, "input_split_sizes": [2] * WORLD}
    pairs: list[tuple[list[Tensor], list[Tensor]]] = [
        (
            COLLECTIVES["_c10d_functional.all_reduce"](tensors, reduce_op="sum", **GROUP),
            run("all_reduce", tensors),
        ),
        (
            COLLECTIVES["_c10d_functional.all_gather_into_tensor"](tensors, group_size=WORLD, **GROUP),
            run("all_gather", tensors, dim=0),
        ),
        (
            COLLECTIVES["_c10d_functional.reduce_scatter_tensor"](tensors, reduce_op="sum", group_size=WORLD, **GROUP),
            run("reduce_scatter", tensors, dim=0),
        ),
        (
            [
                x.view(WORLD, 2, 2).transpose(0, 1).reshape(2, -1)
                for x in COLLECTIVES["_c10d_functional.all_to_all_single"](tensors, **blocks, **GROUP)
            ],
            run("all_to_all", tensors, split_dim=0, concat_dim=1),
        ),
    ]
    for actual, expected in pairs:
        assert all(map(torch.equal, COLLECTIVES["_c10d_functional.wait_tensor"](actual), expected))


def test_uneven_all_to_all_is_a_permute() -> None:
    tensors = ranks(4)
    sends = [[0, 4, 0], [0, 0, 4], [4, 0, 0]]
    receives = [[0, 0, 4], [4, 0, 0], [0, 4, 0]]
    actual = COLLECTIVES["_c10d_functional.all_to_all_single"](
        tensors, output_split_sizes=receives, input_split_sizes=sends, **GROUP
    )
    assert all(map(torch.equal, actual, run("permute", tensors, perm=[1, 2, 0])))


@pytest.mark.parametrize(
    ("reduce_op", "expected"), [("sum", 6.0), ("product", 6.0), ("min", 1.0), ("max", 3.0), ("avg", 2.0)]
)
def test_reductions(reduce_op: str, expected: float) -> None:
    tensors = [torch.tensor([x]) for x in (1.0, 2.0, 3.0)]
    for x in COLLECTIVES["_c10d_functional.all_reduce"](tensors, reduce_op=reduce_op, **GROUP):
        assert x.item() == expected


ALL_TO_ALL = COLLECTIVES["_c10d_functional.all_to_all_single"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run("all_reduce", ranks(2)[:2]), "was run on 2"),
        (lambda: run("all_reduce", [*ranks(2)[:2], torch.zeros(3)]), "different tensors"),
        (lambda: run("all_gather", [*ranks(2)[:2], torch.zeros(2, dtype=torch.int64)], dim=0), "different tensors"),
        (lambda: run("shard", ranks(4), dim=0), "cannot be split evenly"),
        (lambda: run("permute", ranks(4), perm=[0, 0, 1]), "not a permutation"),
        (
            lambda: ALL_TO_ALL(ranks(4), output_split_sizes=[1, 1, 1], input_split_sizes=[1, 1, 1], **GROUP),
            "rank 0 sends 4",
        ),
        (
            lambda: ALL_TO_ALL(ranks(4), output_split_sizes=[4, 0, 0], input_split_sizes=[4, 0, 0], **GROUP),
            "rank 0 expects",
        ),
        (lambda: COLLECTIVES["_c10d_functional.all_reduce"](ranks(4), reduce_op="median", **GROUP), "median"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        call()
