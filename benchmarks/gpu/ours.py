"""Our modes: `parallelize` with a backend and a pipeline."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import autosp_ir as air
import autosp_passes
from autosp_ir.analysis.hardware import this_device
from autosp_ir.emit.parallelize import Backend, default_pipeline
from autosp_ir.pipeline.registry import parse_pipeline
from autosp_ir.plan import rungs
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.workload import Case, Choice, Mode, build, tokens

# Where the package is on the path but not installed, no entry point names its passes.
for _name in autosp_passes.__all__:
    air.register_pass(getattr(autosp_passes, _name))

# Pinned memory of a rank, for pipelines of the plan that use it.
_HOST = 100 * 2**30


def ours(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """The model as a user has it, parallelized for each length."""
    model = build(sizes, device, None)

    def prepare(seq: int) -> Case:
        ids = tokens(sizes, seq, device)
        batch = {"input_ids": ids, "labels": ids.clone()}
        backend: Any = choice.backend
        began = time.perf_counter()
        pipeline = resolved(choice.pipeline, seq // dist.get_world_size(), backend)
        forward = air.parallelize(model, batch, backend=backend, pipeline=pipeline)
        spent = time.perf_counter() - began

        def step(factor: float | None) -> Tensor:
            del factor  # the gradient already is the global mean's
            loss: Tensor = forward(**batch).loss
            loss.backward()
            return loss

        return Case(step, 1 / dist.get_world_size(), spent, weighted=False)

    return model, prepare


def resolved(pipeline: str | None, tokens: int, backend: Backend) -> str | None:
    """A pipeline as it is given, or for `@NAME` the one that `autosp_ir.plan` calls so.

    Args:
        pipeline: The text; None for the default pipeline.
        tokens: On one rank.
        backend: What compiles it.

    Raises:
        ValueError: The plan has no pipeline of that name.
    """
    if pipeline is None or not pipeline.startswith("@"):
        return pipeline
    passes = parse_pipeline(default_pipeline(backend=backend))
    known = {rung.name: rung.pipeline for rung in rungs(passes, tokens, device=this_device(), host=_HOST)}
    if pipeline[1:] not in known:
        raise ValueError(f"the plan has no pipeline called {pipeline[1:]!r}; it has {', '.join(map(repr, known))}")
    return known[pipeline[1:]]
