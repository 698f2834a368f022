"""Our modes: `parallelize` with a backend and a pipeline."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import autosp_ir as air
import autosp_passes
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.workload import Case, Choice, Mode, build, tokens

# Where the package is on the path but not installed, no entry point names its passes.
for _name in autosp_passes.__all__:
    air.register_pass(getattr(autosp_passes, _name))


def ours(sizes: Sizes, device: torch.device, choice: Choice) -> Mode:
    """The model as a user has it, parallelized for each length."""
    model = build(sizes, device, None)

    def prepare(seq: int) -> Case:
        ids = tokens(sizes, seq, device)
        batch = {"input_ids": ids, "labels": ids.clone()}
        backend: Any = choice.backend
        began = time.perf_counter()
        forward = air.parallelize(model, batch, backend=backend, pipeline=choice.pipeline)
        spent = time.perf_counter() - began

        def step(factor: float | None) -> Tensor:
            del factor  # the gradient already is the global mean's
            loss: Tensor = forward(**batch).loss
            loss.backward()
            return loss

        return Case(step, 1 / dist.get_world_size(), spent, weighted=False)

    return model, prepare
