"""The layout operators on real processes, against the collectives as pure functions."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autosp_ir.comm.groups import bind_axis
from autosp_ir.errors import RuntimeMismatchError
from autosp_ir.sim.collectives import COLLECTIVES
from tests import gloo
from tests.gloo import RankError, run_ranks

pytestmark = pytest.mark.gloo

CASES: list[tuple[str, dict[str, Any]]] = [
    ("invariant_to_replicate", {}),
    ("shard", {"dim": 1}),
    ("shard", {"dim": -1}),
    ("all_gather", {"dim": 0}),
    ("all_gather", {"dim": 2, "to": "replicate"}),
    ("reduce_scatter", {"dim": 1}),
    ("all_reduce", {}),
    ("all_to_all", {"split_dim": 1, "concat_dim": 0}),
    ("all_to_all", {"split_dim": 2, "concat_dim": 1}),
    ("permute", {"perm": "shift"}),
]


def inputs(world: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Transposed, so that the operators meet tensors that are not contiguous.
    return [torch.randint(-9, 9, (8, 4, 12), generator=generator).to(dtype).transpose(0, 1) for _ in range(world)]


def attributes_for(case: dict[str, Any], world: int) -> dict[str, Any]:
    shift = [(rank + 1) % world for rank in range(world)]
    return {name: shift if value == "shift" else value for name, value in case.items()}


def apply_all(rank: int, world: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    results: list[tuple[Tensor, Tensor | None]] = []
    for name, case in CASES:
        x = inputs(world, dtype)[rank]
        if dtype.is_floating_point:
            x.requires_grad_()
        y = getattr(torch.ops.autosp, name)(x, **attributes_for(case, world), axis="sp", size=world)
        # Backward outside the binding would not find the axis: emitted graphs carry the group's own name instead.
        grad = torch.autograd.grad(y, x, y.detach())[0] if dtype.is_floating_point else None
        results.append((y.detach(), grad))
    return results


def bound(rank: int, world: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    assert dist.group.WORLD is not None
    with bind_axis("sp", dist.group.WORLD):
        return apply_all(rank, world, dtype)


BACKWARD: dict[str, tuple[str, dict[str, str]]] = {
    "invariant_to_replicate": ("all_reduce", {}),
    "shard": ("all_gather", {"dim": "dim"}),
    "reduce_scatter": ("all_gather", {"dim": "dim"}),
    "all_reduce": ("invariant_to_replicate", {}),
    "all_to_all": ("all_to_all", {"split_dim": "concat_dim", "concat_dim": "split_dim"}),
}


def backward_of(name: str, attributes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if name == "permute":
        perm = attributes["perm"]
        return name, {"perm": sorted(range(len(perm)), key=perm.__getitem__)}
    if name == "all_gather":
        return ("reduce_scatter" if attributes.get("to") == "replicate" else "shard"), {"dim": attributes["dim"]}
    transpose, names = BACKWARD[name]
    return transpose, {target: attributes[source] for target, source in names.items()}


@pytest.mark.parametrize(
    ("world", "dtype"),
    [(2, torch.float64), (2, torch.bfloat16), (2, torch.int64), (2, torch.bool), (4, torch.float32)],
)
def test_agrees_with_the_pure_functions(world: int, dtype: torch.dtype) -> None:
    results = run_ranks(bound, world, dtype)
    axis = {"axis": "sp", "size": world}
    for index, (name, case) in enumerate(CASES):
        if dtype == torch.bool and name in ("all_reduce", "reduce_scatter"):
            continue
        attributes = attributes_for(case, world)
        expected = COLLECTIVES[f"autosp.{name}"](inputs(world, dtype), **attributes, **axis)
        for rank in range(world):
            assert torch.equal(results[rank][index][0], expected[rank]), (name, rank)
            assert results[rank][index][0].is_contiguous() or name == "invariant_to_replicate"
        if dtype.is_floating_point:
            transpose, transposed = backward_of(name, attributes)
            grads = COLLECTIVES[f"autosp.{transpose}"](expected, **transposed, **axis)
            assert all(torch.equal(results[rank][index][1], grads[rank]) for rank in range(world)), name


def partitioned_loss(rank: int, world: int, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    assert dist.group.WORLD is not None
    autosp, axis = torch.ops.autosp, dist.group.WORLD.group_name
    weight = weight.requires_grad_()
    local = autosp.shard(x, 0, axis, world) @ autosp.invariant_to_replicate(weight, axis, world)
    moved = autosp.all_to_all(local, 1, 0, axis, world).cumsum(0)
    whole = autosp.all_gather(moved, 1, axis, world, "invariant")
    loss = autosp.all_reduce(moved.sin().sum(), axis, world) + whole.cos().sum()
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def test_gradients_equal_the_dense_ones_through_a_c10d_group_name() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(6, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    results = run_ranks(partitioned_loss, 2, weight, x)
    weight.requires_grad_()
    y = (x @ weight).cumsum(0)
    loss = y.sin().sum() + y.cos().sum()
    (grad,) = torch.autograd.grad(loss, weight)
    for actual in results:
        torch.testing.assert_close(actual, (loss.detach(), grad), rtol=1e-12, atol=1e-12)


def mismatch(rank: int, world: int) -> list[str]:
    assert dist.group.WORLD is not None
    messages = []
    with bind_axis("sp", dist.group.WORLD):
        for axis, size in (("sp", world + 1), ("sp", 1), ("tp", world)):
            try:
                torch.ops.autosp.all_reduce(torch.zeros(2), axis, size)
            except RuntimeMismatchError as error:
                messages.append(str(error))
    return messages


def test_group_mismatches_are_named() -> None:
    for messages in run_ranks(mismatch, 2):
        assert "built for 3 rank(s)" in messages[0] and "has 2" in messages[0]
        assert "built for 1 rank(s)" in messages[1]
        assert "no process group is bound to axis 'tp'" in messages[2]


def fails_on_one_rank(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("this rank is broken")
    dist.barrier()


def never_ends(rank: int, world: int) -> None:
    time.sleep(60)


def dies(rank: int, world: int) -> None:
    import os

    os._exit(7)


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*fails_on_one_rank(.|\n)*this rank is broken"):
        run_ranks(fails_on_one_rank, 2)


def test_a_rank_that_hangs_or_dies_is_reported() -> None:
    with pytest.raises(RankError, match="did not finish"):
        run_ranks(never_ends, 1, timeout=8.0)
    with pytest.raises(RankError, match="exit code 7"):
        run_ranks(dies, 1)


@pytest.mark.parametrize("failed", [1, 2, 3])
def test_ranks_without_a_group_meet_again_twice(failed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: tuple[dict[int, Any], dict[int, str]] = ({}, {1: "_NoGroupError: rank 1 has no process group"})
    outcomes = [*[apart] * failed, ({0: "a", 1: "b"}, {})]
    monkeypatch.setattr(gloo, "_run_once", lambda *_: outcomes.pop(0))
    if failed < 3:
        assert run_ranks(dies, 2) == ["a", "b"]
        return
    with pytest.raises(RankError, match="rank 1 has no process group"):
        run_ranks(dies, 2)
