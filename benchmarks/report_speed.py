"""What recording costs, and how fast a report answers: `python -m benchmarks.report_speed`; needs Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaConfig, LlamaForCausalLM

import autosp_ir as air
from autosp_ir.viz.recording import Recording
from autosp_ir.viz.report import write_report
from tests.viz.browser import opened, speed_of
from tests.viz.synthetic import synthetic_recording


class TimedRecorder(air.instruments.Recorder):
    """A recorder that adds up the seconds it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def before_pipeline(self, program: air.Program, passes: Sequence[air.Pass]) -> None:
        """Keep the input, timed."""
        start = time.perf_counter()
        super().before_pipeline(program, passes)
        self.seconds += time.perf_counter() - start

    def on_rewrite(self, event: Any) -> None:
        """Keep a rewrite, timed."""
        start = time.perf_counter()
        super().on_rewrite(event)
        self.seconds += time.perf_counter() - start

    def after_pass(self, pass_: air.Pass, program: air.Program, record: Any) -> None:
        """Keep what a pass left, timed."""
        start = time.perf_counter()
        super().after_pass(pass_, program, record)
        self.seconds += time.perf_counter() - start


def large_llama(layers: int) -> air.Program:
    """An 8B-sized Llama without weights, captured at 8,192 tokens."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=1 << 21,
        use_cache=False,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True):
        model = LlamaForCausalLM(config).train()
        ids = torch.zeros(1, 8192, dtype=torch.long)
    torch.set_default_dtype(torch.float32)
    return air.capture(model, {"input_ids": ids, "labels": ids.clone()})


def record(layers: int, decompose: bool) -> tuple[Recording, dict[str, float]]:
    """A recorded default pipeline and what recording cost."""
    program = large_llama(layers)
    recorder = TimedRecorder()
    pipeline = air.DEFAULT_PIPELINE.replace(
        "differentiate", "differentiate{decompose=true}" if decompose else "differentiate"
    )
    start = time.perf_counter()
    result = air.PassManager(pipeline, instruments=[recorder]).run(program, mesh={"sp": 8})
    total = time.perf_counter() - start
    start = time.perf_counter()
    recording = result.trace.recording
    passes = sum(result.timings.values())
    return recording, {
        "pipeline s": total - recorder.seconds,
        "passes alone s": passes,
        "recorder s": recorder.seconds,
        "recorder / pipeline": recorder.seconds / (total - recorder.seconds),
        "recorder / passes alone": recorder.seconds / passes,
        "text, memory and communication afterwards s": time.perf_counter() - start,
    }


def browse(recording: Recording, folder: Path) -> dict[str, float]:
    """Size of the report, and how fast it opens and answers."""
    path = write_report(recording, folder / "report.html")
    with opened(path) as (page, seconds):
        speed = speed_of(page)
    return {
        "nodes": len(recording.program(len(recording.stages) - 1)),
        "rewrites": sum(len(s.rewrites) for s in recording.stages),
        "MB": path.stat().st_size / 1e6,
        "opens s": seconds,
        **{f"{name} ms": value for name, value in speed.items()},
    }


def main(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 32,
    decompose: Annotated[bool, typer.Option(help="Differentiate decomposed, as for Inductor.")] = False,
    save: Annotated[Path | None, typer.Option(help="Also save the recording here.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Record a large Llama, open its report and a synthetic one of 30,000 nodes, and print the figures."""
    recording, cost = record(layers, decompose)
    if save is not None:
        recording.save(save)
    with TemporaryDirectory() as folder:
        figures = {
            f"recording {layers} layers": cost,
            f"report of {layers} layers": browse(recording, Path(folder)),
            "report of 30,000 synthetic nodes": browse(synthetic_recording(30_000, 3_000), Path(folder)),
        }
    for title, rows in figures.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:46} {value:10.3f}")
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
