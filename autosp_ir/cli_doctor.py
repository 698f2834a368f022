"""`autosp-ir doctor`: what works for a model, before a GPU is asked."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autosp_ir.cli_io import dtype_named, pairs, read_model
from autosp_ir.errors import AutoSPError
from autosp_ir.pipeline.spec import DEFAULT_PIPELINE


def doctor(
    model: Annotated[str, typer.Argument(help="config.json, or package.module:factory returning (model, batch).")],
    ranks: Annotated[str, typer.Option("--ranks", help="Numbers of ranks to examine, each on its own.")] = "2,4",
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens per sequence; 64 for a config.json.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of weights and inputs, such as bfloat16.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a config entry, such as num_hidden_layers=2; repeatable."),
    ] = None,
    seq_dims: Annotated[
        str | None, typer.Option("--seq-dims", help="Input=dimension pairs that hold the sequence; else inferred.")
    ] = None,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="Passes to run.")] = DEFAULT_PIPELINE,
    strict: Annotated[bool, typer.Option(help="Refuse instead of gathering tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Say for each number of ranks whether a model's step is exact, what is gathered, or why it is refused.

    Loss and every gradient are compared with the dense model on simulated ranks, in float64. Exits with 1 when a result
    is wrong or something crashes, which is a bug.
    """
    from autosp_ir.doctor import diagnose, steps_of, tables

    counts = list(_integers(ranks, "--ranks 2,4").values())
    dims = None if seq_dims is None else pairs(seq_dims.split(","), "--seq-dims input_ids=1")
    built, batch = read_model(model, length, dtype_named(dtype), pairs(sets or (), "--set num_hidden_layers=2"))
    with _progress() as progress:
        task = progress.add_task("", total=steps_of(counts))

        def show(step: str) -> None:
            progress.update(task, description=step)
            progress.advance(task)

        diagnosis = diagnose(built, batch, counts, pipeline=pipeline, strict=strict, seq_dims=dims, progress=show)
    if as_json:
        sys.stdout.write(json.dumps(diagnosis.to_dict(), indent=2) + "\n")
    else:
        for table in tables(diagnosis):
            Console().print(table)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _integers(text: str, example: str) -> dict[str, int]:
    try:
        return {part: int(part) for part in text.split(",")}
    except ValueError as error:
        raise AutoSPError(f"{text!r} are no numbers", hint=f"write {example}") from error


__all__ = ["doctor"]
