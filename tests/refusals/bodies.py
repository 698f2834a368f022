"""Functions that run on every rank; each returns the error that its rank met, as class and message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import autosp_ir as air
from tests.models import build

Met = tuple[str, str]


def met(attempt: Callable[[], Any]) -> Met:
    """The class and message of the error that a call raises; two empty texts if it returns."""
    torch.set_num_threads(1)
    try:
        attempt()
    except air.AutoSPError as error:
        return type(error).__name__, str(error)
    return "", ""


def different_batches(rank: int, world: int, what: str) -> list[Met]:
    """First steps on batches of which one input differs between the ranks, and then on equal ones."""
    model, batch = build("llama-gqa", length=16)
    step = air.parallelize(model, batch, backend="eager")
    other = {k: v.clone() for k, v in batch.items()}
    if rank == world - 1 and what == "content":
        other["labels"][0, 3] = (other["labels"][0, 3] + 1) % 50
    if rank == world - 1 and what == "order":
        other["labels"] = other["labels"].flip(1)
    return [met(lambda: step(**other)), met(lambda: step(**batch))]


def different_settings(rank: int, world: int, what: str) -> Met:
    """A first step on equal batches, with the last rank alone under autocast or in evaluation mode."""
    model, batch = build("llama-gqa", length=16)
    step = air.parallelize(model, batch, backend="eager")
    last = rank == world - 1
    step.train(not (last and what == "module.training"))
    with torch.autocast("cpu", torch.bfloat16, enabled=last and what == "torch.autocast"):
        return met(lambda: step(**batch))


def world_of_another_size(rank: int, world: int) -> list[Met]:
    """A program written for three ranks, emitted without a mesh and on one."""
    model, batch = build("llama-gqa", length=24, heads=6, hidden_size=24, kv_heads=3)
    program = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(model, batch), mesh={"sp": 3}).program
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("sp",))
    return [met(program.emit), met(lambda: program.emit(mesh=mesh))]


def mesh_without_the_axis(rank: int, world: int) -> list[Met]:
    """Meshes whose axis is called otherwise, or has no name."""
    model, batch = build("llama-gqa", length=16)
    program = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(model, batch), mesh={"sp": world}).program
    named, bare = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)), init_device_mesh("cpu", (world,))
    return [
        met(lambda: air.parallelize(model, batch, mesh=named)),
        met(lambda: air.parallelize(model, batch, mesh=bare)),
        met(lambda: program.emit(mesh=named)),
    ]
