"""Models that would be silently wrong if chunks of tokens or heads were taken for granted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from autosp_ir.testing import DenseReference
from tests.sampling import sampled

torch.set_num_threads(1)
PIPELINE = (
    "canonicalize,pad-tokens{multiple=4},token-partition,ulysses,head-chunk,tile{wide=1.5},differentiate,remat,"
    "grad-sync,lower-comm"
)


class Block(nn.Module):
    """Attention, an MLP five times as wide, and a head; `kv` key heads for four query heads."""

    def __init__(self, kv: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kv = kv
        self.embed, self.query = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.key, self.value = nn.Linear(16, 4 * kv), nn.Linear(16, 4 * kv)
        self.up, self.down, self.head = nn.Linear(16, 80), nn.Linear(80, 16), nn.Linear(16, 64)

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (self.query(x), k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != 4)
        return x + out.transpose(1, 2).flatten(2)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def wide(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        return F.gelu(hidden)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.attend(x, self.key(x), self.value(x))
        return self.loss(x + self.down(self.wide(x)), labels)


class Grouped(Block):
    def __init__(self) -> None:
        super().__init__(2)


class KeyIsValue(Block):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        k = self.key(x)
        x = self.attend(x, k, k)
        return self.loss(x + self.down(self.wide(x)) + k.mean(), labels)


class Rolled(Block):
    def wide(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        return hidden * hidden.roll(1, 1)


class Summed(Block):
    def wide(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        return hidden.cumsum(1) * 0.1


class Centred(Block):
    def wide(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        return hidden - hidden.mean(1, keepdim=True)


class Positioned(Block):
    def wide(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        return hidden * torch.arange(x.shape[1]).view(1, -1, 1).cos()


class SumOfTokens(Block):
    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).transpose(1, 2), labels, reduction="none").sum(1).mean()


class Flat(Block):
    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x.reshape(-1, 16)), labels.reshape(-1))


@pytest.mark.parametrize(("ranks", "length", "batch"), sampled([(2, 17, 3), (4, 33, 2)], 2))
@pytest.mark.parametrize(
    "kind",
    [Block, Grouped, KeyIsValue, Rolled, Summed, Centred, Positioned, SumOfTokens, Flat],
    ids=lambda k: k.__name__,
)
def test_exact_at_one_more_token_than_the_ranks_divide(kind: type[Block], ranks: int, length: int, batch: int) -> None:
    ids = torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[:, length // 2 :] = -100
    reference = DenseReference.of(kind(), {"input_ids": ids, "labels": labels})
    result = air.PassManager(PIPELINE).run(reference.program, mesh={"sp": ranks})
    assert result.statistics["tile"]["tiled"] >= 1
    reference.check(result.program)
