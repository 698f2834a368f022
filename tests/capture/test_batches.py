"""Batches in, outputs out: names, structures, sequence dimensions, and later calls."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from autosp_ir._torch_compat import TorchDispatchMode
from autosp_ir.capture.facts import check_facts, facts_of
from autosp_ir.capture.info import CaptureInfo
from autosp_ir.capture.outputs import choose_outputs, describe_output, keep, rebuild
from autosp_ir.capture.program import capture
from autosp_ir.capture.seq_dims import resolve_seq_dims
from autosp_ir.errors import CaptureError, RuntimeMismatchError, UnsupportedError
from autosp_ir.sim.lockstep import simulate
from tests.models import build, llama, plain_decoder

torch.set_num_threads(1)

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Record:
    """An output in a dataclass."""

    value: Any
    note: str


T = [torch.tensor(float(i)) for i in range(4)]


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (T[0], ["out0"]),
        ((T[0], T[1]), ["out0", "out1"]),
        ({"loss": T[0], "hidden": (T[1], T[2])}, ["loss", "hidden.0", "hidden.1"]),
        ((T[0], {"a": T[1]}), ["out0", "out1.a"]),
        (Pair(T[0], [T[1]]), ["first", "second.0"]),
        (Record(T[0], "kept"), ["value"]),
        ({"loss": T[0], "step": 3}, ["loss"]),
    ],
)
def test_outputs_are_named_and_rebuilt(output: Any, names: list[str]) -> None:
    structure, tensors = describe_output(output)
    assert list(tensors) == names
    assert rebuild(structure, tensors) == output


def test_dropped_outputs() -> None:
    structure, tensors = describe_output((T[0], T[1]))
    kept = keep(structure, ["out1"])
    assert kept is not None and rebuild(kept, tensors) == (None, T[1])
    structure, tensors = describe_output({"loss": T[0], "logits": T[1]})
    kept = keep(structure, ["loss"])
    assert kept is not None and rebuild(kept, tensors) == {"loss": T[0]}


def test_choice_of_outputs() -> None:
    assert choose_outputs(["loss", "logits"], None) == ["loss"]
    assert choose_outputs(["out0", "out1"], None) == ["out0", "out1"]
    assert choose_outputs(["loss", "logits"], ["logits"]) == ["logits"]
    with pytest.raises(CaptureError, match="no output called logit"):
        choose_outputs(["loss", "logits"], ["logit"])


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cache is a object"):
        describe_output({"cache": object()})


def test_transformers_output_type_is_kept() -> None:
    model, batch = llama(length=16)
    program = capture(model, batch)
    rebuilt = program.capture.rebuild({"loss": T[1]})
    assert type(rebuilt).__name__ == "CausalLMOutputWithPast"
    assert rebuilt.loss is T[1] and rebuilt.logits is None
    both = capture(model, batch, outputs=["loss", "logits"])
    assert [s.target for s in both.signature.outputs] == ["loss", "logits"]


def test_loss_outside_the_model() -> None:
    model, batch = plain_decoder(length=16)
    targets = batch.pop("targets")

    def loss_fn(outputs: Any, given: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), given["idx"].flatten())

    program = capture(model, batch, loss_fn=loss_fn)
    assert [s.target for s in program.signature.outputs] == ["loss"]
    expected = loss_fn(model(**batch), batch)
    torch.testing.assert_close(simulate(program, batch).loss, expected.detach())
    assert program.capture.rebuild({"loss": T[1]}) == {"loss": T[1]}
    with pytest.raises(CaptureError, match="without dimensions"):
        capture(model, batch, loss_fn=lambda outputs, given: outputs["logits"])
    assert targets.shape == batch["idx"].shape


def test_loss_of_a_plain_tensor_is_returned_alone() -> None:
    model = nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 97))
    ids = torch.randint(0, 97, (2, 12))
    program = capture(model, (ids,), loss_fn=lambda logits, batch: logits.square().mean())
    assert program.capture.rebuild({"loss": T[2]}) is T[2]
    torch.testing.assert_close(simulate(program, (ids,)).loss, model(ids).square().mean().detach())


def test_positional_and_keyword_batches_are_the_same_call() -> None:
    model, batch = plain_decoder(length=16)
    program = capture(model, (batch["idx"], batch["targets"]))
    info = program.capture
    assert info.input_names == ["idx", "targets"]
    mixed = info.flatten((batch["idx"],), {"targets": batch["targets"]})
    assert mixed[0] is batch["idx"] and mixed[1] is batch["targets"]
    torch.testing.assert_close(simulate(program, batch).loss, model(**batch)["loss"].detach())


class Nested(nn.Module):
    """Takes containers and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, features: dict[str, list[Tensor]], *more: Tensor, scale: float = 1.0, **extra: Any) -> Tensor:
        """Sum what is given."""
        total: Tensor = self.linear(features["a"][0]) * scale + sum(more)
        return total + extra["bonus"] if "bonus" in extra else total


def test_nested_arguments() -> None:
    model, x = Nested(), torch.randn(2, 6, 4)
    batch = {"features": {"a": [x]}, "scale": 2.0, "bonus": x}
    program = capture(model, batch, seq_dims={"features.a.0": 1, "bonus": 1})
    assert program.capture.input_names == ["features.a.0", "bonus"]
    assert program.capture.constants == {"scale": 2.0}
    positional = capture(model, ({"a": [x]}, x, x + 1), seq_dims={"features.a.0": 1})
    assert positional.capture.input_names == ["features.a.0", "more.0", "more.1"]
    found = simulate(positional, ({"a": [x]}, x, x + 1), gradients=False).outputs[0]["out0"]
    torch.testing.assert_close(found, model({"a": [x]}, x, x + 1).detach())


