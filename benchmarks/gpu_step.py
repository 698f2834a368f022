"""One training step on several GPUs, ours and what users would pick instead: `python -m benchmarks.gpu_step --help`.

Every mode runs in processes of its own, with a limit; one that crashes, runs out of memory or is ended leaves a row
that says so. Results are written to OUT/gpu_step.json after every mode. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.launch import ENVIRONMENT, Row, complete, run_child
from benchmarks.gpu.modes import MAKERS, is_ours, ranks_of
from benchmarks.gpu.sizes import Sizes, add_size_arguments, sizes_of
from benchmarks.gpu.summary import cells, markdown

DEFAULT_MODES = "ours,ulysses-compile-loss,ulysses-compile"


class Session:
    """The results so far, and the file they are kept in.

    Args:
        given: The command line.
        caches: Folder for what compilers keep.
    """

    def __init__(self, given: argparse.Namespace, caches: Path) -> None:
        self.given = given
        self.caches = caches
        self.sizes: Sizes = sizes_of(given)
        self.began = time.monotonic()
        self.path = Path(given.out) / "gpu_step.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pipelines = dict(text.split("=", 1) for text in given.variant)
        self.document: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            "workload": "Llama with random weights and tokens, batch 1: forward, backward, gradient reduction",
            "sizes": asdict(self.sizes),
            "environment": ENVIRONMENT,
            "command": ["python", "-m", "benchmarks.gpu_step", *sys.argv[1:]],
            "children": [],
            "rows": [],
            "accuracy": [],
        }

    def save(self) -> None:
        """Write everything measured so far."""
        document = self.document | {"summary": [asdict(cell) for cell in cells(self.document["rows"])]}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self.path)

    def limit(self) -> float:
        """Seconds that the next child may take."""
        limit: float = self.given.limit
        if self.given.budget:
            limit = min(limit, self.given.budget - (time.monotonic() - self.began))
        return limit

    def run(self, arguments: Sequence[str], ranks: int, log: TextIO, note: Row) -> tuple[Any, float]:
        """Run one torchrun to its end, showing its rows as they come."""
        limit = self.limit()
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += [f"--master-port={_free_port()}", "-m", *arguments]
        log.write(f"\n$ {' '.join(command)}\n")
        # A compiler's cache of its own for each mode: a child that is ended may leave half a file behind.
        cache = self.caches / note["mode"]
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        outcome = run_child(command, limit, log, lambda row: print("   ", _short(row), flush=True), environment)
        if outcome.timed_out or outcome.code:
            shutil.rmtree(cache, ignore_errors=True)
        child = {"command": ["python", *command[1:]], "seconds": round(outcome.seconds, 1), "code": outcome.code}
        self.document["children"].append(note | child | {"timed_out": outcome.timed_out})
        return outcome, limit

    def mode(self, mode: str, turn: int, log: TextIO) -> None:
        """Run one mode at every length."""
        ranks = ranks_of(mode, self.given.gpus)
        alone = bool(self.sizes.stand_in) and ranks > 1
        sizes = replace(self.sizes, stand_in=self.sizes.stand_in if alone else 0)
        arguments = ["benchmarks.gpu.worker", "--mode", mode, "--seq", *map(str, self.given.seq)]
        pipeline = self.pipelines.get(mode, self.given.pipeline)
        if is_ours(mode) and pipeline:
            arguments += ["--pipeline", pipeline]
        if is_ours(mode) and self.given.backend:
            arguments += ["--backend", self.given.backend]
        note = {"mode": mode, "round": turn}
        if self.limit() < 10:
            rows: list[Row] = [{"mode": mode, "seq": s, "error": "not run: no time left"} for s in self.given.seq]
        else:
            outcome, limit = self.run([*arguments, *sizes.arguments()], 1 if alone else ranks, log, note)
            rows = complete(outcome, mode, self.given.seq, limit)
        for row in rows:
            self.document["rows"].append({"world": sizes.stand_in or ranks, **row, "round": turn})
            if row.get("error"):
                print(f"    {row['seq']:>9,}  {row['error'][:200]}", flush=True)
        self.save()

    def accuracy(self, dtype: str, log: TextIO) -> None:
        """Compare gradients with a dense float32 run, for one dtype."""
        arguments = ["benchmarks.gpu.accuracy", "--seq", str(self.given.accuracy_seq)]
        for text in self.given.variant:
            arguments += ["--variant", text]
        sizes = Sizes(**(asdict(self.sizes) | {"dtype": dtype})).arguments()
        outcome, limit = self.run([*arguments, *sizes], self.given.gpus, log, {"mode": f"accuracy-{dtype}", "round": 0})
        rows = list(outcome.rows)
        if outcome.timed_out or outcome.code:
            reason = f"ended at its limit of {limit:.0f} s" if outcome.timed_out else outcome.error
            if not any(row.get("error") for row in rows):
                rows.append({"dtype": dtype, "seq": self.given.accuracy_seq, "candidate": "", "error": reason})
        self.document["accuracy"] += rows
        self.save()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _machine() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _short(row: Row) -> str:
    if row.get("error"):
        return f"{row.get('seq', 0):>9,}  {str(row['error'])[:200]}"
    if "candidate" in row:
        return f"{row['candidate']:22} gradient error {row['overall']:.3g}, worst {row['worst']:.3g}"
    return (
        f"{row['seq']:>9,}  {row['step_s']:8.4f} s ({row['min_s']:.4f}–{row['max_s']:.4f})  "
        f"{row['peak_gib']:6.2f} GiB  loss {row['loss']:.5f}  {row['joules']:.0f} J  {row['watts']:.0f} W  "
        f"ready after {row['build_s'] + row['warm_s']:.0f} s"
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_step", description=__doc__)
    parser.add_argument("--gpus", type=int, default=2, help="ranks of every mode but single (default: %(default)s)")
    parser.add_argument("--modes", default=None, help=f"of {', '.join(MAKERS)} (default: {DEFAULT_MODES})")
    parser.add_argument("--seq", type=int, nargs="+", default=[16384, 65536, 131072], help="tokens")
    parser.add_argument("--repeat", type=int, default=1, help="rounds: every mode once, then all of them again, …")
    parser.add_argument("--limit", type=float, default=240, help="seconds a mode may take in a round")
    parser.add_argument("--budget", type=float, default=0, help="seconds in all; modes left then are not started")
    parser.add_argument("--out", default="build/gpu_step", help="folder for gpu_step.json and gpu_step.log")
    parser.add_argument("--pipeline", default=None, help="of our modes, in place of the default")
    parser.add_argument("--backend", default=None, help="of our modes, in place of inductor")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="ours-NAME=PIPELINE",
        help="adds a mode that runs PIPELINE, or with @RUNG the pipeline that `autosp-ir plan` calls so",
    )
    parser.add_argument(
        "--accuracy", action="store_true", help="compare gradients, of variants too; alone, unless --modes is given"
    )
    parser.add_argument("--accuracy-seq", type=int, default=8192)
    parser.add_argument("--accuracy-dtypes", nargs="+", default=["bfloat16", "float32"])
    add_size_arguments(parser)
    given = parser.parse_args(words)
    text = given.modes if given.modes is not None else ("" if given.accuracy else DEFAULT_MODES)
    variants = [entry.split("=", 1)[0] for entry in given.variant]
    timed = [] if given.accuracy and given.modes is None else variants
    given.modes = list(dict.fromkeys([*(mode for mode in text.split(",") if mode), *timed]))
    for mode in given.modes:
        if mode not in MAKERS and not (mode in variants and is_ours(mode)):
            parser.error(f"no mode is called {mode!r}; a variant is called ours-NAME")
    return given


def main() -> None:
    """Run every mode, then print the tables."""
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="gpu_step-") as caches:
        run(given, Session(given, Path(caches)))


def run(given: argparse.Namespace, session: Session) -> None:
    """Every mode in turn, as often as asked for, then the gradient comparison."""
    machine = session.document["machine"]
    print(f"{', '.join(machine.get('devices', []))}; torch {machine.get('torch')}; results in {session.path}")
    work = [(turn, mode) for turn in range(given.repeat) for mode in given.modes]
    with (session.path.parent / "gpu_step.log").open("a") as log:
        for number, (turn, mode) in enumerate(work, 1):
            spent = time.monotonic() - session.began
            print(f"[{number}/{len(work)}] {mode}, round {turn + 1}, after {spent:.0f} s", flush=True)
            session.mode(mode, turn, log)
        for dtype in given.accuracy_dtypes if given.accuracy else []:
            print(f"[accuracy] {dtype}, {given.accuracy_seq:,} tokens", flush=True)
            session.accuracy(dtype, log)
    print("\n" + markdown(session.document), end="")


if __name__ == "__main__":
    main()
