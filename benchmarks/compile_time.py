"""Compile time by number of layers: `python -m benchmarks.compile_time --layers 2 8 32 --json out.json`.

A Llama with 8B dimensions and fake weights is captured, rewritten and emitted for an `sp` axis; each number of layers
in a process of its own, whose peak memory is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.launch import Row, run_child
from benchmarks.gpu.sizes import Sizes

SETTABLE = ("hidden", "inter", "heads", "kv", "vocab", "dtype")
"""Sizes that are options here; the others are the rows or do not matter."""


def measure(layers: int, sizes: Sizes, given: argparse.Namespace) -> Row:
    """Compile once in a fresh process.

    Args:
        layers: Decoder layers.
        sizes: The other dimensions.
        given: Length, ranks, backend, device and limit.

    Returns:
        The figures, or a row with an error.
    """
    words = ["--seq", str(given.seq), "--ranks", str(given.ranks), "--backend", given.backend]
    words += ["--device", given.device, *(["--pipeline", given.pipeline] if given.pipeline else [])]
    words += Sizes(**(asdict(sizes) | {"layers": layers})).arguments()
    command = [sys.executable, "-m", "benchmarks.compile_parts", *words]
    with Path(os.devnull).open("w") as log, tempfile.TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
        outcome = run_child(command, given.limit, log, lambda row: None, environment)
    if outcome.rows:
        return outcome.rows[0]
    reason = f"ended at its limit of {given.limit:.0f} s" if outcome.timed_out else outcome.error
    return {"layers": layers, "error": reason or f"exit status {outcome.code}"}


def table_of(rows: Sequence[Row], title: str) -> Table:
    """One line per part, one column per number of layers."""
    table = Table("seconds", *(f"{row['layers']} layers" for row in rows), title=title)
    good = [row for row in rows if not row.get("error")]
    parts = list(dict.fromkeys(part for row in good for part in row["seconds"]))
    for part in parts:
        table.add_row(part, *(_cell(row, "seconds", part, "{:.2f}") for row in rows))
    table.add_section()
    table.add_row("peak MiB", *(_cell(row, "peak_mib", None, "{:,.0f}") for row in rows))
    for stage in ("captured", "lowered"):
        table.add_row(f"nodes, {stage}", *(_cell(row, "nodes", stage, "{:,}") for row in rows))
    return table


def _cell(row: Row, key: str, part: str | None, form: str) -> str:
    if row.get("error"):
        return str(row["error"])[:40]
    value: Any = row[key] if part is None else row[key].get(part)
    return "" if value is None else form.format(value)


def main() -> None:
    """Measure each number of layers, print one table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.compile_time", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seq", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="size of the sp axis (default: %(default)s)")
    parser.add_argument("--backend", choices=["aot_eager", "inductor"], default="aot_eager")
    parser.add_argument("--device", default="cpu", help="cuda compiles for a GPU and needs one")
    parser.add_argument("--pipeline", default=None, help="passes to run (default: those of the backend)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one number of layers")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    for name in SETTABLE:
        default = getattr(Sizes(), name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    given = parser.parse_args()
    sizes = Sizes(**{name: getattr(given, name) for name in SETTABLE})
    console = Console()
    rows: list[Row] = []
    for layers in given.layers:
        with console.status(f"compiling {layers} layers"):
            rows.append(measure(layers, sizes, given))
        if given.json is not None:
            given.json.write_text(json.dumps(_document(given, sizes, rows), indent=1) + "\n")
    console.print(table_of(rows, f"Llama, hidden {sizes.hidden}, {given.seq:,} tokens, sp={given.ranks}"))


def _document(given: argparse.Namespace, sizes: Sizes, rows: Sequence[Row]) -> dict[str, Any]:
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "command": ["python", "-m", "benchmarks.compile_time", *sys.argv[1:]],
        "sizes": {name: getattr(sizes, name) for name in SETTABLE},
        "seq": given.seq,
        "ranks": given.ranks,
        "rows": list(rows),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
