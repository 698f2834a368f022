"""DeepSpeed AutoSP and ours on the same small models, on the CPU: `python -m benchmarks.correctness_vs_autosp --help`.

Each case is one tiny model in float64. Loss and every gradient are compared with the dense model's. AutoSP's graph
passes run on gloo ranks, ours on simulated ones; each in a process of its own, with a time limit. Without DeepSpeed
ours runs alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.correctness.cases import CASES
from benchmarks.correctness.children import SIDES
from benchmarks.correctness.table import markdown
from benchmarks.gpu.launch import Row, run_child

_PACKAGES = ("torch", "transformers", "deepspeed")
_STARTUP = 120.0
"""Seconds that importing may take."""


app = typer.Typer(add_completion=False)


@app.command()
def main(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rows as JSON.")] = None,
    cases: Annotated[str, typer.Option(help="Numbers of cases, by comma; empty for all of them.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds that one case may take on one side.")] = 120.0,
    sides: Annotated[str, typer.Option(help="autosp, ours, or both by comma.")] = ",".join(SIDES),
    again: Annotated[Path | None, typer.Option(help="Print the table of a file that -o wrote; run nothing.")] = None,
) -> None:
    """Run the cases on both sides and print a table."""
    if again is not None:
        print(markdown(json.loads(again.read_text())["cases"]))
        return
    numbers = [int(n) for n in cases.split(",") if n] or list(range(len(CASES)))
    rows: list[Row] = [
        {"case": CASES[n].name, "ranks": CASES[n].ranks, **{side: {"outcome": "not run"} for side in SIDES}}
        for n in numbers
    ]
    for side in sides.split(","):
        for number, row in _run(side, numbers, limit).items():
            rows[numbers.index(number)][side] = row
        if output is not None:
            output.write_text(json.dumps({**_described(), "cases": rows}, indent=1, ensure_ascii=False) + "\n")
    print(markdown(rows))


def _run(side: str, numbers: list[int], limit: float) -> dict[int, Row]:
    """Rows by case; those that are missing did not run."""
    found: dict[int, Row] = {}

    def keep(row: Row) -> None:
        if "unavailable" in row:
            print(f"{side} is not run: {row['unavailable']}", file=sys.stderr)
            return
        number = row.pop("case")
        found[number] = row
        print(f"{side}: {CASES[number].name}: {row.get('outcome', 'measured')}", file=sys.stderr)

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.correctness.children", side]
    command += ["--limit", str(limit), "--cases", *map(str, numbers)]
    with open(os.devnull, "w") as log:
        outcome = run_child(command, _STARTUP + limit * len(numbers), log, keep, {"DS_ACCELERATOR": "cpu"})
    if outcome.code:
        print(f"{side} ended with status {outcome.code}: {outcome.error}", file=sys.stderr)
    return found


def _described() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.correctness_vs_autosp", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, one thread a process",
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    app()
