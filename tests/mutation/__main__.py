"""Break each layout rule and each check of the verifier, one at a time: `python -m tests.mutation --json FILE`."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutation.reasons import REASONS
from tests.mutation.runner import MutationRun, Verdict, summary

RULES = [
    f"autosp_ir.comm.rules.{name}"
    for name in (
        *(
            "attention",
            "base",
            "chunk_loop",
            "chunks",
            "collectives",
            "constants",
            "creation",
            "indexing",
            "loss",
            "matmul",
        ),
        *("normalisation", "parts", "pointwise", "random", "reductions", "views"),
    )
]
CHECKS = [
    "autosp_ir.comm.inference",
    "autosp_ir.comm.layout_check",
    "autosp_ir.ir.verify",
    "autosp_ir.ir.verify_comm",
    "autosp_ir.ir.verify_types",
]
TESTS = [
    "tests/comm/test_layout.py",
    "tests/comm/test_layout_operators.py",
    "tests/comm/test_attention_layouts.py",
    "tests/comm/test_rule_refusals.py",
    "tests/comm/test_layout_checks.py",
    "tests/ir/test_verify_inputs.py",
    "tests/comm/test_layout_rules.py",
    "tests/ir/test_verify.py",
    "tests/comm/test_random_masks.py",
    "tests/comm/test_uniform.py",
    "tests/comm/test_host_memory.py",
    "tests/comm/test_chunk_loop.py",
]

console = Console()


def main(
    modules: Annotated[list[str] | None, typer.Argument(help="Parts of module names; all when none.")] = None,
    share: Annotated[float, typer.Option(help="Part of the mutants of conditions and arithmetic to run.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Of tests for each mutant.")] = 20.0,
    tests: Annotated[list[str] | None, typer.Option(help="Test files that have to notice.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    state: Annotated[Path | None, typer.Option(help="Verdicts, one a line: those in it are not run again.")] = None,
    survivors: Annotated[bool, typer.Option(help="Run the survivors in --state again, and nothing else.")] = False,
) -> None:
    """Run mutants against the tests that can notice them, and list those that survive."""
    chosen = [m for m in RULES + CHECKS if not modules or any(part in m for part in modules)]
    for module in chosen:
        importlib.import_module(module)
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("running the tests as they are", total=None)

        def progress(verdict: Verdict, done: int, total: int) -> None:
            if state is not None:
                with state.open("a") as lines:
                    lines.write(json.dumps(asdict(verdict)) + "\n")
            alive = sum(v.caught_by is None for v in run.verdicts)
            bar.update(task, completed=done, total=total, description=f"{alive} survivors")

        known = _read(state)
        again = [m for m, v in known.items() if v.caught_by is None] if survivors else None
        run = MutationRun(
            chosen, share, seconds, progress, [v for m, v in known.items() if m not in (again or ())], again
        )
        arguments = ["-q", "--no-header", "-p", "no:cacheprovider", *(tests or TESTS)]
        code = pytest.main(arguments, plugins=[run])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise typer.Exit(int(code))
    result = summary(run.verdicts, REASONS) | {"modules": chosen, "share_of_conditions": share, "seconds": seconds}
    console.print_json(json.dumps(result))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def _read(state: Path | None) -> dict[str, Verdict]:
    """The last verdict about each mutant."""
    lines = state.read_text().splitlines() if state is not None and state.exists() else []
    verdicts = [Verdict(**json.loads(line)) for line in lines]
    return {v.mutant: v for v in verdicts}


if __name__ == "__main__":
    typer.run(main)
