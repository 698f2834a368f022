"""The emitted module works where people put modules. One rank, no process group."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from autosp_ir.emit.parallelize import Backend
from tests.emit.steps import gradients, largest_error, loss_of, measure
from tests.models import build

_BACKENDS: tuple[Backend, ...] = ("eager", "aot_eager")


@pytest.fixture(params=_BACKENDS)
def llama(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    model, batch = build("llama-gqa", length=32)
    return model, air.parallelize(model, batch, backend=request.param), batch


def test_is_the_model_in_all_but_forward(llama: Any) -> None:
    model, step, _ = llama
    assert isinstance(step, type(model))
    assert inspect.signature(step.forward) == inspect.signature(model.forward)
    assert list(step.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(step.parameters(), model.parameters(), strict=True))
    assert step.config is model.config
    with pytest.raises(AttributeError):
        _ = step.no_such_attribute


def test_output_has_the_models_type_and_the_loss_alone(llama: Any) -> None:
    model, step, batch = llama
    output = step(**batch)
    assert type(output) is type(model(**batch))
    assert list(output) == ["loss"]


def test_positional_and_keyword_calls(llama: Any) -> None:
    _, step, batch = llama
    by_name = step(**batch).loss
    by_position = step(batch["input_ids"], labels=batch["labels"]).loss
    assert torch.equal(by_name, by_position)


def test_save_pretrained_loads_into_the_model_class(llama: Any, tmp_path: Path) -> None:
    model, step, batch = llama
    step.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.train()(**batch).loss, model(**batch).loss)


def test_clipping_and_scaling(llama: Any) -> None:
    model, step, batch = llama
    _, expected = measure(model, model, batch)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-3)
    scaler.scale(loss_of(step(**batch))).backward()
    scaler.unscale_(optimizer)
    assert largest_error(gradients(model), expected) <= 1e-5
    norm = torch.nn.utils.clip_grad_norm_(step.parameters(), 0.1)
    total = torch.sqrt(sum((g.square().sum() for g in expected.values()), torch.zeros(())))
    assert torch.allclose(norm, total, rtol=1e-5)
    scaler.step(optimizer)


def test_train_eval_and_no_grad(llama: Any) -> None:
    model, step, batch = llama
    with torch.no_grad():
        assert not step(**batch).loss.requires_grad
    step.eval()
    assert not model.training
    assert torch.allclose(step(**batch).loss, model(**batch).loss, rtol=1e-5)
    step.train()
    assert model.training
    assert step(**batch).loss.requires_grad


def test_gradients_accumulate(llama: Any) -> None:
    model, step, batch = llama
    _, once = measure(model, model, batch)
    model.zero_grad()
    for _ in range(2):
        step(**batch).loss.backward()
    assert largest_error({n: g / 2 for n, g in gradients(model).items()}, once) <= 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_retained_graph_can_be_walked_again(backend: Backend) -> None:
    model, batch = build("llama-gqa", length=32)
    _, once = measure(model, model, batch)
    model.zero_grad()
    loss = loss_of(air.parallelize(model, batch, backend=backend)(**batch))
    loss.backward(retain_graph=True)
    loss.backward()
    assert largest_error({n: g / 2 for n, g in gradients(model).items()}, once) <= 1e-5


def test_a_copy_owns_its_parameters(llama: Any) -> None:
    model, step, batch = llama
    before = step(**batch).loss.detach().clone()
    twin = copy.deepcopy(step)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(step(**batch).loss.detach(), before)
    assert not torch.equal(twin(**batch).loss.detach(), before)
    del model


def test_frozen_parameters_get_no_gradient() -> None:
    model, batch = build("llama-gqa", length=32)
    model.get_submodule("model.embed_tokens").requires_grad_(False)
    _, expected = measure(model, model, batch)
    step = air.parallelize(model, batch, backend="aot_eager")
    _, found = measure(model, step, batch)
    assert found.keys() == expected.keys()
    assert largest_error(found, expected) <= 1e-5


def test_unfreezing_captures_again() -> None:
    model, batch = build("llama-gqa", length=32)
    embedding = model.get_submodule("model.embed_tokens")
    embedding.requires_grad_(False)
    step = air.parallelize(model, batch, backend="aot_eager")
    embedding.requires_grad_(True)
    _, expected = measure(model, model, batch)
    _, found = measure(model, step, batch)
    assert largest_error(found, expected) <= 1e-5


def test_two_programs_in_one_process() -> None:
    first, first_batch = build("llama-gqa", length=32)
    second, second_batch = build("gpt2", length=32)
    steps = [air.parallelize(m, b, backend="aot_eager") for m, b in ((first, first_batch), (second, second_batch))]
    for model, step, batch in zip((first, second), steps, (first_batch, second_batch), strict=True):
        _, expected = measure(model, model, batch)
        _, found = measure(model, step, batch)
        assert largest_error(found, expected) <= 1e-5


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.middle(self.embed(ids)).tanh()).square().mean()}

    def untie(self, how: str) -> None:
        if how == "another parameter":
            self.head.weight = nn.Parameter(2 * self.head.weight.detach())
            return
        loaded = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        loaded["head.weight"] *= 2
        self.load_state_dict(loaded, assign=True)


@pytest.mark.parametrize("how", ["another parameter", "a checkpoint"])
def test_parameters_that_are_tied_no_longer_make_another_program(how: str) -> None:
    model, batch = Tied(), {"ids": torch.arange(8)[None]}
    step = air.parallelize(model, batch, backend="aot_eager", seq_dims={"ids": 1})
    fixed = air.emit(air.capture(model, batch, seq_dims={"ids": 1}))
    step(**batch)["loss"].backward()
    model.untie(how)
    with pytest.raises(air.RuntimeMismatchError, match="tied or untied"):
        fixed(**batch)
    dense, expected = measure(model, model, batch)
    loss, found = measure(model, step, batch)
    assert "head.weight" in found and largest_error(found, expected) <= 1e-5
    assert loss == pytest.approx(dense, rel=1e-5)


def test_buffers_that_are_shared_no_longer_make_another_program() -> None:
    model, batch = Tied(), {"ids": torch.arange(8)[None]}
    scale = torch.ones(4)
    for module in (model.embed, model.middle):
        module.register_buffer("scale", scale)
        module.register_forward_hook(lambda m, _, out: out * m.scale)
    step = air.parallelize(model, batch, backend="aot_eager", seq_dims={"ids": 1})
    step(**batch)["loss"].backward()
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded["middle.scale"] *= 3
    model.load_state_dict(loaded, assign=True)
    dense, expected = measure(model, model, batch)
    loss, found = measure(model, step, batch)
    assert loss == pytest.approx(dense, rel=1e-5) and largest_error(found, expected) <= 1e-5


def test_emit_refuses_other_shapes_and_modes() -> None:
    model, batch = build("llama-gqa", length=32)
    result = air.PassManager(air.DEFAULT_PIPELINE).run(air.capture(model, batch), mesh={"sp": 1})
    step = result.program.emit()
    assert torch.allclose(step(**batch).loss, model(**batch).loss, rtol=1e-5)
    _, longer = build("llama-gqa", length=40)
    with pytest.raises(air.RuntimeMismatchError, match="input_ids"):
        step(**longer)
    with pytest.raises(air.RuntimeMismatchError, match="int32"):
        step(**{k: v.int() for k, v in batch.items()})
    step.eval()
    with pytest.raises(air.RuntimeMismatchError, match="training"):
        step(**batch)


def test_emit_finishes_a_forward_program() -> None:
    model, batch = build("llama-gqa", length=32)
    forward = air.PassManager("canonicalize,pad-tokens,token-partition,ulysses")
    program = forward.run(air.capture(model, batch), mesh={"sp": 1}).program
    _, expected = measure(model, model, batch)
    for backend in _BACKENDS:
        _, found = measure(model, program.emit(backend=backend), batch)
        assert largest_error(found, expected) <= 1e-5


class Logged(nn.Module):
    """A loss, and numbers for the log."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.loss: Tensor
        self.register_buffer("loss", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        loss = x.square().mean()
        self.loss.copy_(loss.detach())
        return {"loss": loss, "logged": loss.detach(), "peak": x.detach().amax(), "norm": x.norm()}


@pytest.mark.parametrize("backend", _BACKENDS)
def test_what_the_model_detaches_asks_for_no_gradient(backend: Backend) -> None:
    """As in the model, where adding it to the loss changes nothing and calling its backward fails."""
    model, batch = Logged(), {"input_ids": torch.arange(16)[None]}
    names = ["loss", "logged", "peak", "norm"]
    program = air.capture(model, batch, outputs=names)
    pipeline = "canonicalize" if backend == "eager" else "canonicalize,differentiate,remat,lower-comm"
    step = air.PassManager(pipeline).run(program, mesh={}).program.emit(backend=backend)
    results: list[Tensor] = []
    for module in (model, step):
        out = module(**batch)
        assert {n for n in names if out[n].requires_grad} == {"loss", "norm"}
        (out["loss"] * out["logged"] + out["peak"] + 0.1 * out["norm"]).backward()
        grad = model.embed.weight.grad
        assert grad is not None
        results.append(grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*results)
