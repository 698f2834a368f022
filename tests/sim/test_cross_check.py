"""The simulator against two independent ways of running the same program: torch's LocalTensorMode, and real gloo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

from autosp_ir.comm.groups import bind_axis
from autosp_ir.emit.fx_export import executable
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.sim.lockstep import simulate
from tests.gloo import run_ranks
from tests.sim.programs import autosp, mlp_inputs, traced_joint


def every_collective(size: int) -> Any:
    """Uses each layout operator in forward, and so each of their transposes in backward."""

    def forward(x: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
        h = autosp("shard", x, 1, "sp", size) @ autosp("invariant_to_replicate", w0, "sp", size)
        h = autosp("all_to_all", h, 2, 1, "sp", size).sin()
        h = autosp("all_to_all", h, 1, 2, "sp", size)
        whole = autosp("all_gather", h, 1, "sp", size, "replicate")
        scale = (1 + autosp("axis_index", "sp", size)).to(h.dtype)
        h = h + autosp("reduce_scatter", scale * whole.tanh(), 1, "sp", size)
        h = h @ autosp("invariant_to_replicate", w1, "sp", size)
        everything = autosp("all_gather", h, 1, "sp", size, "invariant")
        return autosp("all_reduce", (h * h).sum(), "sp", size) + everything.cos().mean()

    return forward


def program_for(size: int, lowered: bool) -> Program:
    program = traced_joint(every_collective(size), mlp_inputs(), {"sp": size})
    return PassManager("lower-comm", verify=False).run(program).program if lowered else program


class _WithGroup(fx.Interpreter):
    """Replaces the logical axis name by a group name; `shards` gives what reads the rank."""

    def __init__(self, module: fx.GraphModule, group: str, local: Any = None) -> None:
        super().__init__(module)
        self._group = group
        self._local = local

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self._local is not None and target is torch.ops.autosp.shard.default:
            x, dim, _, size = args
            return self._local([x.reconcile().chunk(size, dim)[rank].clone() for rank in range(size)])
        if self._local is not None and target is torch.ops.autosp.axis_index.default:
            return self._local([torch.tensor(rank) for rank in range(args[1])])
        return super().call_function(target, tuple(self._group if a == "sp" else a for a in args), kwargs)


@contextmanager
def fake_group(size: int) -> Iterator[str]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_agrees_with_local_tensor_mode(size: int) -> None:
    local_tensor = pytest.importorskip("torch.distributed._local_tensor")
    program = program_for(size, lowered=True)
    inputs = mlp_inputs()
    sim = simulate(program, {"x": inputs["x"]})

    def local(ranks: list[Tensor]) -> Any:
        return local_tensor.LocalTensor(dict(enumerate(ranks)))

    with fake_group(size) as group, local_tensor.LocalTensorMode(size):
        run = _WithGroup(executable(program), group, local)
        outputs = run.run(*(local([value.clone() for _ in range(size)]) for value in inputs.values()))
        found = [output.reconcile() for output in outputs]
    for left, right in zip(found, [sim.loss, *sim.grads.values()], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)


def on_one_rank(rank: int, world: int, lowered: bool) -> list[Tensor]:
    group = dist.group.WORLD
    assert group is not None
    run = _WithGroup(executable(program_for(world, lowered)), group.group_name)
    with bind_axis("sp", group), torch.no_grad():
        return list(run.run(*mlp_inputs().values()))


@pytest.mark.gloo
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lowered", [False, True])
def test_agrees_with_gloo(size: int, lowered: bool) -> None:
    program = program_for(size, lowered)
    sim = simulate(program, {"x": mlp_inputs()["x"]})
    for outputs in run_ranks(on_one_rank, size, lowered):
        for left, right in zip(outputs, [sim.loss, *sim.grads.values()], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
