"""Settings beside the product of `test_exact`: parameters, outputs, meshes, precision, lengths of one program."""

from __future__ import annotations

import pytest
import torch

from autosp_ir.capture.program import capture
from autosp_ir.pipeline import DEFAULT_PIPELINE, PassManager
from autosp_ir.testing import DenseReference, assert_equivalent
from tests.e2e.line import check_line, partitioned
from tests.models import build


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_frozen_and_tied_parameters(name: str) -> None:
    model, batch = build(name, batch_size=2, length=33)
    kept = {n for i, (n, p) in enumerate(model.named_parameters()) if p.requires_grad_(i % 3 > 0).requires_grad}
    result = check_line(model, batch, 4)
    assert {d.what.removeprefix("gradient of ") for d in result.program.deviations if "gradient" in d.what} == kept


def test_only_the_embeddings_train() -> None:
    model, batch = build("llama-gqa", length=32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name)
    check_line(model, batch, 2)


@pytest.mark.parametrize("name", ["llama-gqa", "plain"])
@pytest.mark.parametrize("length", [32, 33])
def test_logits_are_whole_and_unpadded_on_every_rank(name: str, length: int) -> None:
    model, batch = build(name, batch_size=2, length=length)
    result = check_line(model, batch, 4, outputs=["loss", "logits"])
    assert sum(d.what.startswith("output logits on rank") for d in result.program.deviations) == 4


@pytest.mark.parametrize("pipeline", [DEFAULT_PIPELINE, DEFAULT_PIPELINE.replace("ulysses", "ulysses{fuse=qkv}")])
def test_external_gradient_sync_averages_to_the_dense_gradient(pipeline: str) -> None:
    model, batch = build("qwen3", length=33)
    check_line(model, batch, 4, pipeline.replace("grad-sync", "grad-sync{mode=external}"))


def test_min_cut_rematerialisation_is_exact() -> None:
    model, batch = build("llama-gqa", length=33)
    check_line(model, batch, 4, DEFAULT_PIPELINE.replace("remat", "remat{policy=min-cut}"))


def test_a_second_mesh_axis_changes_nothing() -> None:
    model, batch = build("llama-gqa", length=32)
    program = PassManager(DEFAULT_PIPELINE).run(capture(model, batch), mesh={"dp": 2, "sp": 2}).program
    assert_equivalent(model, program, batch, world=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_programs_captured_in_another_precision(dtype: torch.dtype) -> None:
    model, batch = build("qwen3", length=33, dtype=dtype)
    check_line(model, batch, 4)


def test_one_dynamic_program_serves_every_length() -> None:
    example = build("plain", batch_size=2, length=24)
    program = partitioned(capture(*example, dynamic=True), 4)
    for length in (8, 33, 64):
        model, batch = build("plain", batch_size=2, length=length, ignored=2)
        model.load_state_dict(example[0].state_dict())
        DenseReference.of(model, batch).check(program)


def test_every_stage_of_the_line_is_equivalent() -> None:
    model, batch = build("llama-gqa", length=33, ignored=4)
    reference = DenseReference.of(model, batch)
    passes = DEFAULT_PIPELINE.split(",")
    program = reference.program
    for pass_ in passes:
        program = PassManager(pass_).run(program, mesh={"sp": 4}).program
        reference.check(program)
