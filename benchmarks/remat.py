"""Saved sets at equal peak, ours against torch's and AutoSP's rule: `python -m benchmarks.remat --help`.

One joint graph of a Llama with 8B shapes and fake weights, on two ranks. Torch's partitioner runs with an
`activation_memory_budget`; the peak of what it saves, simulated, is the budget of ours. Compared is the time of what is
computed a second time, by the cost model. Nothing runs on a device.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import autosp_ir as air
from autosp_ir.analysis.cost import device, link
from autosp_ir.emit.partition import min_cut_saved
from autosp_ir.errors import PassError
from autosp_ir.ir.ops import Trait
from autosp_passes._remat.budget import Portfolio
from autosp_passes._remat.model import Outcome, StepModel
from autosp_passes._remat.rules import Semantics, may_recompute
from benchmarks.compile_parts import fake_llama
from benchmarks.gpu.sizes import Sizes

_PIPELINE = "canonicalize,pad-tokens,token-partition,ulysses,differentiate{decompose=true}"
_RANKS = 2
_FRACTIONS = (0.75, 0.5, 0.25, 0.15, 0.1)
_FRONT = 12
_SECONDS = 4.0


def joint_program(layers: int, tokens: int) -> air.Program:
    """The joint graph of a Llama with 8B shapes, one sequence of `tokens` over two ranks."""
    model = fake_llama(Sizes(layers=layers), torch.device("cpu"))
    ids = torch.zeros(1, tokens, dtype=torch.long)
    program = air.capture(model, {"input_ids": ids, "labels": ids.clone()})
    return air.PassManager(_PIPELINE, verify=False).run(program, mesh={"sp": _RANKS}).program


class Case:
    """One joint program with everything that is compared on it.

    Args:
        program: The program.
        rerun: What may run again, for both sides.
        on: Device that prices compute.
    """

    def __init__(self, program: air.Program, rerun: tuple[str, ...], on: str) -> None:
        self.program = program
        self.semantics = Semantics(program, rerun)
        start = time.perf_counter()
        self.model = StepModel(program, self.semantics, device(on), link("nvlink4"))
        self.model_seconds = time.perf_counter() - start
        start = time.perf_counter()
        self.portfolio = Portfolio(program, self.model, self.semantics)
        self.rules_seconds = time.perf_counter() - start

    def torch_choice(self, fraction: float) -> Outcome:
        """What torch's partitioner saves at a budget; collectives are saved, as it does with those it knows."""
        kept = {
            n.result
            for n in self.program.graph.nodes
            if n.results
            and n.op.traits & {Trait.COLLECTIVE, Trait.ATTENTION}
            and not may_recompute(n, self.semantics.rerun)
        }
        return self.model.play(self.model.numbers(min_cut_saved(self.program, (), kept, budget=fraction)))

    def row(self, fraction: float) -> dict[str, Any]:
        """Torch at a fraction, and ours at its peak."""
        start = time.perf_counter()
        theirs = self.torch_choice(fraction)
        torch_seconds = time.perf_counter() - start
        self.portfolio.rules["torch"] = theirs
        return {
            "fraction": fraction,
            "torch": _described(theirs),
            "torch_seconds": round(torch_seconds, 2),
            **self.at(theirs.peak),
        }

    def at(self, peak: float) -> dict[str, Any]:
        """Ours within a peak."""
        start = time.perf_counter()
        try:
            choice = self.portfolio.choose(peak, _SECONDS)
        except PassError as error:
            return {"milp": None, "portfolio": None, "infeasible": error.reason}
        seconds = time.perf_counter() - start
        milp = choice.candidates.get("milp")
        return {
            "milp": _described(milp) if milp is not None else None,
            "portfolio": {**_described(choice.outcome), "rule": choice.name},
            "seconds": round(seconds, 2),
        }

    def front(self) -> list[dict[str, Any]]:
        """Ours from the least possible peak to that of saving everything."""
        most = self.portfolio.rules["save-all"].peak
        least = self.portfolio.least(_SECONDS).peak
        budgets = [least + (most - least) * step / _FRONT for step in range(_FRONT, -1, -1)]
        return [{"budget_gib": round(b / 2**30, 3), **self.at(b)} for b in budgets]


def _described(outcome: Outcome) -> dict[str, float]:
    return {"peak_gib": round(outcome.peak / 2**30, 3), "extra_ms": round(outcome.extra * 1e3, 3)}


def _ratio(row: dict[str, Any], whose: str, over: str = "torch") -> float | None:
    if row.get(whose) is None or not row[over]["extra_ms"]:
        return None
    return round(float(row[whose]["extra_ms"]) / float(row[over]["extra_ms"]), 3)


