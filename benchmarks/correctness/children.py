"""All cases of one side, each in processes of its own, with a time limit: `python -m benchmarks.correctness.children`.

Everything heavy is imported once; cases are forked from there. The two sides cannot share a process, because both
register operators under the name `autosp`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from benchmarks.correctness.cases import CASES, Case
from benchmarks.correctness.compare import Row
from benchmarks.gpu.launch import MARK

SIDES = ("autosp", "ours")
_EXACT = 1e-5
"""transformers computes norms and rotary tables in float32 on both sides."""

_LONGEST_MESSAGE = 220


def main() -> None:
    """Print one row per case; where the side cannot be imported, one that says so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)))
    parser.add_argument("--limit", type=float, default=120.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("transformers.models.llama.modeling_llama")
    try:
        side = importlib.import_module(f"benchmarks.correctness.{arguments.side}")
        if arguments.side == "autosp":
            side.prepare()
    except ImportError as error:
        print(MARK + json.dumps({"unavailable": _short(error)}), flush=True)
        return
    for number in arguments.cases:
        row = run(side, CASES[number], arguments.limit)
        print(MARK + json.dumps({"case": number, **row}), flush=True)


def run(side: ModuleType, case: Case, limit: float) -> Row:
    """One case: what was measured, with `outcome` one of exact, silent, refused, crash, hang.

    Args:
        side: `benchmarks.correctness.autosp` or `.ours`.
        case: The case.
        limit: Seconds after which its processes are ended.
    """
    ranks = case.ranks if side.__name__.endswith("autosp") else 1
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[Connection, Any] = {}
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, side, case, rank, ranks, folder), daemon=True)
            process.start()
            sender.close()
            pipes[receiver] = process
        try:
            return _first(pipes, time.monotonic() + limit, limit)
        finally:
            for process in pipes.values():
                process.kill()
                process.join()


def _first(pipes: dict[Connection, Any], deadline: float, limit: float) -> Row:
    """Rank 0's row when every rank ended well, otherwise that of the first rank that did not."""
    rows: dict[Connection, Row] = {}
    while len(rows) < len(pipes):
        ready = wait([p for p in pipes if p not in rows], max(0.0, deadline - time.monotonic()))
        if not ready:
            return {"outcome": "hang", "message": f"ended after {limit:.0f} s"}
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                rows[pipe] = pipe.recv()
            except EOFError:
                pipes[pipe].join()
                return {"outcome": "crash", "message": f"exit code {pipes[pipe].exitcode}"}
            if "message" in rows[pipe]:
                return rows[pipe]
    return rows[next(iter(pipes))]


def _child(sender: Connection, side: Any, case: Case, rank: int, ranks: int, folder: str) -> None:
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        method = f"file://{Path(folder, 'rendezvous')}"
        dist.init_process_group("gloo", method, timedelta(seconds=60), rank=rank, world_size=ranks)
    try:
        sender.send(judged(side.measure(case)))
    except BaseException as error:
        sender.send({"outcome": "refused" if side.refuses(error) else "crash", "message": _short(error)})
    # Exit handlers belong to the process that this one was forked from.
    sender.close()
    os._exit(0)


def judged(row: Row) -> Row:
    """A measured row with its outcome; a case without gradients has none."""
    if "gradient_error" not in row:
        return row
    found = [row["gradient_error"], row["loss_error"]]
    return {"outcome": "exact" if all(e is not None and e <= _EXACT for e in found) else "silent", **row}


def _short(error: BaseException) -> str:
    """Type and first lines of an error, without paths."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines)}"
    text = re.sub(r"(/[\w.+-]+){2,}/", "…/", text)
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"


if __name__ == "__main__":
    main()
