"""An emitted step refuses what it was not captured for. One rank, no process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

import autosp_ir as air
from tests.models import build
from tests.refusals.refusal import refused

torch.set_num_threads(1)

Case = tuple[nn.Module, nn.Module, dict[str, Any]]


def emitted(dynamic: bool = False) -> Case:
    """A model, a step that never recaptures, and its batch."""
    model, batch = build("llama-gqa", length=16)
    program = air.capture(model, batch, dynamic=dynamic)
    result = air.PassManager("canonicalize,token-partition,ulysses").run(program, mesh={"sp": 1})
    return model, result.program.emit(backend="eager"), batch


@pytest.fixture(scope="module")
def case() -> Case:
    return emitted()


def test_another_dtype(case: Case) -> None:
    _, step, batch = case
    with refused(air.RuntimeMismatchError, "input_ids", "int32", "int64"):
        step(**{**batch, "input_ids": batch["input_ids"].int()})


def test_another_shape(case: Case) -> None:
    _, step, batch = case
    for other in (batch["input_ids"][:, :12], batch["input_ids"].repeat(2, 1), batch["input_ids"][0]):
        with refused(air.RuntimeMismatchError, "input_ids", str(list(other.shape)), "[1, 16]", "dynamic=True"):
            step(input_ids=other, labels=other)


def test_another_shape_under_parallelize() -> None:
    model, batch = build("llama-gqa", length=16)
    step = air.parallelize(model, batch, backend="eager", dynamic=False)
    with refused(air.RuntimeMismatchError, "input_ids", "[1, 12]", "[1, 16]"):
        step(**{k: v[:, :12] for k, v in batch.items()})


def test_another_batch_size_of_a_symbolic_length() -> None:
    _, step, batch = emitted(dynamic=True)
    step(**{k: v[:, :12] for k, v in batch.items()})
    with refused(air.RuntimeMismatchError, "input_ids", "[3, 16]"):
        step(**{k: v.repeat(3, 1) for k, v in batch.items()})
    with refused(air.RuntimeMismatchError, "lengths", "12", "16"):
        step(input_ids=batch["input_ids"][:, :12], labels=batch["labels"])


def test_other_arguments(case: Case) -> None:
    _, step, batch = case
    with refused(air.RuntimeMismatchError, "labels"):
        step(input_ids=batch["input_ids"])
    with refused(air.RuntimeMismatchError, "attention_mask"):
        step(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    with refused(air.RuntimeMismatchError, "input_idz"):
        step(input_idz=batch["input_ids"], labels=batch["labels"])


def test_another_constant() -> None:
    model, batch = build("llama-gqa", length=16)
    program = air.capture(model, {**batch, "logits_to_keep": 0})
    step = air.PassManager("canonicalize").run(program).program.emit(backend="eager")
    with refused(air.RuntimeMismatchError, "logits_to_keep", "4"):
        step(**batch, logits_to_keep=4)


def test_a_mask_that_the_program_dropped() -> None:
    model, batch = build("llama-gqa", length=16)
    mask = torch.ones_like(batch["input_ids"])
    program = air.capture(model, {**batch, "attention_mask": mask})
    step = (
        air.PassManager("canonicalize,token-partition,ulysses")
        .run(program, mesh={"sp": 1})
        .program.emit(backend="eager")
    )
    step(**batch, attention_mask=mask)
    mask[:, :4] = 0
    with refused(air.RuntimeMismatchError, "attention_mask", "all ones"):
        step(**batch, attention_mask=mask)


def test_a_mask_that_is_no_longer_ones_is_captured_again() -> None:
    model, batch = build("llama-gqa", length=16)
    mask = torch.ones_like(batch["input_ids"])
    step = air.parallelize(model, {**batch, "attention_mask": mask}, backend="eager")
    mask[:, :4] = 0
    torch.testing.assert_close(
        step(**batch, attention_mask=mask).loss, model(**batch, attention_mask=mask).loss, rtol=1e-5, atol=1e-6
    )


def test_a_parameter_that_was_unfrozen() -> None:
    model, batch = build("llama-gqa", length=16)
    model.get_submodule("lm_head").requires_grad_(False)
    step = air.PassManager("canonicalize").run(air.capture(model, batch)).program.emit(backend="eager")
    step(**batch)
    model.get_submodule("lm_head").requires_grad_(True)
    with refused(air.RuntimeMismatchError, "lm_head.weight", "frozen", "parallelize"):
        step(**batch)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_parameter_that_was_frozen_gets_no_gradient(backend: Any) -> None:
    model, batch = build("llama-gqa", length=16)
    steps = [
        air.PassManager("canonicalize").run(air.capture(model, batch)).program.emit(backend=backend),
        air.parallelize(model, batch, backend=backend),
    ]
    model.get_submodule("lm_head").requires_grad_(False)
    for step in steps:
        model.zero_grad()
        step(**batch).loss.backward()
        assert model.get_parameter("lm_head.weight").grad is None
        assert model.get_parameter("model.embed_tokens.weight").grad is not None


def test_a_parameter_of_another_dtype() -> None:
    model, step, batch = emitted()
    model.get_submodule("lm_head").double()
    with refused(air.RuntimeMismatchError, "lm_head.weight", "float64", "float32"):
        step(**batch)


def test_a_parameter_that_is_gone() -> None:
    model, step, batch = emitted()
    del model.get_submodule("model").embed_tokens
    with refused(air.RuntimeMismatchError, "model.embed_tokens.weight"):
        step(**batch)


def test_another_autocast(case: Case) -> None:
    _, step, batch = case
    words = ("under torch.autocast('cpu', torch.bfloat16)", "under no autocast")
    with torch.autocast("cpu", dtype=torch.bfloat16), refused(air.RuntimeMismatchError, *words):
        step(**batch)


def test_another_autocast_under_parallelize() -> None:
    model, batch = build("plain", length=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = air.parallelize(model, batch, backend="eager", dynamic=False)
        step(**batch)
    with refused(air.RuntimeMismatchError, "under no autocast", "under torch.autocast('cpu', torch.bfloat16)"):
        step(**batch)
    words = ("torch.float16", "torch.bfloat16", "dynamic=False")
    with torch.autocast("cpu", dtype=torch.float16), refused(air.RuntimeMismatchError, *words):
        step(**batch)


def test_another_mode() -> None:
    model, step, batch = emitted()
    model.eval()
    with refused(air.RuntimeMismatchError, "training=True", "other mode", "parallelize"):
        step(**batch)


def test_a_backend_that_does_not_exist(case: Case) -> None:
    model, _, batch = case
    with refused(air.UnsupportedError, "tensorrt", "aot_eager"):
        air.parallelize(model, batch, backend=cast(Any, "tensorrt"))


def test_options_that_do_not_exist_or_go_together(case: Case) -> None:
    model, _, batch = case
    with refused(air.UnsupportedError, "per_step", "per_rank, global"):
        air.parallelize(model, batch, rng=cast(Any, "per_step"))
    with refused(air.PipelineError, "external", "aot_eager"):
        air.parallelize(model, batch, backend="eager", grad_sync="external")


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_model_itself_would_run_twice(kind: str) -> None:
    def doubling(*args: Any) -> None:
        return None

    model, batch = build("plain", length=16)
    register: Callable[..., Any] = getattr(model, kind)
    handle = register(doubling)
    program = air.PassManager("canonicalize").run(air.capture(model, batch)).program
    with refused(air.UnsupportedError, "doubling", "twice", "parallelize()"):
        air.parallelize(model, batch, backend="eager")
    with refused(air.UnsupportedError, "doubling", "twice", "parallelize()"):
        program.emit(backend="eager")
    handle.remove()
    air.parallelize(model, batch, backend="eager")


def test_a_hook_put_on_the_step_runs_once() -> None:
    def doubling(module: nn.Module, args: Any, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": 2 * output["loss"]}

    model, batch = build("plain", length=16)
    expected = model(**batch)["loss"]
    step = air.parallelize(model, batch, backend="eager")
    torch.nn.Module.register_forward_hook(step, doubling)
    other = build("plain", length=24)[1]
    torch.testing.assert_close(step(**batch)["loss"], 2 * expected)
    torch.testing.assert_close(step(**other)["loss"], model(**other)["loss"])


def test_ranks_without_a_process_group(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, batch = case
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(air.RuntimeMismatchError, "WORLD_SIZE is 2", "init_process_group"):
        air.parallelize(model, batch)


def test_a_program_for_several_ranks_without_a_process_group(case: Case) -> None:
    model, _, batch = case
    program = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(model, batch), mesh={"sp": 2}).program
    with refused(air.RuntimeMismatchError, "'sp': 2", "torchrun", "simulate"):
        program.emit()
