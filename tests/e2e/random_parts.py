"""Parts of random models: norms, MLPs, and everything people do between tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS = 16, 4


class WideRMSNorm(nn.Module):
    """The norm of transformers: computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


class ChannelNorm(nn.Module):
    """A norm over a permuted layout, `[B, C, T]`."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y.transpose(1, 2)


class Gated(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24, bias), nn.Linear(WIDTH, 24, bias)
        self.down = nn.Linear(24, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Flat(nn.Module):
    """An MLP on `[B*T, C]`, written with in-place arithmetic and chunks."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48, bias), nn.Linear(24, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        first, second = self.up(x.reshape(b * t, c)).chunk(2, dim=-1)
        y: Tensor = self.down(F.gelu(first, approximate="tanh").mul_(second)).view(b, t, c)
        return y


class Einsum(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH, 24) / 4)
        self.down = nn.Parameter(torch.randn(24, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(24) / 4) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("btc,cd->btd", x, self.up)
        y = torch.relu(y if self.bias is None else y + self.bias)
        return torch.einsum("btd,dc->btc", y, self.down)


class HeadsAside(nn.Module):
    """Splits channels into groups, mixes inside them, and folds them back through a strange reshape."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4, bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        y = self.mix(x.view(b, t, c // 4, 4)).permute(2, 0, 1, 3)
        y = y.reshape(c // 4, b * t, 4).sigmoid().unflatten(1, (b, t))
        return torch.flatten(y.permute(1, 2, 0, 3), 2)


class TimeFirst(nn.Module):
    """Works on `[T, B, C]`, as recurrent code does."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.stack([torch.tanh(self.linear(x.permute(1, 0, 2))), x.permute(1, 0, 2)]).sum(0)
        return y.permute(1, 0, 2)


class TokenShift(nn.Module):
    """RWKV's shift: each token sees the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return x * self.mix + before * (1 - self.mix)


class Convolution(nn.Module):
    """A convolution over tokens; causal by padding on the left, or centred."""

    def __init__(self, causal: bool, groups: int) -> None:
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=0 if causal else 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = self.conv(F.pad(y, (2, 0)) if self.causal else y)
        return torch.transpose(y, 1, 2)


class OverTokens(nn.Module):
    """One plain function that mixes tokens."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SqueezeExcite(nn.Module):
    """Gates every token by a mean over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear(x.mean(dim=1)))[:, None, :]


class Memory(nn.Module):
    """Attention of every token to a few learned entries.

    Args:
        written: Whether a mean over the tokens is added to them.
    """

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.entries = nn.Parameter(torch.randn(5, WIDTH))
        self.query, self.pair = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        entries = self.entries.expand(x.shape[0], -1, -1)
        pair = self.pair(entries + x.mean(1, keepdim=True) if self.written else entries)
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.query(x), *pair.chunk(2, -1)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "plain": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(WIDTH),
    "wide": WideRMSNorm,
    "channel": ChannelNorm,
    "none": nn.Identity,
}

MLPS: dict[str, Callable[[bool], nn.Module]] = {
    "gated": Gated,
    "flat": Flat,
    "einsum": Einsum,
    "heads": HeadsAside,
    "time-first": TimeFirst,
    "sequential": lambda bias: nn.Sequential(nn.Linear(WIDTH, 24, bias), nn.GELU(), nn.Linear(24, WIDTH, bias)),
}

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "token-shift": TokenShift,
    "conv-causal": lambda: Convolution(causal=True, groups=1),
    "conv-centred": lambda: Convolution(causal=False, groups=WIDTH),
    "squeeze-excite": SqueezeExcite,
    "cumsum": lambda: OverTokens(lambda x: x.cumsum(1) / 8),
    "cumulative-mean": lambda: OverTokens(
        lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
    ),
    "roll": lambda: OverTokens(lambda x: x.roll(1, 1)),
    "flip": lambda: OverTokens(lambda x: x.flip(1)),
    "softmax": lambda: OverTokens(lambda x: x * x.softmax(dim=1)),
    "max": lambda: OverTokens(lambda x: x - x.amax(dim=1, keepdim=True)),
    "difference": lambda: OverTokens(lambda x: F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 1))),
    "strided": lambda: OverTokens(lambda x: x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]]),
    "first-token": lambda: OverTokens(lambda x: x + x[:, :1].tanh()),
    "standardise": lambda: OverTokens(lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)),
    "logsumexp": lambda: OverTokens(lambda x: x - x.logsumexp(1, keepdim=True)),
    "gram": lambda: OverTokens(lambda x: x @ (x.transpose(1, 2) @ x) / 64),
    "memory": lambda: Memory(written=False),
    "written-memory": lambda: Memory(written=True),
    "scores": lambda: OverTokens(lambda x: torch.tanh(x @ x.transpose(1, 2) / 16) @ x / 8),
}
