"""Schedules on a grid of links and lengths, by estimate: `python -m benchmarks.overlap --help`.

Decoder layers of 8B shapes on eight ranks. Every half of a step is ordered by the program itself, by torch's
`OverlapScheduler`, by the lists of `overlap`, and by CP-SAT, all under one cost model and judged by one timeline; our
own orders may take 5 % or 25 % more memory than the program's. Nothing runs on a device.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch.testing._internal.distributed.fake_pg import FakeStore

import autosp_ir as air
from autosp_ir.analysis.cost import Link, device
from autosp_ir.analysis.fused import Fusion, fused_durations
from autosp_ir.viz.lanes import lanes_svg, predicted_lanes
from autosp_passes._schedule.cp_sat import solve
from autosp_passes._schedule.portfolio import best, settled
from autosp_passes._schedule.problem import Problem, halves
from benchmarks.schedules.programs import captured, lowered
from benchmarks.schedules.torch_scheduler import torch_orders

_RANKS = 8
# Two resources that do not get in each other's way, as the bounds and torch's scheduler have it.
_DEVICE = replace(device("h100"), crowded=False)
_CAPS = (1.05, 1.25)


def main(
    layers: Annotated[list[int], typer.Option("--layers")] = [2, 32],  # noqa: B006
    tokens: Annotated[list[int], typer.Option("--tokens")] = [32768, 131072],  # noqa: B006
    gigabytes: Annotated[list[int], typer.Option("--link", help="GB/s of one rank.")] = [40, 100, 300],  # noqa: B006
    effort: Annotated[float, typer.Option("--effort", help="Deterministic seconds of CP-SAT for two layers.")] = 30.0,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw two layers over 40 GB/s, and end.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Compare orders of forward and backward and print a table."""
    if picture is not None:
        picture.write_text(drawn())
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    for depth in layers:
        for length in tokens:
            program = captured(depth, length)
            for chunks, sync in ((1, "external"), (1, "in_graph"), (4, "external"), (4, "in_graph")):
                ready = lowered(program, _RANKS, chunks, sync)
                for rate in gigabytes:
                    about = {"layers": depth, "tokens": length, "chunks": chunks, "sync": sync}
                    for found in compared(ready, rate, effort if depth <= 2 else 0.0):
                        rows.append(about | found)
                        print(line(rows[-1]), flush=True)
    if out is not None:
        out.write_text(json.dumps({"machine": _machine(), "ranks": _RANKS, "rows": rows}, indent=1) + "\n")


def drawn() -> str:
    """The lanes of two layers with four groups of heads at 131,072 tokens, in program order and overlapped, as SVG."""
    program = lowered(captured(2, 131072), _RANKS, 4, "in_graph")
    link = "network-400g"
    ordered = (
        air.PassManager(f"overlap{{link={link} fused=true memory={_CAPS[-1]}}}", verify=False).run(program).program
    )
    lanes = {"program": program, "overlap": ordered}
    return lanes_svg({name: predicted_lanes(each, link=link, fused=True) for name, each in lanes.items()})


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
    problems = halves(program, fused_durations(fusion, _DEVICE, link), fusion)
    built = time.perf_counter() - start
    peak = max(p.peak(range(len(p.nodes))) for p in problems)
    rows = []
    for problem, theirs in zip(problems, torch_orders(program, problems), strict=True):
        orders = {"program": range(len(problem.nodes)), "torch": theirs}
        row: dict[str, Any] = {"half": problem.nodes[0].phase.value, "gigabytes": rate, "seconds": {}, "found": {}}
        row |= {"operations": len(problem.nodes), "bound_ms": 1e3 * problem.lower_bound}
        for cap in _CAPS:
            start = time.perf_counter()
            ours = best(problem, cap * peak)
            row["seconds"][f"{cap}"] = built / 2 + time.perf_counter() - start
            row["found"][f"{cap}"] = ours.name
            orders[f"ours {cap}"] = ours.order
        if effort:
            solution = solve(problem, ours.order, effort)
            row |= {"cp_sat_bound_ms": 1e3 * solution.bound, "cp_sat_optimal": solution.optimal}
            if solution.order is not None:
                orders["cp_sat"] = settled(problem, solution.order)
        row["orders"] = {name: _worth(problem, order) for name, order in orders.items()}
        rows.append(row | {"program_peak_gib": peak / 2**30})
    return rows


def _worth(problem: Problem, order: Sequence[int]) -> dict[str, float]:
    timeline = problem.timeline(order)
    return {
        "ms": 1e3 * timeline.makespan,
        "exposed_ms": 1e3 * timeline.exposed,
        "peak_gib": problem.peak(order) / 2**30,
    }


def line(row: dict[str, Any]) -> str:
    """One row as text: milliseconds, and those exposed, of each order; the bound; ours at most memory over it."""
    orders = row["orders"]
    cells = "  ".join(f"{name} {each['ms']:.1f} ({each['exposed_ms']:.1f})" for name, each in orders.items())
    about = f"{row['layers']:2} {row['tokens']:6} {row['chunks']} {row['sync']:8} {row['half']:8} {row['gigabytes']:3}"
    bound = max(row["bound_ms"], row.get("cp_sat_bound_ms", 0.0))
    ratio = orders[f"ours {_CAPS[-1]}"]["ms"] / bound
    return f"{about} GB/s: {cells}  bound {bound:.1f}  ours/bound {ratio:.3f}  {max(row['seconds'].values()):.1f} s"


def _machine() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}


if __name__ == "__main__":
    typer.run(main)
