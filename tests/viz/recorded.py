"""Recorded runs for the tests of this folder."""

from __future__ import annotations

from functools import cache

import autosp_ir as air
from autosp_ir.ir.program import Program
from autosp_ir.viz.recording import Recording
from tests.models.transformers_zoo import llama


@cache
def llama_program(layers: int = 1) -> Program:
    model, batch = llama(num_hidden_layers=layers)
    return air.capture(model, batch)


@cache
def llama_result(layers: int = 1, pipeline: str = air.DEFAULT_PIPELINE) -> air.PassResult:
    recorder = air.instruments.Recorder()
    manager = air.PassManager(pipeline, instruments=[recorder])
    return manager.run(llama_program(layers), mesh={"sp": 4})


def llama_recording(layers: int = 1) -> Recording:
    return llama_result(layers).trace.recording
