"""The predicted peak of an emitted step against the storages that it really holds."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from autosp_ir.analysis.liveness import liveness
from autosp_ir.capture.from_config import model_from_config
from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program
from autosp_ir.pipeline import DEFAULT_PIPELINE, PassManager
from autosp_ir.testing.memory import measured_peak
from tests.gloo import run_ranks
from tests.models.architectures import ARCHITECTURES
from tests.sampling import sampled

torch.set_num_threads(1)
_MODELS = ("llama", "gpt2", "bert", "gemma2", "mixtral", "t5")
_POLICIES = (
    "remat{policy=save-all}",
    "remat{policy=min-cut}",
    "tile{wide=1.5} + remat{policy=min-cut}",
    "tile{wide=1.5} + remat{policy=save-all}",
    "tile{wide=1.5 loop_from=2} + remat{policy=save-all}",
)
_TOLERANCE = 0.02


def _pipeline(passes: str) -> str:
    *forward, remat = passes.split(" + ")
    return DEFAULT_PIPELINE.replace("remat", remat).replace("differentiate", ",".join([*forward, "differentiate"]))


@cache
def _captured(name: str, length: int) -> tuple[nn.Module, dict[str, Any], Program]:
    architecture = ARCHITECTURES[name]
    longer = {k: 1024 for k in ("max_position_embeddings", "n_positions") if k in architecture.config}
    config = {"model_type": name, **architecture.config, **longer}
    model, batch = model_from_config(config, length=length)
    return model, batch, capture(model, batch, **architecture.settings)


def _lowered(name: str, length: int, passes: str, ranks: int) -> Program:
    return PassManager(_pipeline(passes)).run(_captured(name, length)[2], mesh={"sp": ranks}).program


def _check(program: Program, measured: int) -> None:
    predicted = liveness(program).peak_bytes
    assert abs(predicted - measured) <= _TOLERANCE * measured, (predicted, measured)


# Twenty and the two lengths below every time.
@pytest.mark.parametrize(("name", "passes"), sampled(itertools.product(_MODELS, _POLICIES), 3, range(2)))
def test_one_rank(name: str, passes: str) -> None:
    model, batch, _ = _captured(name, 192)
    program = _lowered(name, 192, passes, 1)
    _check(program, measured_peak(program.emit(backend="aot_eager"), batch))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("length", [64, 333])
def test_other_lengths(length: int) -> None:
    _, batch, _ = _captured("llama", length)
    program = _lowered("llama", length, "remat{policy=min-cut}", 1)
    _check(program, measured_peak(program.emit(backend="aot_eager"), batch))


def _peaks(rank: int, world: int, names: tuple[str, ...], passes: tuple[str, ...]) -> list[tuple[int, int]]:
    found = []
    for name in names:
        for each in passes:
            program = _lowered(name, 256, each, world)
            step = program.emit(backend="aot_eager")
            # The first step also compares the ranks' batches, which is no part of the program.
            measured_peak(step, _captured(name, 256)[1])
            found.append((liveness(program).peak_bytes, measured_peak(step, _captured(name, 256)[1])))
    return found


@pytest.mark.gloo
def test_two_ranks_over_gloo() -> None:
    for peaks in run_ranks(_peaks, 2, ("llama", "gpt2"), ("remat{policy=min-cut}", "remat{policy=save-all}")):
        for predicted, measured in peaks:
            assert abs(predicted - measured) <= _TOLERANCE * measured, peaks
