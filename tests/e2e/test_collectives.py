"""What travels: Ulysses' collectives and their bytes against the formula with unexpanded keys and values."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from torch import nn

from autosp_ir.capture.program import capture
from autosp_ir.pipeline import DEFAULT_PIPELINE
from autosp_ir.sim.lockstep import Simulation, simulate
from tests.e2e.line import partitioned
from tests.models import build
from tests.sampling import sampled

BATCH, HEADS, LAYERS, BYTES = 2, 8, 2, 4


def simulated(name: str, ranks: int, length: int, pipeline: str = DEFAULT_PIPELINE) -> tuple[Simulation, nn.Module]:
    model, batch = build(name, batch_size=BATCH, length=length)
    return simulate(partitioned(capture(model, batch), ranks, pipeline), batch), model


def sent_per_layer(ranks: int, length: int, kv_heads: int, head_width: int) -> list[int]:
    """Bytes that each rank hands over in one layer's forward: q, k, v, and the output back.

    Each rank holds S/P tokens of all heads. Keys and values have Hkv heads, repeated only until P divides them.
    """
    tokens = math.ceil(length / ranks)
    travelling = math.lcm(kv_heads, ranks)
    row = BATCH * tokens * head_width * BYTES
    return [row * HEADS, row * travelling, row * travelling, row * HEADS]


@pytest.mark.parametrize("ranks", sampled([4, 2, 8], 3))
@pytest.mark.parametrize(
    ("name", "kv_heads", "head_width"), [("llama-mha", 8, 4), ("llama-gqa", 2, 4), ("llama-mqa", 1, 4), ("qwen3", 2, 8)]
)
def test_all_to_alls_carry_unexpanded_keys_and_values(name: str, kv_heads: int, head_width: int, ranks: int) -> None:
    length = 32 if name != "llama-gqa" else 33
    sim, model = simulated(name, ranks, length)
    expected = Counter(sent_per_layer(ranks, length, kv_heads, head_width) * LAYERS)
    exchanges = [c for c in sim.comm if c.op == "all_to_all"]
    for phase in ("forward", "backward"):
        assert Counter(c.bytes for c in exchanges if c.phase == phase) == expected
    assert all(c.wire_bytes == c.bytes * (ranks - 1) // ranks for c in exchanges)
    _check_reductions(sim, model)


def _check_reductions(sim: Simulation, model: nn.Module) -> None:
    """Besides the exchanges: one sum of the loss, and one sum of every parameter's gradient."""
    others = [c for c in sim.comm if c.op != "all_to_all"]
    assert {c.op for c in others} == {"all_reduce"}
    assert [c.bytes for c in others if c.phase == "forward"] == [BYTES]
    gradients = sorted(p.numel() * BYTES for p in model.parameters())
    assert sorted(c.bytes for c in others if c.phase == "backward") == gradients


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("name", "kv_heads"), [("llama-mha", 8), ("llama-gqa", 2), ("llama-mqa", 1)])
def test_fused_exchanges_send_the_same_bytes_in_half_the_calls(name: str, kv_heads: int, ranks: int) -> None:
    sim, _ = simulated(name, ranks, 32, DEFAULT_PIPELINE.replace("ulysses", "ulysses{fuse=qkv}"))
    q, k, v, out = sent_per_layer(ranks, 32, kv_heads, 4)
    for phase in ("forward", "backward"):
        sent = Counter(c.bytes for c in sim.comm if c.op == "all_to_all" and c.phase == phase)
        assert sent == Counter([q + k + v, out] * LAYERS)


def test_one_rank_communicates_nothing() -> None:
    sim, _ = simulated("llama-gqa", 1, 32)
    assert sim.comm == []
