"""Operations that read several tokens are exact: kept sharded where a rule exists, gathered with a remark elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from tests.rivals.line import run_line, run_sharded
from tests.rivals.models import Convolved, Flattened, Pooled, Shifted, batch, decoder


def rolled(x: Tensor) -> Tensor:
    return x.roll(1, dims=1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def last_token(x: Tensor) -> Tensor:
    return x[:, -1:]


def mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def largest(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True)


def spread(x: Tensor) -> Tensor:
    return x.std(1, keepdim=True)


@pytest.mark.parametrize(
    ("body", "gathered", "whole"),
    [
        (Pooled(mean), [], 1),
        (Pooled(largest), ["aten.amax"], 1),
        (Pooled(spread), ["aten.std.dim"], 1),
        (Pooled(last_token), ["aten.slice.Tensor"], 1),
        (Convolved(), ["aten.conv1d"], 1),
        (Shifted(rolled), ["aten.roll"], 0),
        (Shifted(sliced), ["aten.slice.Tensor", "aten.slice.Tensor"], 0),
        (Shifted(padded), ["aten.pad"], 0),
        (Flattened(), [], 0),
    ],
    ids=["mean", "max", "std", "last", "conv1d", "roll", "slice-cat", "pad", "flat"],
)
@pytest.mark.parametrize(("length", "ranks"), [(32, 4), (31, 2)])
def test_exact_and_gathered_no_further_than_needed(
    body: nn.Module, gathered: list[str], whole: int, length: int, ranks: int
) -> None:
    line = run_line(decoder(body), batch(length=length), ranks)
    if length % ranks == 0:
        assert line.gathered == gathered
    # The layer on what was pooled, and the convolution; every other layer runs on a rank's tokens alone.
    assert len(line.whole_products) == whole


def test_strict_refuses_to_gather() -> None:
    program = air.capture(decoder(Shifted(rolled)), batch())
    with pytest.raises(air.UnsupportedError, match=r"aten\.roll") as raised:
        air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": 2}, strict=True)
    assert "strict=True" in str(raised.value) and "models.py" in str(raised.value)


def test_strict_admits_sums_over_tokens() -> None:
    program = air.capture(decoder(Pooled(mean)), batch())
    result = air.PassManager(air.DEFAULT_PIPELINE).run(program, mesh={"sp": 2}, strict=True)
    assert not [r for r in result.remarks if r.kind == "missed"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_flat_rows_keep_every_sequence_apart(batch_size: int) -> None:
    run_sharded(decoder(Flattened()), batch(batch_size=batch_size), 4)


def test_pooling_as_the_loss() -> None:
    class Classifier(nn.Module):
        def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(97, 32), nn.Linear(32, 5)
            self.pool = pool

        def forward(self, input_ids: Tensor, target: Tensor) -> dict[str, Tensor]:
            x = self.pool(torch.tanh(self.embed(input_ids)))[:, 0]
            return {"loss": F.cross_entropy(self.head(x), target)}

    for pool in (mean, largest):
        ids = batch()["input_ids"]
        run_line(Classifier(pool), {"input_ids": ids, "target": torch.tensor([1, 4])}, 2, seq_dims={"input_ids": 1})
