"""Predictions: the ladder takes less memory from rung to rung, fused estimates hold, and a budget chooses."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import autosp_ir as air
from autosp_ir.analysis.fused import Fusion, fused_liveness
from autosp_ir.analysis.liveness import liveness
from autosp_ir.capture.from_config import model_from_config
from autosp_ir.cli import app
from autosp_ir.cli_plan import _longest
from autosp_ir.emit import room
from autosp_ir.emit.parallelize import default_pipeline
from autosp_ir.emit.room import Room, host_free, room_found
from autosp_ir.pipeline.registry import parse_pipeline
from autosp_ir.plan import Prediction, fitting, plan, rungs
from autosp_ir.rewrite.builder import ProgramBuilder
from autosp_ir.testing import DenseReference
from tests.passes.test_tile import wide

torch.set_num_threads(1)
# The package's attribute of this name is the function.
parallelize = importlib.import_module("autosp_ir.emit.parallelize")
LLAMA = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def default() -> list[air.Pass]:
    return parse_pipeline(default_pipeline(backend="inductor"))


@pytest.fixture(scope="module")
def predictions() -> list[tuple[Prediction, air.PassResult]]:
    model, batch = model_from_config(LLAMA, length=32768, batch_size=1, dtype=torch.bfloat16, fake=True)
    return list(plan(air.capture(model, batch), {"sp": 2}, default(), host=2**30))


@pytest.fixture(scope="module")
def on_device(predictions: list[tuple[Prediction, air.PassResult]]) -> list[Prediction]:
    """Those that use no host memory."""
    return [p for p, _ in predictions if not p.host_bytes]


def test_every_rung_takes_less_memory_and_keeps_its_name(on_device: list[Prediction]) -> None:
    peaks = [p.peak_bytes for p in on_device]
    assert peaks[0] > 1.5 * peaks[1] > 1.5 * peaks[2]
    assert peaks[3] < 1.1 * peaks[2]
    for prediction in on_device:
        assert 0 < prediction.saved_bytes < prediction.peak_bytes
        assert 0 <= prediction.exposed_seconds < prediction.seconds
        assert sum(prediction.at_peak.values()) == prediction.peak_bytes and min(prediction.at_peak.values()) >= 0
        parse_pipeline(prediction.pipeline)


def test_host_memory_adds_rungs_that_recompute_less(
    predictions: list[tuple[Prediction, air.PassResult]], on_device: list[Prediction]
) -> None:
    assert [r.name for r in rungs(default(), 16384)] == [p.name for p in on_device]
    for (before, _), (after, _) in itertools.pairwise(predictions):
        if before.host_bytes:
            assert after.name in before.name, "next to the rung that does without"
            assert before.seconds <= after.seconds and 0 < before.host_bytes <= 2**30
            assert "overlap{memory=1.0 fused=true},offload{host=1073741824}" in before.pipeline


def test_the_longest_context_fills_device_and_host() -> None:
    prediction = Prediction("", "", 40, 10, 10, 20, 1.0, 0.0, ())
    assert _longest(prediction, 60, 1000, 100) == 200, "20 of 40 grow with the tokens"
    assert _longest(prediction, 60, 30, 100) == (60 - 20 + 30) * 100 // 40, "the host is full at 150 tokens"
    assert _longest(replace(prediction, host_bytes=0), 60, 0, 100) == 200


def test_fusion_leaves_out_what_nothing_else_reads() -> None:
    b = ProgramBuilder()
    x = b.input("x", (64, 64))
    w = b.input("w", (64, 64))
    wide_ = b.call("aten.exp", (x,))
    other = b.call("aten.sin", (x,))
    doubled = b.call("aten.mul.Tensor", (wide_, other))
    made = b.call("aten.mm", (doubled, w))
    b.output(made)
    program = b.build()
    fusion = Fusion(program)
    absent = {s.node.name for s in fusion.absent}
    assert absent == {wide_.name, other.name}
    assert {s.node.name for s in fusion.reads[doubled.producer]} == {"x"}
    assert fused_liveness(fusion).peak_bytes == 2 * 64 * 64 * 4 < liveness(program).peak_bytes


def test_a_reduction_holds_nothing_until_its_place_in_the_program() -> None:
    """The gradient of a norm's weight stands at the end of a schedule, and is computed where its operands are."""
    b = ProgramBuilder()
    x = b.input("x", (64, 64))
    made = b.call("aten.mm", (x, x))
    narrow = b.input("narrow", (64, 1))
    other = b.call("aten.mm", (made, narrow))
    more = b.call("aten.mm", (x, x))
    summed = b.call("aten.sum.dim_IntList", (made, [0]))
    b.output(other, b.call("aten.mm", (more, narrow)), summed)
    fusion = Fusion(b.build())
    held = {s.node.name: last for s, last in fusion.lifetimes().items()}
    assert held[made.name] is other.producer, "not the sum, which comes after another product"
    assert fused_liveness(fusion).peak_bytes < 2 * 64 * 64 * 4


def test_the_ladder_needs_a_backward() -> None:
    with pytest.raises(air.PipelineError, match="no differentiate, remat"):
        rungs(parse_pipeline("canonicalize,pad-tokens"), 64)


