"""FSDP2 where it may stand around a step and where not; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import autosp_ir as air
from tests.emit.steps import gradients, largest_error, loss_of
from tests.models import build
from tests.refusals.bodies import Met, met


def _data_mesh(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "sp"))


def _built(length: int = 16) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return build("llama-gqa", length=length, num_hidden_layers=1)


def other_batches_under_fsdp2(rank: int, world: int, which: str) -> float:
    """Other lengths and modes are captured inside FSDP2's forward; the largest error against dense."""
    mesh = _data_mesh(world)
    (model, batch), (dense, _) = _built(), _built()
    step = air.parallelize(model, batch, mesh=mesh, backend="aot_eager")
    fully_shard(step if which == "step" else model, mesh=mesh["dp"])
    errors = []
    for length, training in ((16, True), (17, True), (16, False)):
        step.train(training)
        other = _built(length)[1]
        losses = [loss_of(module(**other)) for module in (step, dense)]
        for loss in losses:
            loss.backward()
        errors.append(float((losses[0] - losses[1]).detach().abs()))
    found = {n: p.grad.full_tensor() for n, p in step.named_parameters() if isinstance(p.grad, DTensor)}
    return max(*errors, largest_error(found, gradients(dense)))


def lower_precision_under_fsdp2(rank: int, world: int) -> tuple[float, str]:
    """FSDP2 casts parameters to bfloat16 for the step: loss error against dense, and the gradients' dtype."""
    mesh = _data_mesh(world)
    (model, batch), (dense, _) = _built(), _built()
    step = air.parallelize(model, batch, mesh=mesh, backend="aot_eager")
    fully_shard(step, mesh=mesh["dp"], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss = loss_of(step(**batch))
    loss.backward()
    expected = float(loss_of(dense(**batch)).detach())
    dtypes = {str(p.grad.dtype) for p in step.parameters() if p.grad is not None}
    return abs(float(loss.detach()) - expected) / expected, ", ".join(dtypes)


def misplaced_fsdp2(rank: int, world: int) -> dict[str, Met]:
    """FSDP2 on layers of a step, and on a model or its layers before it is captured."""
    mesh = _data_mesh(world)
    model, batch = _built()
    step = air.parallelize(model, batch, mesh=mesh, backend="aot_eager")
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(step, mesh=mesh["dp"])

    def sharded_before(shard: Callable[[nn.Module], Any]) -> Any:
        early, _ = _built()
        shard(early)
        return air.parallelize(early, batch, mesh=mesh)

    return {
        "layers": met(lambda: step(**batch)),
        "model first": met(lambda: sharded_before(lambda m: fully_shard(m, mesh=mesh["dp"]))),
        "layers first": met(lambda: sharded_before(lambda m: fully_shard(m.get_submodule("lm_head"), mesh=mesh["dp"]))),
    }
