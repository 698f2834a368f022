"""Schedules on a grid of links and lengths, by estimate: `python -m benchmarks.overlap --help`.

Decoder layers of 8B shapes on eight ranks. Every half of a step is ordered by the program itself, by torch's
`OverlapScheduler`, by the lists of `overlap`, and by CP-SAT, all under one cost model and judged by one timeline; our
own orders may take 5 % more memory than the program's. Nothing runs on a device.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch.testing._internal.distributed.fake_pg import FakeStore

import autosp_ir as air
from autosp_ir.analysis.cost import Link, device
from autosp_ir.analysis.fused import Fusion, fused_durations
from autosp_passes._schedule.cp_sat import solve
from autosp_passes._schedule.portfolio import best, settled
from autosp_passes._schedule.problem import Problem, halves
from benchmarks.schedules.programs import captured, lowered
from benchmarks.schedules.torch_scheduler import torch_orders

_RANKS = 8
_MEMORY = 1.05


def main(
    layers: Annotated[list[int], typer.Option("--layers")] = [2, 32],  # noqa: B006
    tokens: Annotated[list[int], typer.Option("--tokens")] = [32768, 131072],  # noqa: B006
    gigabytes: Annotated[list[int], typer.Option("--link", help="GB/s of one rank.")] = [40, 100, 300],  # noqa: B006
    effort: Annotated[float, typer.Option("--effort", help="Deterministic seconds of CP-SAT for two layers.")] = 30.0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Compare orders of forward and backward and print a table."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    rows = []
    for depth in layers:
        for length in tokens:
            program = captured(depth, length)
            for chunks, sync in ((1, "external"), (1, "in_graph"), (4, "external"), (4, "in_graph")):
                ready = lowered(program, _RANKS, chunks, sync)
                for rate in gigabytes:
                    found = compared(ready, rate, effort if depth <= 2 else 0.0)
                    rows += [{"layers": depth, "tokens": length, "chunks": chunks, "sync": sync} | r for r in found]
                    for row in rows[-len(found) :]:
                        print(line(row), flush=True)
    if out is not None:
        out.write_text(json.dumps({"machine": _machine(), "ranks": _RANKS, "memory": _MEMORY, "rows": rows}, indent=1))


def compared(program: air.Program, rate: int, effort: float) -> list[dict[str, Any]]:
    """Makespan, exposed communication and peak of each half in every order.

    Args:
        program: A lowered program.
        rate: GB/s of the link.
        effort: Deterministic seconds of CP-SAT; 0 leaves it out.
    """
    link = Link(f"{rate} GB/s", rate * 1e9)
    fusion = Fusion(program)
    start = time.perf_counter()
    problems = halves(program, fused_durations(fusion, device("h100"), link), fusion)
    built = time.perf_counter() - start
    cap = _MEMORY * max(p.peak(range(len(p.nodes))) for p in problems)
    rows = []
    for problem, torchs in zip(problems, torch_orders(program, problems), strict=True):
        start = time.perf_counter()
        ours = best(problem, cap)
        seconds = time.perf_counter() - start
        orders = {"program": range(len(problem.nodes)), "torch": torchs, "lists": ours.order}
        row: dict[str, Any] = {"half": problem.nodes[0].phase.value, "gigabytes": rate, "found": ours.name}
        row |= {"operations": len(problem.nodes), "seconds": built / 2 + seconds, "bound_ms": 1e3 * problem.lower_bound}
        if effort:
            solution = solve(problem, ours.order, effort)
            row |= {"cp_sat_bound_ms": 1e3 * solution.bound, "cp_sat_optimal": solution.optimal}
            if solution.order is not None:
                orders["cp_sat"] = settled(problem, solution.order)
        row |= {name: _worth(problem, order) for name, order in orders.items()}
        rows.append(row | {"cap_gib": cap / 2**30})
    return rows


def _worth(problem: Problem, order: Any) -> dict[str, float]:
    timeline = problem.timeline(order)
    return {
        "ms": 1e3 * timeline.makespan,
        "exposed_ms": 1e3 * timeline.exposed,
        "peak_gib": problem.peak(order) / 2**30,
    }


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    cells = [
        f"{row[n]['ms']:8.1f} ({row[n]['exposed_ms']:5.1f})"
        for n in ("program", "torch", "lists", "cp_sat")
        if n in row
    ]
    head = (
        f"{row['layers']:2} {row['tokens']:6} {row['chunks']} {row['sync']:8} {row['half']:8} {row['gigabytes']:3} GB/s"
    )
    bound = max(row["bound_ms"], row.get("cp_sat_bound_ms", 0.0))
    return f"{head}: {' '.join(cells)}  bound {bound:7.1f}  lists/bound {row['lists']['ms'] / bound:.3f}  {row['seconds']:.1f} s"


def _machine() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}


if __name__ == "__main__":
    typer.run(main)