def test_a_budget_that_nothing_meets_names_the_least_peak(predictions: list[tuple[Prediction, air.PassResult]]) -> None:
    with pytest.raises(air.UnsupportedError, match=r"the least is 0\.\d+ GiB \(loss and MLPs"):
        fitting(iter(predictions), 1 << 20)
    least, _ = fitting(iter(predictions), 1 << 20, or_least=True)
    assert least.peak_bytes == min(p.peak_bytes for p, _ in predictions)


@pytest.mark.parametrize("host", [0, 2**30])
def test_every_rung_is_exact(host: int) -> None:
    model, batch = wide()
    reference = DenseReference.of(model, batch)
    for prediction, result in plan(reference.program, {"sp": 2}, default(), host=host):
        if not host or "host" in prediction.name:
            reference.check(result.program)


@pytest.mark.parametrize("factor", [10.0, 0.9])
def test_a_step_within_a_budget_equals_dense(factor: float, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = wide(length=256)
    loss = model(**batch)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    passes = parse_pipeline(default_pipeline())
    first, _ = next(plan(air.capture(model, batch), {"sp": 1}, passes, fused=False))
    with caplog.at_level("INFO", logger="autosp_ir.emit"):
        step = air.parallelize(model, batch, backend="aot_eager", memory_budget=first.peak_bytes * factor)
    assert ("default" in caplog.text) == (factor > 1)
    step(**batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_budget_goes_with_no_pipeline_and_not_with_eager() -> None:
    model, batch = wide()
    with pytest.raises(air.PipelineError, match="both a pipeline and a memory_budget"):
        air.parallelize(model, batch, memory_budget=1e9, pipeline="canonicalize")
    with pytest.raises(air.PipelineError, match="memory_budget needs the backward"):
        air.parallelize(model, batch, memory_budget=1e9, backend="eager")
    with pytest.raises(air.PipelineError, match="is none"):
        air.parallelize(model, batch, memory_budget=0, backend="aot_eager")
    with pytest.raises(air.UnsupportedError, match="no pipeline keeps a step within"):
        air.parallelize(model, batch, memory_budget=1e3, backend="aot_eager")


def test_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    arguments = ["plan", str(path), "--length", "32768", "--dtype", "bfloat16", "--gpus", "2", "--memory", "0.15"]
    picture = tmp_path / "memory.svg"
    shown = CliRunner().invoke(
        app, [*arguments, "--picture", str(picture)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert shown.exit_code == 0, shown.output
    assert "loss and MLPs in chunks" in shown.stdout and "early-loss-gradient" in shown.stdout.splitlines()[-1]
    assert picture.read_text().count("<polyline") == 4
    found = CliRunner().invoke(app, [*arguments[:-2], "--memory", "0.001", "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["fits"] is None and len(json.loads(found.stdout)["pipelines"]) == 4
    refused = CliRunner().invoke(app, [*arguments, "--device", "abacus"])
    assert refused.exit_code and "no device 'abacus'" in str(refused.exception)


def test_without_a_gpu_no_memory_is_found() -> None:
    assert room_found(wide()[0], None, "sp") is None


def test_free_memory_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(room, "_MEMINFO", meminfo)
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert host_free() == 0
    meminfo.write_text("MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    assert host_free() == 1024_000
    (tmp_path / "memory.current").write_text("400000\n")
    for limit, free in (("max", 1024_000), ("1000000", 600_000), ("100", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert host_free() == free


@pytest.mark.parametrize(
    ("given", "found", "used"), [(5.0, None, 5.0), (None, None, 0.0), (None, 7.0, 7.0), (0, 7.0, 0.0)]
)
def test_host_memory_that_is_given_or_found(given: float | None, found: float | None, used: float) -> None:
    model, batch = wide()
    here = None if found is None else Room(1e12, found)
    with (
        mock.patch.object(parallelize, "room_found", return_value=here),
        mock.patch.object(room, "plan", wraps=plan) as planned,
    ):
        air.parallelize(model, batch, backend="aot_eager", memory_budget=1e12, host_memory=given)
    assert planned.call_args.kwargs["host"] == used


def test_host_memory_that_makes_no_sense() -> None:
    model, batch = wide()
    with pytest.raises(air.PipelineError, match="host_memory of -1 bytes"):
        air.parallelize(model, batch, host_memory=-1)
    with pytest.raises(air.PipelineError, match="the pipeline says what is offloaded"):
        air.parallelize(model, batch, host_memory=2**30, pipeline="canonicalize")


def test_what_a_gpu_has_free_decides(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = wide()
    chosen: list[str] = []
    for found in (Room(1e12, 0.0), Room(1.0, 0.0), None):
        caplog.clear()
        with (
            mock.patch.object(parallelize, "room_found", return_value=found),
            caplog.at_level(logging.INFO, "autosp_ir.emit"),
        ):
            air.parallelize(model, batch, backend="aot_eager")
        chosen.append(caplog.text)
    assert "default" in chosen[0] and "WARNING" not in chosen[0]
    assert "WARNING" in chosen[1] and "chunks" in chosen[1], "none fits: the least, and a warning"
    assert "predicted" not in chosen[2]
