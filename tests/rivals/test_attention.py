"""Queries, keys and values are found by what the attention reads, however the model makes and reuses them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from benchmarks.correctness.models import Attention as Body
from benchmarks.correctness.models import merged
from tests.models import build
from tests.rivals.line import Line, run_sharded
from tests.rivals.models import attend, batch, decoder, heads
from tests.sampling import sampled


def keys_as_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = heads(k)
    return merged(F.scaled_dot_product_attention(heads(q), key, key, is_causal=True)) + v


def everything_shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, q, q) + k + v


def shared_by_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v) + attend(torch.tanh(q), k, v)


def used_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v) * torch.sigmoid(k) + v


def by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        value=heads(v), query=heads(q), is_causal=True, key=heads(k), dropout_p=0.0, attn_mask=None, scale=0.3
    )
    return merged(out)


def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask))


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[1]
    scores = heads(q) @ heads(k).mT * 0.35
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return merged(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ heads(v))


def both_directions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


@pytest.mark.parametrize(
    ("function", "attentions"),
    [
        (keys_as_values, 1),
        (everything_shared, 1),
        (shared_by_two, 2),
        (used_again, 1),
        (by_keyword, 1),
        (by_mask, 1),
        (by_matmul, 1),
        (both_directions, 1),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
@pytest.mark.parametrize("length", [32, 33])
def test_shared_and_spelled_attention(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], attentions: int, length: int
) -> None:
    line = run_sharded(decoder(function), batch(length=length), 2)
    assert len(line.attentions) == attentions


def test_one_tensor_travels_once() -> None:
    line = run_sharded(decoder(keys_as_values), batch(), 2)
    # q and the shared k there, out back.
    assert sent(line) == 3


def sent(line: Line, phase: air.Phase = air.Phase.FORWARD) -> int:
    """All-to-alls of a phase."""
    return line.count("_c10d_functional.all_to_all_single", phase)


@pytest.mark.parametrize(("kv_heads", "ranks"), sampled([(2, 2), (8, 2), (1, 2), (1, 4), (2, 4)], 3))
def test_keys_and_values_travel_unexpanded(kv_heads: int, ranks: int) -> None:
    model, example = build("llama-mha", batch_size=2, length=32, kv_heads=kv_heads)
    line = run_sharded(model, example, ranks)
    simulated = air.simulate(line.result.program, example)
    layers, width, tokens = 2, 32 // 8, 2 * 32 // ranks
    # Replicated only as far as the ranks ask for: lcm(key heads, ranks) heads of keys and values.
    travelling = kv_heads if kv_heads % ranks == 0 else ranks
    expected = layers * (8 + 2 * travelling + 8) * tokens * width * 4
    forward = sum(c.bytes for c in simulated.comm if c.op == "all_to_all" and c.phase == "forward")
    backward = sum(c.bytes for c in simulated.comm if c.op == "all_to_all" and c.phase != "forward")
    assert forward == expected and backward == expected


class Stateful(nn.Module):
    """Keys and values of the first layer, read by the second one too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Body(attend)
        self.query = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, C]` to `[B, S, C]`."""
        k, v = self.first.k(x), self.first.v(x)
        y = x + attend(self.first.q(x), k, v)
        return attend(self.query(y), k, v)


def test_keys_shared_between_layers() -> None:
    line = run_sharded(decoder(Stateful()), batch(), 2)
    assert len(line.attentions) == 2
