"""Steps that passes met for the first time in a review: each is exact through the whole pipeline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from autosp_ir.testing import DenseReference

_ENTRIES = 12
_CUT = "canonicalize,pad-tokens,token-partition"
_REST = "differentiate,remat,grad-sync,lower-comm"


class Merged(nn.Module):
    """A weight with a low-rank one added to it: its gradient is computed with, to make theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(_ENTRIES, 8), nn.Linear(8, 8), nn.Linear(8, _ENTRIES)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        weight = self.inner.weight + 0.5 * self.up @ self.down
        logits = self.head(F.linear(self.table(input_ids), weight, self.inner.bias))
        return {"loss": F.cross_entropy(logits.view(-1, _ENTRIES), labels.view(-1))}


class Pooled(nn.Module):
    """Attention to every other token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(_ENTRIES, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in "qkv")

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        tokens = self.table(input_ids)
        seen = tokens[:, ::2]
        heads = [x.unflatten(-1, (4, 2)).transpose(1, 2) for x in (self.q(tokens), self.k(seen), self.v(seen))]
        return {"loss": F.scaled_dot_product_attention(*heads).pow(2).mean() + 0 * labels.sum()}


class Selecting(nn.Module):
    """Looks up rows of a parameter by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(_ENTRIES, 8))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = [torch.index_select(self.table, 0, ids) for ids in input_ids]
        return {"loss": (found[0] * found[1].tanh()).pow(2).mean() + 0 * labels.sum()}


class Stacking(nn.Module):
    """Stacks along a new first dimension what has its tokens in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(_ENTRIES, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.table(input_ids).transpose(0, 1)
        return {"loss": torch.stack([x, self.linear(x).tanh()]).sum(0).pow(2).mean() + 0 * labels.sum()}


class Flat(nn.Module):
    """Looks up all tokens of a batch in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(_ENTRIES, 8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.table(input_ids.reshape(-1)).view(*input_ids.shape, 8)
        return {"loss": found.pow(2).mean() + 0 * labels.sum()}


class Counting(nn.Module):
    """Reads a buffer that it updates."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(_ENTRIES, 8).requires_grad_(trained)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        return {"loss": (self.table(input_ids) * (1 + 0.1 * self.calls)).pow(2).mean() + 0 * labels.sum()}


def reference(model: nn.Module) -> DenseReference:
    torch.manual_seed(0)
    ids = torch.randint(0, _ENTRIES, (2, 8))
    return DenseReference.of(model.double(), {"input_ids": ids, "labels": ids})


def check(found: DenseReference, pipeline: str, ranks: int = 2) -> air.PassResult:
    result = air.PassManager(pipeline).run(found.program, mesh={"sp": ranks})
    found.check(result.program)
    return result


@pytest.mark.parametrize("options", ["", "{bucket=auto}", "{bucket=auto embeddings=gather}"])
def test_a_gradient_that_is_computed_with_stays_out_of_buckets(options: str) -> None:
    pipeline = f"{_CUT},ulysses,{_REST.replace('grad-sync', f'grad-sync{options}')}"
    statistics = check(reference(Merged()), pipeline).statistics["grad-sync"]
    assert statistics.get("buckets", 0) == int("bucket" in options)


@pytest.mark.parametrize("ulysses", ["ulysses", "ulysses{fuse=qkv}", "ulysses,head-chunk{chunks=2 fuse=qkv}"])
def test_keys_of_another_length_travel_apart(ulysses: str) -> None:
    check(reference(Pooled()), f"{_CUT},{ulysses},{_REST}")


@pytest.mark.parametrize("model", [Selecting, Stacking])
@pytest.mark.parametrize("decompose", ["false", "true"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_decompositions_turn_around_stays_cut(model: type[nn.Module], decompose: str, ranks: int) -> None:
    pipeline = f"{_CUT},{_REST.replace('differentiate', f'differentiate{{decompose={decompose}}}')}"
    check(reference(model()), pipeline, ranks)


@pytest.mark.parametrize("how", ["auto", "gather", "reduce"])
def test_tokens_in_one_row_are_reduced(how: str) -> None:
    check(reference(Flat()), f"{_CUT},{_REST.replace('grad-sync', f'grad-sync{{embeddings={how}}}')}")


@pytest.mark.parametrize("trained", [True, False])
def test_an_eager_run_leaves_buffers_alone(trained: bool) -> None:
    model = Counting(trained)
    found = reference(model)
    assert float(model.calls) == 0.0
    check(found, f"{_CUT},{_REST}" if trained else _CUT)
