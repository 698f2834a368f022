"""`autosp-ir plan`: how much memory and time a step will take on GPUs that need not be here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from autosp_ir.cli_io import CONFIG_SUFFIX, dtype_named, pairs, read_model
from autosp_ir.errors import AutoSPError
from autosp_ir.plan.predict import Prediction

_GIB = 2**30


def plan(
    model: Annotated[str, typer.Argument(help="config.json, or package.module:factory returning (model, batch).")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that share one sequence.")] = 2,
    memory: Annotated[float, typer.Option("--memory", help="GiB that a step may take on each.")] = 80.0,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens per sequence.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences, for a config.json.")] = 1,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of weights and inputs, such as bfloat16.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a config entry, such as num_hidden_layers=2; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="What computes: h100, h200, a100 or cpu.")] = "h100",
    link: Annotated[
        str, typer.Option("--link", help="What connects them: nvlink4, nvlink3, pcie5, pcie or network-400g.")
    ] = "nvlink4",
    host_memory: Annotated[
        float,
        typer.Option("--host-memory", min=0, help="GiB of host memory that each rank may pin."),
    ] = 0.0,
    backend: Annotated[str, typer.Option("--backend", help="inductor or aot_eager.")] = "inductor",
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the memory of each pipeline over a step, as SVG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Predict peak memory, step time and longest context of each pipeline, and name the first that fits.

    Nothing runs on a GPU, and a config.json gets fake weights: a 70B model is planned on a laptop. Exits with 1 when no
    pipeline fits.
    """
    if backend not in ("inductor", "aot_eager"):
        raise AutoSPError(f"there is no plan for backend {backend!r}", hint="choose inductor or aot_eager")
    chosen = cast(Literal["inductor", "aot_eager"], backend)
    rows = _predicted(model, gpus, length, batch, dtype, sets or [], device, link, host_memory * _GIB, chosen)
    longest = {p.name: _longest(p, memory * _GIB, host_memory * _GIB, tokens) for p, tokens in rows}
    best = next((p for p, _ in rows if p.peak_bytes <= memory * _GIB), None)
    if picture is not None:
        from autosp_ir.viz.curves import memory_svg

        picture.write_text(memory_svg({p.name: p.curve for p, _ in rows}, memory * _GIB), encoding="utf-8")
    if as_json:
        found = [asdict(p) | {"curve": None, "longest_tokens": longest[p.name]} for p, _ in rows]
        sys.stdout.write(json.dumps({"pipelines": found, "fits": best.pipeline if best else None}, indent=2) + "\n")
    else:
        Console().print(_table(rows, longest, memory))
        if best is not None:
            sys.stdout.write(f"{best.pipeline}\n")
    if best is None:
        raise typer.Exit(1)


def _predicted(
    model: str,
    gpus: int,
    length: int | None,
    batch: int,
    dtype: str | None,
    sets: list[str],
    device: str,
    link: str,
    host: float,
    backend: Literal["inductor", "aot_eager"],
) -> list[tuple[Prediction, int]]:
    from autosp_ir.capture.program import capture
    from autosp_ir.emit.parallelize import default_pipeline
    from autosp_ir.pipeline.registry import parse_pipeline
    from autosp_ir.plan import plan as predictions
    from autosp_ir.plan.choose import tokens_of

    settings: dict[str, Any] = {"batch_size": batch, "fake": True} if model.endswith(CONFIG_SUFFIX) else {}
    built, example = read_model(model, length, dtype_named(dtype), pairs(sets, "--set num_hidden_layers=2"), **settings)
    with _progress() as progress:
        task = progress.add_task("capture")
        program = capture(built, example)
        passes = parse_pipeline(default_pipeline(backend=backend))
        found = predictions(
            program,
            {"sp": gpus},
            passes,
            device=device,
            link=link,
            fused=backend == "inductor",
            host=host,
            progress=lambda name: progress.update(task, description=name),
        )
        return [(prediction, tokens_of(program)) for prediction, _ in found]


def _longest(prediction: Prediction, memory: float, host: float, tokens: int) -> int:
    """Tokens at which the peak meets the memory: what is neither weight nor gradient grows with the tokens."""
    fixed = 2 * prediction.input_bytes
    growing = max(prediction.peak_bytes - fixed, 1)
    on_device = max(0, int((memory - fixed) / growing * tokens))
    # Beyond it, what no longer fits on the host stays on the device.
    full = int(host / prediction.host_bytes * tokens) if prediction.host_bytes else on_device
    if on_device <= full:
        return on_device
    per_token = (growing + prediction.host_bytes) / tokens
    return max(full, int((memory - fixed + host) / per_token))


def _table(rows: list[tuple[Prediction, int]], longest: dict[str, int], memory: float) -> Table:
    table = Table(title=f"{rows[0][1]:,} tokens, {memory:g} GiB on each GPU")
    for name in ("pipeline", "peak GiB", "saved GiB", "host GiB", "s/step", "exposed ms", "longest, about", "fits"):
        table.add_column(name, justify="left" if name == "pipeline" else "right")
    for p, _ in rows:
        table.add_row(
            p.name,
            f"{p.peak_bytes / _GIB:.2f}",
            f"{p.saved_bytes / _GIB:.2f}",
            f"{p.host_bytes / _GIB:.2f}",
            f"{p.seconds:.3f}",
            f"{p.exposed_seconds * 1e3:.1f}",
            f"{longest[p.name]:,}",
            "yes" if p.peak_bytes <= memory * _GIB else "no",
        )
    return table


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


__all__ = ["plan"]