def measure(layers: int, tokens: int, rerun: tuple[str, ...], on: str, program: air.Program) -> dict[str, Any]:
    """Every fraction, the rule of AutoSP at its own peak, and the front, for one joint program."""
    case = Case(program, rerun, on)
    sac = case.portfolio.rules["autosp-sac"]
    rules = {name: _described(o) for name, o in case.portfolio.rules.items()}
    against_sac = {"autosp-sac": _described(sac), **case.at(sac.peak)}
    rows = [case.row(f) for f in _FRACTIONS]
    case.portfolio.rules.pop("torch", None)
    front = case.front()
    for row in rows:
        row["milp_over_torch"], row["portfolio_over_torch"] = _ratio(row, "milp"), _ratio(row, "portfolio")
    against_sac["milp_over_sac"] = _ratio(against_sac, "milp", "autosp-sac")
    against_sac["portfolio_over_sac"] = _ratio(against_sac, "portfolio", "autosp-sac")
    return {
        "layers": layers,
        "tokens": tokens,
        "rerun": list(rerun),
        "nodes": len(case.model.nodes),
        "model_seconds": round(case.model_seconds, 2),
        "rules_seconds": round(case.rules_seconds, 2),
        "rules": rules,
        "against_sac": against_sac,
        "against_torch": rows,
        "front": front,
    }


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and worst ratios over all points, by what may run again."""
    found: dict[str, Any] = {}
    for rerun in sorted({tuple(c["rerun"]) for c in cases}):
        chosen = [c for c in cases if tuple(c["rerun"]) == rerun]
        rows = [r for c in chosen for r in c["against_torch"]]
        part: dict[str, Any] = {"points": len(rows), "infeasible": sum(r["portfolio"] is None for r in rows)}
        for whose in ("milp", "portfolio"):
            ratios = [r[f"{whose}_over_torch"] for r in rows if r[f"{whose}_over_torch"] is not None]
            sac = [c["against_sac"][f"{whose}_over_sac"] for c in chosen]
            part[whose] = {
                "over_torch_median": round(statistics.median(ratios), 3) if ratios else None,
                "over_torch_worst": max(ratios, default=None),
                "over_sac": [s for s in sac if s is not None],
            }
        part["slowest_solve"] = max((r.get("seconds", 0.0) for r in rows), default=0.0)
        found[" and ".join(rerun) or "nothing costly"] = part
    return found


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Peak against time of recomputation, one panel for each program."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(cases) // 2 or 1, 2, figsize=(10, 3.2 * (len(cases) // 2 or 1)), squeeze=False)
    for panel, case in zip(panels.flat, cases, strict=False):
        front = [r["portfolio"] for r in case["front"] if r["portfolio"] is not None]
        panel.plot([r["peak_gib"] for r in front], [r["extra_ms"] for r in front], "k.-", label="budget")
        theirs = [r["torch"] for r in case["against_torch"]]
        panel.plot([r["peak_gib"] for r in theirs], [r["extra_ms"] for r in theirs], "r^", label="torch, budgets")
        for (name, rule), marker in zip(sorted(case["rules"].items()), "sDov", strict=False):
            panel.plot(rule["peak_gib"], rule["extra_ms"], marker, color="tab:blue", fillstyle="none", label=name)
        again = " and ".join(case["rerun"]) or "nothing costly"
        panel.set_title(f"{case['layers']} layers, {case['tokens']:,} tokens; {again} may run again", fontsize=9)
        panel.set_xlabel("peak, GiB")
        panel.set_ylabel("recomputation, ms")
    panels.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(
    layers: Annotated[str, typer.Option(help="Decoder layers, with commas.")] = "4,32",
    tokens: Annotated[str, typer.Option(help="Sequence lengths, with commas.")] = "32768,131072",
    rerun: Annotated[
        str, typer.Option(help="What may run again: none, attention; each is measured.")
    ] = "none,attention",
    on: Annotated[str, typer.Option("--device", help="Device of the cost model.")] = "h200",
    out: Annotated[Path, typer.Option("-o", help="JSON to write; the plot goes beside it.")] = Path("build/remat.json"),
) -> None:
    """Compare, write one JSON object and plot the fronts of peak and time."""
    cases = []
    for count in (int(c) for c in layers.split(",")):
        for length in (int(t) for t in tokens.split(",")):
            program = joint_program(count, length)
            for again in rerun.split(","):
                cases.append(measure(count, length, () if again == "none" else (again,), on, program))
                _write(cases, on, out)
    print(json.dumps(summary(cases), indent=2))


def _write(cases: list[dict[str, Any]], on: str, out: Path) -> None:
    """Everything so far: torch's partitioner takes minutes for a deep model."""
    result = {
        "command": " ".join(["python -m benchmarks.remat", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "device": on,
        "ranks": _RANKS,
        "summary": summary(cases),
        "cases": cases,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(cases, out.with_suffix(".svg"))


if __name__ == "__main__":
    typer.run(main)
