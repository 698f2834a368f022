"""`check_pass`: everything a unit test of a pass should check, in one call and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.sim.lockstep import simulate
from autosp_ir.testing.compare import EquivalenceError
from autosp_ir.testing.equivalence import compare_runs
from autosp_ir.testing.filecheck import filecheck
from autosp_ir.testing.golden import check_golden, check_round_trip, read_program
from autosp_ir.testing.inputs import random_inputs
from autosp_ir.testing.promote import promote, promote_batch
from autosp_ir.testing.unresolved import with_gathered_attention

ProgramSource = Program | str | Path
"""A program, IR text, or the path of an `.ir` file."""

_BLOCKS_OF_TOKENS = 3


def check_pass(
    pipeline: str | Pass | type[Pass] | Sequence[Pass | type[Pass] | str],
    before: ProgramSource,
    after: ProgramSource | None = None,
    *,
    world: int = 1,
    expect: Mapping[str, int] | None = None,
    mesh: Mapping[str, int] | None = None,
    batch: Any = None,
    rtol: float = 1e-10,
    strict: bool = False,
    seed: int = 0,
    checks: str | None = None,
) -> PassResult:
    """Run a pass (or several) on a program and check the result in every way there is.

    The program before and the one made of it are verified and read back from their own text. The result is compared
    with `after`, operations are counted, and both run in float64 on the same inputs: *before* on the ranks of its
    own mesh (one, unless it is partitioned already), *after* on all its ranks in lockstep. Attention that no strategy
    has resolved yet runs on gathered tokens. Outputs of every rank and every gradient must agree.

    Args:
        pipeline: A pass, or pipeline text such as `"ulysses{fuse=qkv}"`.
        before: What to run it on.
        after: What it must make of it; a path is a golden file, which `pytest --update-golden` writes. None compares
            nothing.
        world: Ranks on the axis "sp"; 1 runs the pass without a mesh, unless the program has one.
        expect: How often an operation must occur afterwards, by IR name or by its last part: `{"all_to_all": 4}`.
        mesh: Axis sizes, where one axis called "sp" is not enough.
        batch: User inputs; drawn at random when None, as are parameters that the program is not bound to.
        rtol: Largest relative error; see `autosp_ir.testing.compare`.
        strict: Run the pipeline with `strict=True`.
        seed: Of random inputs.
        checks: FileCheck directives that the text of the result must match; see `autosp_ir.testing.filecheck`.

    Returns:
        What the pass manager returned.

    Raises:
        EquivalenceError: A comparison failed (an AssertionError, with a report or a diff).
        AutoSPError: The program is invalid, or the pass refused it.
    """
    source = read_program(before)
    source.verify()
    check_round_trip(source)
    axes = dict(mesh) if mesh is not None else {"sp": world} if world > 1 else dict(source.mesh)
    result = PassManager([pipeline] if isinstance(pipeline, Pass | type) else pipeline).run(
        source, mesh=axes, strict=strict
    )
    check_round_trip(result.program)
    _check_counts(result.program, expect or {})
    if after is not None:
        check_golden(result.program, after)
    if checks is not None:
        filecheck(result.program, checks)
    assert_same_numbers(source, result.program, batch, rtol=rtol, seed=seed)
    return result


def count_operations(program: Program, name: str) -> int:
    """How many nodes have an operation of this IR name, or one that ends in `.name`."""
    return sum(n.op.name == name or n.op.name.endswith(f".{name}") for n in program.graph.nodes)


def _check_counts(program: Program, expect: Mapping[str, int]) -> None:
    wrong = [
        f"{name}: {found} instead of {count}"
        for name, count in expect.items()
        if (found := count_operations(program, name)) != count
    ]
    if wrong:
        raise EquivalenceError(
            f"the program does not hold the expected operations: {'; '.join(wrong)}",
            hint="print result.program, or read result.remarks for what the pass left alone",
        )


def assert_same_numbers(
    before: Program, after: Program, batch: Any = None, *, rtol: float = 1e-10, seed: int = 0, least: float = 0.0
) -> None:
    """Check that two programs compute the same outputs and gradients, in float64 on all their ranks.

    Args:
        before: The program to compare with.
        after: What became of it; attention that no strategy has resolved runs on gathered tokens.
        batch: User inputs; drawn at random when None, as are parameters that the programs are not bound to.
        rtol: Largest relative error.
        seed: Of random inputs.
        least: Magnitude that every output and gradient counts as at least; see `compare_runs`.

    Raises:
        EquivalenceError: They differ. AutoSPError when one of them cannot be run.
    """
    length = _BLOCKS_OF_TOKENS * max([2, *after.mesh.values(), *before.mesh.values()])
    drawn = random_inputs(promote(before), length=length, seed=seed)
    given = drawn.batch if batch is None else promote_batch(batch)
    runs = [
        simulate(promote(runnable), given, tensors=drawn.tensors, tangents=drawn.tangents, seed=seed)
        for runnable in (with_gathered_attention(before), with_gathered_attention(after))
    ]
    report = compare_runs(
        runs[1], runs[0], rtol=rtol, least=least, title="the program after the pass against the one before"
    )
    report.check()


__all__ = ["ProgramSource", "assert_same_numbers", "check_pass", "count_operations"]
