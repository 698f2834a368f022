"""Every pass that spares memory with every other: loss and all gradients are the dense model's, and memory is counted.

A covering sample of the product runs in every run: every pair of settings of two passes occurs in it.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest

from autosp_ir.analysis.liveness import liveness
from autosp_ir.pipeline import PassManager
from autosp_ir.sim.lockstep import simulate
from autosp_ir.testing import DenseReference
from tests.e2e.pairwise import Case, pairwise
from tests.models import build

_OFFLOAD = "offload{device=cpu host_link=nvlink-c2c smallest=0}"
_OVERLAP = "overlap{device=cpu link=network-400g host_link=nvlink-c2c memory=2.0}"
_FACTORS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2, 4),
    "remat": ("save-all", "min-cut", "autosp-sac"),
    "head-chunk": ("", "head-chunk"),
    "tile": ("", "tile{wide=1.5}", "tile{wide=1.5} early-loss-gradient"),
    "place": ("joint", "overlapped"),
}
_MORE_PLACES = ("lowered",)
_MORE_POLICIES = (
    "min-cut aggressive=true",
    "budget fraction=0.9",
    "budget fraction=0.9 rerun=attention,collectives",
)


@cache
def reference(name: str) -> DenseReference:
    return DenseReference.of(*build(name, batch_size=2, length=64, num_hidden_layers=1))


def _pipeline(case: Case) -> str:
    tile, _, early = case["tile"].partition(" ")
    place = case["place"]
    passes = [
        *("canonicalize", "pad-tokens{multiple=4}", "token-partition", "ulysses", case["head-chunk"], tile),
        *("differentiate", f"remat{{policy={case['remat']}}}", early),
        *((_OFFLOAD, "grad-sync", "lower-comm") if place == "joint" else ("grad-sync", "lower-comm")),
        *({"joint": (), "lowered": (_OFFLOAD,), "overlapped": (_OVERLAP, _OFFLOAD)}[place]),
    ]
    return ",".join(p for p in passes if p)


def _cells() -> list[Any]:
    sample = pairwise(_FACTORS)
    every = _FACTORS | {
        "remat": (*_FACTORS["remat"], *_MORE_POLICIES),
        "place": (*_FACTORS["place"], *_MORE_PLACES),
    }
    product = [dict(zip(every, values, strict=True)) for values in itertools.product(*every.values())]
    rest = [case for case in product if case not in sample]
    marked = [(case, ()) for case in sample] + [(case, (pytest.mark.long,)) for case in rest]
    return [pytest.param(case, id="-".join(str(v) for v in case.values()), marks=marks) for case, marks in marked]


@pytest.mark.slow
@pytest.mark.parametrize("case", _cells())
def test_combinations_are_exact(case: Case) -> None:
    assert _check("llama-gqa", case) > 0


@pytest.mark.parametrize("ranks", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 4])
@pytest.mark.parametrize("name", ["llama-tied", pytest.param("plain", marks=pytest.mark.long)])
def test_tied_weights(name: str, ranks: int) -> None:
    tile = "tile{wide=1.5} early-loss-gradient"
    _check(name, {"ranks": ranks, "remat": "save-all", "head-chunk": "head-chunk", "tile": tile, "place": "overlapped"})


def _check(name: str, case: Case) -> int:
    """Compare with the dense model, loss, gradients and predicted memory; returns the bytes in host memory."""
    dense = reference(name)
    result = PassManager(_pipeline(case)).run(dense.program, mesh={"sp": case["ranks"]})
    dense.check(result.program, 1e-10)
    report = liveness(result.program)
    figures = result.statistics["offload"]
    assert figures["peak_bytes"] <= figures["peak_bytes_before"]
    assert figures.get("offloaded_bytes", 0) == report.host_bytes
    assert set(simulate(result.program, dense.batch).peak_bytes) == {report.peak_bytes}
    return report.host_bytes
