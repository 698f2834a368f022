"""Running one child to its end, its limit or its crash, and reading the rows it prints. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

MARK = "RESULT "
"""Starts the line of a child's output that holds a row as JSON."""

ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_NVLS_ENABLE": "0",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
"""Set for every child."""

Row = dict[str, Any]


@dataclass
class Outcome:
    """What became of a child.

    Args:
        rows: The rows it printed.
        code: Exit status; negative for a signal.
        timed_out: Whether it was ended at its limit.
        seconds: How long it ran.
        error: The last line of its output that looks like an error.
    """

    rows: list[Row] = field(default_factory=list)
    code: int = 0
    timed_out: bool = False
    seconds: float = 0.0
    error: str = ""


def parse_row(line: str) -> Row | None:
    """The row that a line of output holds, None for any other line.

    Launchers may put a prefix such as `[rank0]:` in front.
    """
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        row = json.loads(text)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def run_child(
    command: Sequence[str],
    limit: float,
    log: TextIO,
    on_row: Callable[[Row], None],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Run a command and collect its rows.

    Args:
        command: The command and its arguments.
        limit: Seconds after which it and its children are ended.
        log: Gets its output.
        on_row: Called with each row as soon as it is printed.
        environment: Set for it beyond `ENVIRONMENT`.

    Returns:
        What became of it; a crash or a limit is no exception.
    """
    outcome = Outcome()
    began = time.monotonic()
    child = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **ENVIRONMENT, **environment},
    )
    reader = threading.Thread(target=_read, args=(child, outcome, log, on_row), daemon=True)
    reader.start()
    try:
        outcome.code = child.wait(limit)
    except subprocess.TimeoutExpired:
        outcome.timed_out = True
        outcome.code = end(child)
    except BaseException:
        end(child)
        raise
    reader.join(10)
    outcome.seconds = time.monotonic() - began
    return outcome


def _read(child: subprocess.Popen[str], outcome: Outcome, log: TextIO, on_row: Callable[[Row], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        log.write(line)
        log.flush()
        row = parse_row(line)
        if row is not None:
            outcome.rows.append(row)
            on_row(row)
        elif "Error" in line and "ChildFailedError" not in line and "error_file" not in line:
            outcome.error = line.strip()[:600]


def end(child: subprocess.Popen[str], grace: float = 15.0) -> int:
    """End a child and everything that it started; torchrun's workers are in sessions of their own."""
    family = descendants(child.pid)
    child.terminate()
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
    for pid, started in family.items():
        # It may end by itself meanwhile.
        with suppress(ProcessLookupError):
            if _started(pid) == started:
                os.kill(pid, signal.SIGKILL)
    return child.wait()


def descendants(pid: int) -> dict[int, str]:
    """Process ids below `pid` and when each was started, from /proc."""
    parents = {int(p.name): _parent(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    found: dict[int, str] = {}
    below = {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below and child not in found}
        found |= {child: _started(child) for child in below}
    return found


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else -1


def _started(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def complete(outcome: Outcome, mode: str, lengths: Sequence[int], limit: float) -> list[Row]:
    """One row per length: what the child printed, and an error where it printed nothing.

    Args:
        outcome: What became of the child.
        mode: Its mode.
        lengths: The lengths it was asked for, in order.
        limit: Its limit in seconds.
    """
    if outcome.timed_out:
        reason = f"ended at its limit of {limit:.0f} s"
    else:
        reason = f"exit status {outcome.code}: {outcome.error or 'see the log'}"
    rows: list[Row] = []
    failed = ""
    for seq in lengths:
        printed = [row for row in outcome.rows if row.get("seq") == seq]
        good = [row for row in printed if not row.get("error")]
        if printed:
            row = {**(good or printed)[0], "mode": mode}
        else:
            row = {"mode": mode, "seq": seq, "error": f"not run: failed at {failed}" if failed else reason}
        if row.get("error") and not failed:
            failed = f"{seq:,} tokens"
        rows.append(row)
    return rows
