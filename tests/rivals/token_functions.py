"""Losses that read tokens in every way that model code has: what is rewritten must compute the same number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.batches import IGNORE_INDEX, VOCAB, tokens

WIDTH = 16


class Parts(nn.Module):
    """Layers for a function to use; the loss is the function of embedded tokens `[B, S, C]`, ids and labels."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.embed, self.linear, self.head = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )
        self.score, self.positions = nn.Linear(WIDTH, 1), nn.Parameter(torch.randn(64, WIDTH))
        self.batch_norm, self.group_norm = nn.BatchNorm1d(WIDTH), nn.GroupNorm(4, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.bilinear, self.recurrent = nn.Bilinear(WIDTH, WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.function = function

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Map ids and labels `[B, S]` to a scalar."""
        loss: Tensor = self.function(self, torch.tanh(self.linear(self.embed(input_ids))), input_ids, labels)
        return loss


Function = Callable[[Parts, Tensor, Tensor, Tensor], Any]
FUNCTIONS: dict[str, Function] = {}


def function(f: Function) -> Function:
    """Register a function under its name."""
    FUNCTIONS[f.__name__] = f
    return f


def build(name: str, batch_size: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model around a function, and a batch with some labels ignored."""
    torch.manual_seed(0)
    ids = tokens(batch_size, length, seed=0)
    labels = ids.clone()
    labels[0, :5] = IGNORE_INDEX
    return Parts(FUNCTIONS[name]), {"input_ids": ids, "labels": labels}


def next_token(m: Parts, x: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The usual loss."""
    return F.cross_entropy(m.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **settings)


# -- losses ------------------------------------------------------------------------------------------------------------


@function
def label_smoothing(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x, labels, label_smoothing=0.1)


@function
def class_weights(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x, labels, weight=torch.linspace(0.1, 2, VOCAB), label_smoothing=0.2)


@function
def summed_loss(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x, labels, reduction="sum") / (labels[:, 1:] > 4).sum()


@function
def weighted_tokens(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    losses = next_token(m, x, labels, reduction="none")
    weight = torch.linspace(0, 1, losses.numel())
    return (losses * weight).sum() / weight.sum()


@function
def classes_second(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(m.head(x).transpose(1, 2), labels)


@function
def soft_targets(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(m.head(x).flatten(0, 1), m.head(m.linear(x)).detach().softmax(-1).flatten(0, 1))


@function
def log_probabilities(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.nll_loss(m.head(x).log_softmax(-1).transpose(1, 2), labels)


@function
def mean_squares(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.mse_loss(m.linear(x), x.detach()) + F.l1_loss(m.linear(x), x, reduction="sum")


@function
def divergence(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    uniform = torch.full((VOCAB,), 1 / VOCAB).expand(*x.shape[:2], VOCAB)
    return F.kl_div(m.head(x).log_softmax(-1), uniform, reduction="batchmean")


@function
def binary_targets(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.binary_cross_entropy_with_logits(m.linear(x), x.sigmoid().detach())


@function
def span_of_tokens(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(m.score(m.linear(x)).squeeze(-1) * m.positions[0, 0], ids[:, 0] % x.shape[1])


@function
def large_logits_penalty(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x, labels) + 1e-2 * m.head(x).logsumexp(-1).square().mean()


@function
def expert_balance(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    routed = m.head(x)[..., :4].softmax(-1)
    chosen = F.one_hot(routed.argmax(-1), 4).float().mean((0, 1))
    return next_token(m, x, labels) + (chosen * routed.mean((0, 1))).sum()


@function
def whole_batch_statistics(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x, labels) + x.var() + x.amax() + (1 + 0.01 * x).prod(1).mean()


@function
def contrast_between_rows(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    pooled = x.mean(1)
    return F.cross_entropy(pooled @ pooled.T, torch.arange(pooled.shape[0]))


@function
def rolled_labels(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(m.head(x).flatten(0, 1), labels.roll(-1, 1).flatten())


@function
def shifted_across_rows(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(m.head(x.reshape(-1, WIDTH))[:-1], labels.reshape(-1)[1:])


# -- some of the tokens ------------------------------------------------------------------------------------------------


@function
def every_other(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return F.cross_entropy(m.head(x[:, ::2]).flatten(0, 1), labels[:, ::2].flatten())


@function
def first_and_last(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return m.head(x[:, 0]).square().mean() + x[:, -1].sum() + m.head(x[:, -4:]).mean()


@function
def last_valid(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    last = (ids > 5).sum(1).clamp(1) - 1
    return m.head(x[torch.arange(x.shape[0]), last]).square().mean()


@function
def picked(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    index = (ids % x.shape[1])[..., None].expand_as(x)
    return next_token(m, x.gather(1, index) + torch.zeros_like(x).scatter_add(1, index, x), labels)


@function
def added_to_bins(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    bins = torch.zeros(x.shape[0], 8, WIDTH).scatter_add(1, (ids % 8)[..., None].expand_as(x), x)
    return m.head(bins).square().mean()


@function
def masked_mean(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    kept = (ids % 3 > 0).float()[..., None]
    return m.head((m.linear(x) * kept).sum(1) / kept.sum(1)).square().mean()


@function
def halves(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    first, second = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
    return m.head(first).square().mean() + second.sum() * 0.01


@function
def ordered(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x.sort(1).values, labels) + x.topk(3, dim=1).values.sum()


# -- tokens mixed with tokens ------------------------------------------------------------------------------------------


@function
def attention_pooling(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return m.head((m.score(x).softmax(1) * x).sum(1)).square().mean()


@function
def gram_matrix(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return (x.mT @ m.linear(x)).square().mean() + next_token(m, x, labels)


@function
def scores_of_pairs(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return torch.einsum("bsd,btd->bst", x, m.linear(x)).tanh().mean()


@function
def lower_triangle(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, (x @ x.mT).tril() @ x / 16, labels)


@function
def linear_attention(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    k = F.elu(x) + 1
    return next_token(m, k @ (k.mT @ x) / (k * k.sum(1, keepdim=True)).sum(-1, keepdim=True), labels)


@function
def causal_linear_attention(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    k = F.elu(m.linear(x)) + 1
    states = torch.einsum("bsd,bse->bsde", k, x).cumsum(1)
    return next_token(m, torch.einsum("bsd,bsde->bse", k, states), labels)


@function
def recurrence(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.recurrent(x[:, :4])[0], labels[:, :4].clamp(0))


@function
def torch_attention(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.attention(x, x, x, need_weights=False)[0], labels)


@function
def attention_weights(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    out, weights = m.attention(x, x, x)
    return next_token(m, out, labels) + weights.square().sum()


@function
def distance_bias(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    q = x.unflatten(2, (4, 4)).transpose(1, 2)
    positions = torch.arange(x.shape[1])
    bias = -(positions[:, None] - positions).abs().float()
    return next_token(m, F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2), labels)


@function
def learned_bias(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    q = x.unflatten(2, (4, 4)).transpose(1, 2)
    learned = m.positions[: x.shape[1]]
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=learned @ learned.T)
    return next_token(m, out.transpose(1, 2).flatten(2), labels)


@function
def learned_queries(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    k = x.unflatten(2, (4, 4)).transpose(1, 2)
    q = m.positions[:8].view(1, 8, 4, 4).transpose(1, 2).expand(x.shape[0], -1, -1, -1)
    return m.head(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)).square().mean()


@function
def few_keys(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    q = x.unflatten(2, (4, 4)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q[:, :, :4], q[:, :, :4])
    return next_token(m, out.transpose(1, 2).flatten(2), labels)


@function
def norms_over_tokens(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, F.normalize(x, dim=1) + x / x.norm() + F.layer_norm(x, x.shape[1:]), labels)


@function
def batch_norm(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.batch_norm(x.transpose(1, 2)).transpose(1, 2), labels)


@function
def group_norm(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.group_norm(x.transpose(1, 2)).transpose(1, 2), labels)


@function
def pooled_windows(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    y = F.avg_pool1d(x.transpose(1, 2), 2) + x.unfold(1, 2, 2).mean(-1).transpose(1, 2)
    return m.head(F.interpolate(y, scale_factor=2).transpose(1, 2)).square().mean()


@function
def spectrum(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, torch.fft.fft(x, dim=1).real + x.flip(1) + x.logcumsumexp(1), labels)


@function
def sequence_first(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.linear(x.transpose(0, 1)).transpose(0, 1), labels)


@function
def by_position(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    y = torch.where(torch.arange(x.shape[1])[:, None] < 5, x, -x) + m.positions[: x.shape[1]]
    return next_token(m, y + y.detach().mean(1, keepdim=True) + y.mean(0, keepdim=True), labels)


@function
def bilinear(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.bilinear(x, m.linear(x)), labels)


# -- operations on channels and rows -----------------------------------------------------------------------------------


@function
def preference(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return -F.logsigmoid(m.score(x) - m.score(m.linear(x))).mean()


@function
def gated_halves(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, F.glu(torch.cat([x, m.linear(x)], -1)), labels)


@function
def complex_rotation(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(m.score(x), m.linear(x)[..., :8])
    return next_token(m, torch.cat([turned.real, turned.conj().imag], -1), labels)


@function
def norm_of_rows(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, m.group_norm(x.flatten(0, 1)).view_as(x), labels)


@function
def similarities(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    y = m.linear(x)
    return next_token(m, x * F.cosine_similarity(x, y, -1).unsqueeze(-1), labels) + F.pairwise_distance(x, y).mean()


@function
def middle_values(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    least, most = torch.aminmax(x, dim=-1, keepdim=True)
    return next_token(m, (x - x.median(-1, keepdim=True).values) / (most - least + 1), labels)


@function
def filled_columns(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    some = torch.arange(3)
    y = x.index_fill(-1, some, 0.0).index_copy(-1, some + 4, m.linear(x)[..., :3])
    return next_token(m, y.scatter_reduce(-1, x.topk(2, -1).indices, x[..., :2], "sum"), labels)


@function
def counted_bins(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, x * (torch.bucketize(x, torch.linspace(-1, 1, 5)) & 1), labels)


@function
def dense_by_tensordot(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, torch.tensordot(x, m.linear.weight, 1) + torch.inner(x, m.linear.weight), labels)


# -- products that repeat one operand ----------------------------------------------------------------------------------


@function
def summary_by_token(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    summary = x.mean(1)[:, None, :, None] * m.linear.weight
    return next_token(m, torch.matmul(x.unsqueeze(2), summary).squeeze(2), labels)


@function
def summary_by_token_in_front(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    summary = x.mean(1)[None, :, :, None] * m.linear.weight
    return next_token(m, torch.matmul(x.transpose(0, 1).unsqueeze(2), summary).squeeze(2).transpose(0, 1), labels)


@function
def repeated_on_the_left(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    summary = x.mean(1)[:, None, :, None] * m.linear.weight
    return next_token(m, torch.matmul(summary, x.unsqueeze(-1)).squeeze(-1), labels)


@function
def weights_of_a_batch(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    return next_token(m, torch.matmul(x.unflatten(-1, (4, 4)), m.linear.weight[None, None, :4, :4]).flatten(2), labels)


@function
def summary_by_head(m: Parts, x: Tensor, ids: Tensor, labels: Tensor) -> Any:
    summary = x.mean(1)[:, None, :4, None] * m.linear.weight[:4, :4]
    return next_token(m, torch.matmul(x.unflatten(-1, (4, 4)), summary).flatten(2), labels)
