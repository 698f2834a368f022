"""A package of passes outside of the library, installed for real: found, run, and passing its own tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import autosp_ir as air
from tests.gloo import run_ranks
from tests.models import build

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "plugin_package"


def install(package: Path, target: Path) -> dict[str, str]:
    """Install a package without the network; returns an environment that has it."""
    source = target.parent / f"{target.name}-source"
    shutil.copytree(package, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    path = os.pathsep.join(map(str, (target, ROOT, ROOT / "passes")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python(arguments: Sequence[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python away from the repository."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install(PACKAGE, tmp_path_factory.mktemp("plugin") / "site")


def test_its_passes_are_listed_and_run_in_pipelines(installed: dict[str, str], tmp_path: Path) -> None:
    listed = python(["-m", "autosp_ir.cli", "passes", "--json"], installed, tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert {"all-gather-kv", "ring-attention", "fold-unit-scale", "ulysses"} <= set(json.loads(listed.stdout))
    golden = ROOT / "tests" / "golden" / "block_partitioned.ir"
    run = python(
        ["-m", "autosp_ir.cli", "opt", str(golden), "-p", "fold-unit-scale,ring-attention", "--mesh", "sp=4"],
        installed,
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "autosp.permute" in run.stdout


@pytest.mark.slow
def test_its_own_tests_pass(installed: dict[str, str], tmp_path: Path) -> None:
    tests = shutil.copytree(PACKAGE / "tests", tmp_path / "tests")
    ran = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)], installed, tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def strategies() -> dict[str, type[air.Pass]]:
    """The strategies of the package, from its source."""
    sys.path.insert(0, str(PACKAGE / "src"))
    try:
        from strategies_example.all_gather_kv import AllGatherKV
        from strategies_example.ring_attention import RingAttention
    finally:
        sys.path.remove(str(PACKAGE / "src"))
    return {AllGatherKV.name: AllGatherKV, RingAttention.name: RingAttention}


@pytest.mark.parametrize("strategy", ["all-gather-kv", "ring-attention"])
@pytest.mark.parametrize("name", ["mistral", "llama-mqa"])
def test_windows_and_few_key_heads_are_exact(name: str, strategy: str) -> None:
    model, batch = build(name, length=33)
    passes: list[air.Pass | type[air.Pass] | str] = [
        "canonicalize,pad-tokens,token-partition",
        strategies()[strategy](),
    ]
    program = air.PassManager(passes).run(air.capture(model, batch), mesh={"sp": 4}).program
    air.testing.assert_equivalent(model, program, batch, world=4)


def step_errors(rank: int, world: int, strategy: str) -> tuple[float, float]:
    """Relative errors of loss and gradients of one step against the dense model."""
    from tests.emit.steps import largest_error, measure

    model, batch = build("llama-gqa", length=33)
    loss, gradients = measure(model, model, batch)
    passes: list[air.Pass | type[air.Pass] | str] = [
        "canonicalize,pad-tokens,token-partition",
        strategies()[strategy](),
    ]
    pipeline = air.PassManager([*passes, "differentiate,remat,grad-sync,lower-comm"]).passes
    step = air.parallelize(model, batch, pipeline=pipeline, backend="aot_eager")
    found_loss, found = measure(model, step, batch)
    return abs(found_loss - loss) / abs(loss), largest_error(found, gradients)


@pytest.mark.gloo
@pytest.mark.parametrize("strategy", ["all-gather-kv", "ring-attention"])
def test_a_step_on_two_processes_equals_dense(strategy: str) -> None:
    for errors in run_ranks(step_errors, 2, strategy, timeout=250.0):
        assert max(errors) <= 1e-5
