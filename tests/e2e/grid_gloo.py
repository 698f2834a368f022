"""Cells of the grid on gloo ranks, under DDP over the data axis, as a trainer runs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import autosp_ir as air
from tests.e2e import grid
from tests.emit.steps import gradients, largest_error

Cell = tuple[str, str, str, int, int]
"""Heads, length, mask, micro-batches per data group, data groups."""


def cell_errors(rank: int, world: int, cells: Sequence[Cell]) -> list[tuple[float, float]]:
    """For every cell, the relative error of the global loss and the largest one of its gradients."""
    return [_cell_error(world, *cell) for cell in cells]


def _cell_error(world: int, heads: str, length: str, mask: str, accumulated: int, groups: int) -> tuple[float, float]:
    mesh = init_device_mesh("cpu", (groups, world // groups), mesh_dim_names=("dp", "sp"))
    size, group = grid.LENGTHS[length], mesh.get_local_rank("dp")
    parts = grid.weighted([grid.micro_batch(mask, size, part) for part in range(accumulated * groups)])
    mine = parts[group * accumulated : (group + 1) * accumulated]
    model = grid.model_of(heads, mask, size)
    expected_loss, expected = _dense(model, parts)
    step = air.parallelize(model, mine[0], mesh=mesh, backend="aot_eager")
    module = DistributedDataParallel(step, process_group=mesh.get_group("dp")) if groups > 1 else step
    model.zero_grad()
    loss = torch.zeros(())
    for number, batch in enumerate(mine):
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = number == len(mine) - 1
        # DDP averages over the groups, and the loss is divided by the tokens of all of them.
        part = module(**batch)["loss"] * groups
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss, group=mesh.get_group("dp"))
    found = float(loss) / groups
    return abs(found - expected_loss) / expected_loss, largest_error(gradients(model), expected)


def _dense(model: nn.Module, parts: Sequence[grid.Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**grid.concatenated(parts))["loss"]
    loss.backward()
    return float(loss.detach()), gradients(model)
