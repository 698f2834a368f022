"""Every way to save, with and without chunks of tokens and heads: loss and all gradients are the dense model's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from autosp_ir.testing import DenseReference
from tests.e2e.line import partitioned
from tests.models import build

_POLICIES = (
    "save-all",
    "autosp-sac",
    "min-cut",
    "budget fraction=0.9",
    "budget fraction=0.9 rerun=attention,collectives",
)
_CHUNKS = ("", "tile{wide=1.5},", "head-chunk,", "head-chunk,tile{wide=1.5},")


@cache
def reference() -> DenseReference:
    return DenseReference.of(*build("llama-gqa", batch_size=2, length=64))


def _pipeline(chunks: str, policy: str) -> str:
    forward = "canonicalize,pad-tokens{multiple=4},token-partition,ulysses"
    return f"{forward},{chunks}differentiate,remat{{policy={policy}}},grad-sync,lower-comm"


def _cells() -> list[Any]:
    """Every policy, number of ranks and kind of chunks; each policy once in every run, with one of the others."""
    cells = []
    for p, policy in enumerate(_POLICIES):
        for r, ranks in enumerate((1, 2, 4)):
            for c, chunks in enumerate(_CHUNKS):
                sampled = r == p % 3 and c == (p + 1) % 4
                cells.append(pytest.param(policy, ranks, chunks, marks=() if sampled else pytest.mark.long))
    return cells


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "ranks", "chunks"), _cells())
def test_policies_with_chunks(policy: str, ranks: int, chunks: str) -> None:
    reference().check(partitioned(reference().program, ranks, _pipeline(chunks, policy)), 1e-10)


@pytest.mark.parametrize("policy", ["autosp-sac", "budget fraction=0.9"])
def test_policies(policy: str) -> None:
    reference().check(partitioned(reference().program, 2, _pipeline("", policy)), 1e-10)
