"""dp 2 x sp 2 training under what people wrap models in, a checkpoint of it, and training on from there on sp 4."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import autosp_ir as air
from tests.emit.steps import largest_error, loss_of
from tests.models import build

NAME, LENGTH, RATE, GROUPS = "llama-gqa", 17, 1e-3, 2
WRAPPERS = ("ddp", "ddp-external", "zero", "fsdp2")


class Composed(NamedTuple):
    """Errors, relative: of parameters against dense training, and of losses across the checkpoint."""

    trained: float
    into_dense: float
    jump: float
    resumed: float


def model_of(seed: int = 0) -> nn.Module:
    return build(NAME, length=LENGTH, seed=seed, num_hidden_layers=1)[0]


def batch_of(group: int, step: int) -> dict[str, Tensor]:
    """Distinct data in every group and step, with different numbers of valid labels."""
    return build(NAME, length=LENGTH, seed=10 * step + group, ignored=2 + 8 * group, num_hidden_layers=1)[1]


def train_dense(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Every group's batch on one device, each weighing the same, as DDP averages them."""
    for step in steps:
        optimizer.zero_grad()
        for group in range(GROUPS):
            (loss_of(model(**batch_of(group, step))) / GROUPS).backward()
        optimizer.step()


def dense_loss(model: nn.Module, step: int) -> float:
    with torch.no_grad():
        return sum(float(loss_of(model(**batch_of(group, step)))) for group in range(GROUPS)) / GROUPS


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by canonical name."""
    held = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in held.items()}


class Steps(NamedTuple):
    """Every step that the comparisons need; making one takes longer than training it."""

    reduced: nn.Module
    external: nn.Module
    elsewhere: nn.Module


def steps_for(mesh: DeviceMesh, world: int) -> Steps:
    """Steps on dp x sp with gradients reduced inside and left to DDP, and one on sp over all ranks."""
    batch = batch_of(mesh.get_local_rank("dp"), 0)
    other = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "sp"))
    return Steps(
        air.parallelize(model_of(), batch, mesh=mesh, backend="aot_eager"),
        air.parallelize(model_of(), batch, mesh=mesh, backend="aot_eager", grad_sync="external"),
        air.parallelize(model_of(), batch, mesh=other, backend="aot_eager"),
    )


def wrapped(how: str, steps: Steps, mesh: DeviceMesh) -> tuple[nn.Module, Optimizer]:
    """A step with the first weights under a wrapper, and its optimizer."""
    step = steps.external if how == "ddp-external" else steps.reduced
    step.load_state_dict(model_of().state_dict())
    if how == "fsdp2":
        fully_shard(step, mesh=mesh["dp"])
        return step, AdamW(step.parameters(), lr=RATE)
    over = None if how == "ddp-external" else mesh.get_group("dp")
    module = DistributedDataParallel(step, process_group=over)
    if how == "zero":
        return module, ZeroRedundancyOptimizer(module.parameters(), AdamW, process_group=over, lr=RATE)
    return module, AdamW(module.parameters(), lr=RATE)


def composed(rank: int, world: int, folder: str) -> dict[str, Composed]:
    """For every wrapper: ten steps on dp x sp, a checkpoint, three more on sp alone; against dense training."""
    mesh = init_device_mesh("cpu", (GROUPS, world // GROUPS), mesh_dim_names=("dp", "sp"))
    steps = steps_for(mesh, world)
    dense = model_of()
    optimizer = AdamW(dense.parameters(), lr=RATE)
    train_dense(dense, optimizer, range(10))
    after_ten = parameters_of(dense)
    train_dense(dense, optimizer, range(10, 13))
    expected = (after_ten, parameters_of(dense))
    # FSDP2 comes last: what it has made of a module stays.
    return {how: _composed(how, steps, mesh, f"{folder}/{how}", expected) for how in WRAPPERS}


def _composed(
    how: str, steps: Steps, mesh: DeviceMesh, folder: str, expected: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> Composed:
    group = mesh.get_local_rank("dp")
    module, optimizer = wrapped(how, steps, mesh)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(module(**batch_of(group, step))).backward()
        optimizer.step()
    trained = parameters_of(module)
    _save(module, optimizer, folder)
    before = _next_loss(module, group)
    into_dense, fresh = _load_dense(folder)
    resumed, resumed_optimizer = _resume(folder, steps.elsewhere)
    after = dense_loss(resumed, 10)
    train_dense(resumed, resumed_optimizer, range(10, 13))
    return Composed(
        largest_error(trained, expected[0]),
        max(largest_error(parameters_of(fresh), trained), abs(into_dense - before) / before),
        abs(after - before) / before,
        largest_error(parameters_of(resumed), expected[1]),
    )


def _next_loss(module: nn.Module, group: int) -> float:
    """The loss of the batches to come, averaged over the groups."""
    with torch.no_grad():
        loss = loss_of(module(**batch_of(group, 10))).detach()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def _save(module: nn.Module, optimizer: Optimizer, folder: str) -> None:
    """Every rank writes its part; torch names what is inside wrappers by the model's own names."""
    Path(folder).mkdir(exist_ok=True)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        # Each rank of its group holds a part of the states, which only it can put together.
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            torch.save(optimizer.state_dict(), Path(folder, "optimizer.pt"))
        state: Mapping[str, Any] = {"model": {n.removeprefix("module."): t for n, t in module.state_dict().items()}}
    else:
        parameters, states = get_state_dict(module, optimizer)
        state = {"model": parameters, "optimizer": states}
    save(dict(state), checkpoint_id=str(Path(folder, "parts")))
    dist.barrier()


def _load_dense(folder: str) -> tuple[float, nn.Module]:
    """A checkpoint in the dense model."""
    fresh = model_of(seed=5)
    state = {"model": fresh.state_dict()}
    load(state, checkpoint_id=str(Path(folder, "parts")))
    fresh.load_state_dict(state["model"])
    return dense_loss(fresh, 10), fresh


def _resume(folder: str, step: nn.Module) -> tuple[nn.Module, Optimizer]:
    """A checkpoint in a step on another mesh that held other weights, with the optimizer's states."""
    step.load_state_dict(model_of(seed=6).state_dict())
    # Where a gradient stands, torch leaves the states out of what it is about to fill.
    step.zero_grad()
    optimizer = AdamW(step.parameters(), lr=RATE)
    if Path(folder, "optimizer.pt").exists():
        state = {"model": step.state_dict()}
        load(state, checkpoint_id=str(Path(folder, "parts")))
        step.load_state_dict(state["model"])
        optimizer.load_state_dict(torch.load(Path(folder, "optimizer.pt")))
        return step, optimizer
    parameters, states = get_state_dict(step, optimizer)
    state = {"model": parameters, "optimizer": states}
    load(state, checkpoint_id=str(Path(folder, "parts")))
    set_state_dict(step, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step, optimizer
