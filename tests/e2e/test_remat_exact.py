"""Every way to save, with and without chunks of tokens and heads: loss and all gradients are the dense model's."""

from __future__ import annotations

from functools import cache

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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("policy", _POLICIES)
def test_policies_with_chunks(policy: str, ranks: int) -> None:
    for chunks in _CHUNKS:
        reference().check(partitioned(reference().program, ranks, _pipeline(chunks, policy)), 1e-10)


@pytest.mark.parametrize("policy", ["autosp-sac", "budget fraction=0.9"])
def test_policies(policy: str) -> None:
    reference().check(partitioned(reference().program, 2, _pipeline("", policy)), 1e-10)