def test_later_batches_are_checked() -> None:
    model, batch = llama(length=16)
    info = capture(model, {**batch, "return_dict": True}).capture
    ids, labels = batch["input_ids"], batch["labels"]
    info.check(info.flatten((), {**batch, "return_dict": True}))
    with pytest.raises(RuntimeMismatchError, match="return_dict"):
        info.flatten((), {**batch, "return_dict": False})
    with pytest.raises(RuntimeMismatchError, match="missing \\['labels'\\]"):
        info.flatten((), {"input_ids": ids, "return_dict": True})
    with pytest.raises(RuntimeMismatchError, match=r"torch\.int32"):
        info.check([ids.int(), labels])
    with pytest.raises(RuntimeMismatchError, match="captured for"):
        info.check([ids[:, :8], labels[:, :8]])


def test_dynamic_batches_are_checked() -> None:
    model, batch = llama(length=16)
    info = capture(model, batch, dynamic=True).capture
    ids, labels = batch["input_ids"], batch["labels"]
    info.check([ids[:, :8], labels[:, :8]])
    with pytest.raises(RuntimeMismatchError, match="different sequence lengths"):
        info.check([ids[:, :8], labels[:, :9]])
    with pytest.raises(RuntimeMismatchError, match="captured for"):
        info.check([ids.repeat(2, 1), labels.repeat(2, 1)])
    with pytest.raises(RuntimeMismatchError, match="outside"):
        info.check([ids[:, :2], labels[:, :2]])


IDS, FLOATS = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, 8)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"input_ids": IDS, "labels": IDS, "position_ids": IDS[:1]}, {"input_ids": 1, "labels": 1, "position_ids": 1}),
        ({"input_ids": IDS, "labels": IDS[:, 0]}, {"input_ids": 1}),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, {"input_ids": 1}),
        ({"inputs_embeds": FLOATS, "labels": IDS}, {"inputs_embeds": 1, "labels": 1}),
        ({"x": IDS, "y": IDS}, {"x": 1, "y": 1}),
        ({"x": FLOATS, "y": IDS}, {"x": 1, "y": 1}),
        ({"x": IDS[0], "y": IDS[0]}, {"x": 0, "y": 0}),
    ],
)
def test_sequence_dimensions_are_inferred(tensors: dict[str, Tensor], expected: dict[str, int]) -> None:
    assert resolve_seq_dims(tensors, None) == expected


@pytest.mark.parametrize(
    "tensors", [{"x": FLOATS}, {"x": IDS, "y": IDS[:, :3]}, {"x": FLOATS, "y": torch.zeros(2, 3, 8)}]
)
def test_ambiguous_sequence_dimensions_are_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"candidates are x.*\n.*seq_dims=\{\"x\": 1"):
        resolve_seq_dims(tensors, None)


@pytest.mark.parametrize(
    ("seq_dims", "words"),
    [({"z": 1}, "not a tensor"), ({"x": 5}, "dimension 5"), ({"x": 1, "y": 0}, "different lengths"), ({}, "empty")],
)
def test_wrong_sequence_dimensions_are_refused(seq_dims: dict[str, int], words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        resolve_seq_dims({"x": IDS, "y": IDS}, seq_dims)
    assert resolve_seq_dims({"x": FLOATS}, {"x": -2}) == {"x": 1}


def test_facts_of_a_batch() -> None:
    tensors = {
        "ones": torch.ones(2, 4, dtype=torch.bool),
        "positions": torch.arange(4).expand(2, 4),
        "ids": IDS + torch.tensor([0, 3, 1, 1, 2, 0]),
        "floats": torch.ones(3),
        "fake": torch.ones(2, 4, dtype=torch.int64, device="meta"),
    }
    assert facts_of(tensors) == {"ones": "ones", "positions": "arange"}


def test_facts_are_looked_up_on_the_device_once() -> None:
    """Each look waits for all that is queued there."""
    tensors = {name: torch.arange(4) for name in "abc"} | {"mask": torch.ones(4, dtype=torch.bool)}
    looks = Looks()
    with looks:
        found = facts_of(tensors)
        check_facts(found, tensors)
    assert found == {"a": "arange", "b": "arange", "c": "arange", "mask": "ones"} and looks.count <= 2
    with pytest.raises(RuntimeMismatchError, match="'c' must count"):
        check_facts(found, tensors | {"c": torch.zeros(4, dtype=torch.int64)})


class Looks(TorchDispatchMode):
    """Counts values that the host reads one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_batches_that_do_not_fit_are_refused() -> None:
    model, batch = build("plain", length=16)
    with pytest.raises(CaptureError, match="does not fit"):
        capture(model, {"ids": batch["idx"]})
    with pytest.raises(CaptureError, match="no tensor"):
        capture(Nested(), {"features": {}})
    with pytest.raises(CaptureError, match="not set"):
        capture(model, cast(Any, {1, 2}))


class ChecksIds(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        torch._check(ids.max().item() <= 96)
        return ids * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_number_that_the_model_reads_is_not_taken_for_the_length(dynamic: bool) -> None:
    ids = torch.arange(12).reshape(1, 12)
    program = capture(ChecksIds(), (ids,), dynamic=dynamic)
    assert isinstance(program.capture, CaptureInfo)
    low, high = program.capture.seq_range
    assert 1 <= low <= 12 and (high is None or high >= 12)
