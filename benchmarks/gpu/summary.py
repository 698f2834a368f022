"""From measured rows to the table: medians and spreads over rounds, ratios, markdown. Standard library only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.modes import is_ours

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One mode at one length, over all rounds.

    Args:
        mode: Mode.
        seq: Tokens.
        world: GPUs.
        rounds: How many rounds measured it.
        step_s: Median over the rounds of each round's median.
        low_s: Fastest round's median; of one round, its fastest step.
        high_s: Slowest round's median; of one round, its slowest step.
        peak_gib: Peak memory.
        ready_s: Seconds of compilation and warm-up in the first round.
        loss: Global mean loss.
        grad_norm: Norm of its gradient.
        error: Why there is no figure.
    """

    mode: str
    seq: int
    world: int = 0
    rounds: int = 0
    step_s: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0
    peak_gib: float = 0.0
    ready_s: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Ratio:
    """One of our modes against the fastest peer on as many GPUs, in rounds that ran both.

    Args:
        peer: The fastest peer.
        time: Median over rounds of our seconds / its seconds.
        low: Smallest of them.
        high: Largest.
        memory: Our peak / its peak; 0 where it is unknown.
    """

    peer: str
    time: float
    low: float
    high: float
    memory: float


def load(paths: Sequence[Path]) -> dict[str, Any]:
    """Read result files as one; the rounds of different files stay apart."""
    documents = [json.loads(path.read_text()) for path in paths]
    rows = [{**row, "round": (i, row.get("round", 0))} for i, d in enumerate(documents) for row in d["rows"]]
    return {**documents[0], "rows": rows, "accuracy": [a for d in documents for a in d.get("accuracy", [])]}


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Modes and lengths in the order of the rows."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["seq"]), []).append(row)
    return [_cell(mode, seq, group) for (mode, seq), group in groups.items()]


def _cell(mode: str, seq: int, rows: list[Row]) -> Cell:
    good = [row for row in rows if not row.get("error")]
    if not good:
        # A round that failed says more than one that was not run.
        tried = [row for row in rows if not str(row["error"]).startswith("not run")] or rows
        return Cell(mode, seq, error=str(tried[-1]["error"]))
    medians = [row["step_s"] for row in good]
    first = good[0]
    low, high = (first["min_s"], first["max_s"]) if len(good) == 1 else (min(medians), max(medians))
    return Cell(
        mode,
        seq,
        world=first.get("world", 0),
        rounds=len(good),
        step_s=statistics.median(medians),
        low_s=low,
        high_s=high,
        peak_gib=max(row["peak_gib"] for row in good),
        ready_s=first.get("build_s", 0.0) + first["warm_s"],
        loss=first["loss"],
        grad_norm=first["grad_norm"],
    )


def ratio(rows: Sequence[Row], mode: str, seq: int) -> Ratio | None:
    """One of our modes against the fastest peer at a length.

    Args:
        rows: Measured rows; their key `round` says which were measured together.
        mode: Our mode.
        seq: Tokens.

    Returns:
        None when no round ran both.
    """
    at = [row for row in rows if row["seq"] == seq and not row.get("error")]
    mine = {row.get("round", 0): row for row in at if row["mode"] == mode}
    together = [
        row for row in at if not is_ours(row["mode"]) and row["world"] == mine.get(row.get("round", 0), {}).get("world")
    ]
    if not together:
        return None
    best = min(cells(together), key=lambda cell: cell.step_s)
    pairs = [(mine[row.get("round", 0)], row) for row in together if row["mode"] == best.mode]
    times = [own["step_s"] / peer["step_s"] for own, peer in pairs]
    peak = max(own["peak_gib"] for own, _ in pairs)
    memory = peak / best.peak_gib if best.peak_gib else 0.0
    return Ratio(best.mode, statistics.median(times), min(times), max(times), memory)


def markdown(document: dict[str, Any]) -> str:
    """The tables of a result document: steps by length and mode, then gradient errors."""
    rows = document["rows"]
    parts = []
    if rows:
        lines = [
            "| tokens | mode | s/step (min–max) | peak GiB | loss | gradient norm | ours / best peer |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(cell, rows) for cell in sorted(cells(rows), key=lambda cell: cell.seq)]
        parts.append("\n".join(lines))
    if document.get("accuracy"):
        lines = [
            "| dtype | tokens | gradient of | all parameters | worst parameter | loss |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_accuracy_line(row) for row in document["accuracy"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cell: Cell, rows: Sequence[Row]) -> str:
    name = f"**{cell.mode}**" if is_ours(cell.mode) else cell.mode
    if cell.error:
        return f"| {cell.seq:,} | {name} | {_plain(cell.error)} | | | | |"
    found = ratio(rows, cell.mode, cell.seq) if is_ours(cell.mode) else None
    against = ""
    if found is not None:
        spread = "" if found.low == found.high else f" ({found.low:.3f}–{found.high:.3f})"
        memory = f", memory {found.memory:.3f}" if found.memory else ""
        against = f"time {found.time:.3f}{spread}{memory}; {found.peer}"
    peak = f"{cell.peak_gib:.2f}" if cell.peak_gib else "–"
    return (
        f"| {cell.seq:,} | {name} | {cell.step_s:.3f} ({cell.low_s:.3f}–{cell.high_s:.3f}) | {peak} "
        f"| {cell.loss:.4f} | {cell.grad_norm:.4g} | {against} |"
    )


def _accuracy_line(row: Row) -> str:
    seq = f"{row['seq']:,}" if row.get("seq") else "–"
    start = f"| {row.get('dtype', '–')} | {seq} | {row.get('candidate') or '–'} |"
    if row.get("error"):
        return f"{start} {_plain(str(row['error']))} | | |"
    return f"{start} {row['overall']:.3g} | {row['worst']:.3g} (`{row['worst_name']}`) | {row['loss']:.6f} |"


def _plain(text: str) -> str:
    """Text that fits a cell of a table."""
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= 160 else short[:157] + "…"
