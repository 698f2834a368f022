"""Model code that fills a tensor slice by slice, as latent attention and rotations of pairs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.batches import VOCAB, tokens

WIDTH = 16
HEADS = 4

Writer = Callable[["Written", Tensor], Tensor]
WRITERS: dict[str, Writer] = {}


class Written(nn.Module):
    """One layer of attention behind a function that writes slices."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.row, self.head = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, VOCAB)
        self.writer = writer

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Map ids and labels `[B, S]` to a scalar."""
        x = self.writer(self, self.embed(input_ids))
        q, k, v = (self.heads(projection(x)) for projection in self.projections)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x + attended).flatten(0, 1), labels.flatten())

    def heads(self, x: Tensor) -> Tensor:
        """`[B, S, C]` as `[B, H, S, C / H]`."""
        return x.view(*x.shape[:-1], HEADS, -1).transpose(1, 2)


def build(name: str, batch_size: int = 2, length: int = 15) -> tuple[nn.Module, dict[str, Any]]:
    """A model around a writer, and a batch."""
    torch.manual_seed(0)
    ids = tokens(batch_size, length, seed=0)
    return Written(WRITERS[name]), {"input_ids": ids, "labels": ids.clone()}


def writer(f: Writer) -> Writer:
    """Register a writer under its name."""
    WRITERS[f.__name__] = f
    return f


# -- all of new memory, side by side -----------------------------------------------------------------------------------


@writer
def two_parts(m: Written, x: Tensor) -> Tensor:
    made = x.new_empty(*x.shape[:-1], WIDTH)
    made[..., :5].copy_(m.linear(x)[..., :5])
    made[..., 5:].copy_(x[..., 5:].sin())
    return made


@writer
def heads_share_a_part(m: Written, x: Tensor) -> Tensor:
    own = m.heads(m.linear(x))
    made = own.new_empty(own.shape)
    made[..., :2] = own[..., 2:]
    made[..., 2:] = own[:, :1, :, :2].expand(-1, HEADS, -1, -1)
    return made.transpose(1, 2).flatten(2)


@writer
def out_of_order(m: Written, x: Tensor) -> Tensor:
    made, y = torch.zeros_like(x), m.linear(x)
    made[..., 12:], made[..., :4], made[..., 4:12] = y[..., :4], y[..., 12:], y[..., 4:12].cos()
    return made


@writer
def another_dtype(m: Written, x: Tensor) -> Tensor:
    made = torch.empty(x.shape, dtype=torch.float64)
    made[..., :6], made[..., 6:] = x[..., :6].float(), m.linear(x)[..., 6:]
    return made.to(x.dtype)


JOINED = frozenset(WRITERS)
"""What is a concatenation, and written as one."""


# -- in any other way --------------------------------------------------------------------------------------------------


@writer
def every_second(m: Written, x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    made[..., ::2], made[..., 1::2] = m.linear(x)[..., :8], x[..., 8:].cos()
    return made


@writer
def overlapping(m: Written, x: Tensor) -> Tensor:
    made, y = torch.empty_like(x), m.linear(x)
    made[..., :12], made[..., 4:] = y[..., :12], y[..., :12]
    return made


@writer
def read_in_between(m: Written, x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    made[..., :8] = m.linear(x)[..., :8]
    made[..., 8:] = made[..., :8].clone().cos()
    return made


@writer
def part_of_zeros(m: Written, x: Tensor) -> Tensor:
    made = x.new_zeros(*x.shape[:-1], WIDTH)
    made[..., 3:7] = m.linear(x)[..., :4]
    return made + x


@writer
def part_of_a_value(m: Written, x: Tensor) -> Tensor:
    made = x.clone()
    made[..., 3:7] = m.linear(x)[..., :4]
    return made


@writer
def a_column(m: Written, x: Tensor) -> Tensor:
    made: Tensor = m.linear(x)
    made[..., 0], made[..., -1] = x[..., 3], m.row[0]
    return made


@writer
def a_row_in_front(m: Written, x: Tensor) -> Tensor:
    made: Tensor = m.linear(x).transpose(1, 2).transpose(0, 1).contiguous()
    made[1] = x[..., 2].sin()
    return made.transpose(0, 1).transpose(1, 2)


@writer
def numbers(m: Written, x: Tensor) -> Tensor:
    made: Tensor = m.linear(x)
    made[..., 0], made[..., 1:3] = 0.5, 0.0
    return made


@writer
def the_first_row_of_the_batch(m: Written, x: Tensor) -> Tensor:
    made: Tensor = m.linear(x)
    made[0] = x[1].cos()
    return made


# -- along tokens ------------------------------------------------------------------------------------------------------


@writer
def the_first_token(m: Written, x: Tensor) -> Tensor:
    made: Tensor = m.linear(x)
    made[:, 0] = m.row
    return made


@writer
def shifted_tokens(m: Written, x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, 1:] = m.linear(x)[:, :-1]
    return made + x


@writer
def later_tokens(m: Written, x: Tensor) -> Tensor:
    made = x.clone()
    made[:, 4:] = m.linear(x)[:, 4:]
    return made


ALONG_TOKENS = frozenset({"the_first_token", "shifted_tokens", "later_tokens"})
"""What is gathered, with a remark; nothing else is."""
