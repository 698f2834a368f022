"""Run the demonstration and show what it found."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from autosp_ir.capture.program import capture
from autosp_ir.demo.ranks import train_on_ranks
from autosp_ir.demo.workload import History, Workload, batch_of, build_model, train
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.manager import PassManager
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE
from autosp_ir.sim.lockstep import Simulation, simulate
from autosp_ir.viz.rewrite_picture import rewrite_svg

GRADIENT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-4
"""Relative; AdamW amplifies rounding over the steps."""


@dataclass(frozen=True)
class Findings:
    """What the demonstration measured.

    Args:
        ranks: Number of ranks of the parallel run.
        dense_losses: Loss of every step, one process.
        parallel_losses: Loss of every step, sequence-parallel.
        gradient_error: Largest gradient error of the first step, relative to each parameter's largest gradient.
        worst_parameter: The parameter it occurred in.
        dense_bytes: Peak activation bytes of one step, one process.
        parallel_bytes: Peak activation bytes of one step, per rank.
        collectives: Collectives of one step: operation -> (count, payload bytes sent per rank).
        layers: Decoder layers.
    """

    ranks: int
    dense_losses: list[float]
    parallel_losses: list[float]
    gradient_error: float
    worst_parameter: str
    dense_bytes: int
    parallel_bytes: int
    collectives: dict[str, tuple[int, int]]
    layers: int

    @property
    def loss_error(self) -> float:
        """Largest relative difference between the two runs' losses."""
        pairs = zip(self.dense_losses, self.parallel_losses, strict=True)
        return max(abs(d - p) / abs(d) for d, p in pairs)

    @property
    def agrees(self) -> bool:
        """Whether the two runs are the same training run."""
        return self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE


def run_demo(folder: Path, ranks: int, workload: Workload, console: Console) -> Findings:
    """Train dense and sequence-parallel, compare, and write pictures and IR to `folder`.

    Args:
        folder: Created if missing.
        ranks: Processes of the parallel run.
        workload: Sizes.
        console: Where progress and the table go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        dense = _train_dense(workload, progress)
        parallel = _train_parallel(workload, ranks, progress)
        task = progress.add_task("simulating and drawing", total=4)
        captured = capture(build_model(workload), batch_of(workload, 0))
        progress.advance(task)
        result = PassManager(DEFAULT_PIPELINE).run(captured, mesh={"sp": ranks})
        progress.advance(task)
        simulations = _simulate(captured, result.program, workload)
        progress.advance(task)
        _write_ir(folder, captured, ranks)
        findings = _findings(workload, ranks, dense, parallel, *simulations)
        _plot_losses(findings, folder / "loss.png")
        progress.advance(task)
    (folder / "findings.json").write_text(json.dumps(asdict(findings) | {"agrees": findings.agrees}, indent=2))
    return findings


def _train_dense(workload: Workload, progress: Progress) -> History:
    torch.manual_seed(workload.seed)
    model = build_model(workload)
    task = progress.add_task("dense, one process", total=workload.steps)
    return train(model, model, workload, lambda step, loss: progress.update(task, completed=step + 1))


def _train_parallel(workload: Workload, ranks: int, progress: Progress) -> History:
    task = progress.add_task(f"sequence-parallel, {ranks} gloo ranks", total=workload.steps)
    with tempfile.TemporaryDirectory() as scratch:
        history = train_on_ranks(workload, ranks, Path(scratch), lambda done: progress.update(task, completed=done))
    progress.update(task, completed=workload.steps)
    return history


def _simulate(captured: Program, parallel: Program, workload: Workload) -> tuple[Simulation, Simulation]:
    dense = PassManager(DEFAULT_PIPELINE).run(captured, mesh={"sp": 1}).program
    batch = batch_of(workload, 0)
    return simulate(dense, batch), simulate(parallel, batch)


def _findings(
    workload: Workload, ranks: int, dense: History, parallel: History, one: Simulation, many: Simulation
) -> Findings:
    errors = {
        name: float((gradient - parallel.gradients[name]).abs().max() / gradient.abs().max().clamp_min(1e-30))
        for name, gradient in dense.gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    counts: Counter[str] = Counter(record.op for record in many.comm)
    sent: Counter[str] = Counter()
    for record in many.comm:
        sent[record.op] += record.bytes
    return Findings(
        ranks=ranks,
        dense_losses=dense.losses,
        parallel_losses=parallel.losses,
        gradient_error=errors[worst],
        worst_parameter=worst,
        dense_bytes=max(one.peak_bytes),
        parallel_bytes=max(many.peak_bytes),
        collectives={op: (counts[op], sent[op]) for op in counts},
        layers=workload.layers,
    )


def _write_ir(folder: Path, captured: Program, ranks: int) -> None:
    before = PassManager("canonicalize").run(captured, mesh={"sp": ranks}).program
    after = PassManager("pad-tokens,token-partition,ulysses").run(before, mesh={"sp": ranks}).program
    lowered = PassManager(DEFAULT_PIPELINE).run(captured, mesh={"sp": ranks}).program
    (folder / "before.ir").write_text(str(before))
    (folder / "after.ir").write_text(str(after))
    (folder / "lowered.ir").write_text(str(lowered))
    (folder / "rewrite.svg").write_text(rewrite_svg(before, after, module="model.layers.0.self_attn"))


def _plot_losses(findings: Findings, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(findings.dense_losses, color="0.6", linewidth=4, label="dense, one process")
    axes.plot(findings.parallel_losses, "k--", linewidth=1.2, label=f"sequence-parallel, {findings.ranks} ranks")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def findings_table(findings: Findings) -> Table:
    """The findings as one table."""
    table = Table(title=f"One sequence on {findings.ranks} ranks against one process", title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("parallel", justify="right")
    pairs = list(zip(findings.dense_losses, findings.parallel_losses, strict=True))
    for step, (dense, parallel) in enumerate(pairs):
        table.add_row(f"loss, step {step + 1}", f"{dense:.6f}", f"{parallel:.6f}")
    table.add_section()
    table.add_row("largest loss difference, relative", "", f"{findings.loss_error:.1e}")
    table.add_row(
        f"largest gradient error, relative\n({findings.worst_parameter})", "", f"{findings.gradient_error:.1e}"
    )
    table.add_section()
    table.add_row("peak activation bytes per rank", f"{findings.dense_bytes:,}", f"{findings.parallel_bytes:,}")
    table.add_section()
    for op, (count, sent) in findings.collectives.items():
        table.add_row(f"{op}: count, bytes sent per rank", "0", f"{count}, {sent:,}")
    exchanges = [(c, b) for op, (c, b) in findings.collectives.items() if "all_to_all" in op]
    count, sent = (sum(x) for x in zip(*exchanges, strict=True)) if exchanges else (0, 0)
    table.add_row(
        "attention exchanges per layer: count, bytes", "0", f"{count // findings.layers}, {sent // findings.layers:,}"
    )
    return table
