"""Masks as values: what is drawn, what is made again from it, and attention under a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import autosp_ir as air
from autosp_ir.comm import attention_kernels
from autosp_ir.ir.types import INVARIANT

ops = torch.ops.autosp
SHAPE = [3, 5, 7]
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_dense_mask_is_that_of_torch(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = [F.dropout(torch.ones(SHAPE, dtype=dtype), p) != 0 for _ in range(2)]
    end = torch.get_rng_state()
    torch.manual_seed(0)
    states = [ops.random_state(None, SHAPE, p, device=CPU["device"], dtype=dtype) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), end)
    made = [ops.keep_mask(s, SHAPE, p, device=CPU["device"], dtype=dtype) for s in states]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), end)


@pytest.mark.parametrize("rng", ["global", "per_rank"])
def test_a_mask_is_made_again_from_its_state(rng: str) -> None:
    state = ops.random_state(None, SHAPE, 0.5, rng, **CPU)
    first = ops.keep_mask(state, SHAPE, 0.5, rng, **CPU)
    ops.random_state(state, SHAPE, 0.5, rng, **CPU)
    assert torch.equal(ops.keep_mask(state, SHAPE, 0.5, rng, **CPU), first)


def test_ranks_and_states_have_streams_of_their_own() -> None:
    torch.manual_seed(0)
    states = [ops.random_state(None, [64], 0.5, "per_rank", **CPU) for _ in range(3)]
    masks = [ops.keep_mask(s, [64], 0.5, "per_rank", **CPU) for s in states]
    for rank in range(4):
        index = torch.tensor([rank])
        masks += [ops.keep_mask(s, [64], 0.5, "per_rank", **CPU, index=index, axis="sp") for s in states]
    assert len({tuple(m.tolist()) for m in masks}) == len(masks)


def test_misuse_is_refused() -> None:
    with pytest.raises(air.UnsupportedError, match="per_rank, global"):
        ops.random_state(None, SHAPE, 0.5, "often", **CPU)
    state = ops.random_state(None, SHAPE, 0.5, **CPU)
    with pytest.raises(air.UnsupportedError, match="rank's own"):
        ops.keep_mask(state, SHAPE, 0.5, **CPU, index=torch.tensor([0]), axis="sp")
    with pytest.raises(air.UnsupportedError, match="cannot be reproduced"):
        ops.random_state(None, SHAPE, 0.5, device=torch.device("meta"), dtype=torch.float32)


def naive(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) * keep / (1 - p)) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("tiles", [False, True])
def test_attention_under_a_mask(tiles: bool, through_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        for name, value in {"_TILE_ELEMENTS": 64, "_MAX_ROWS": 3, "_MIN_ROWS": 1, "_MIN_KEYS": 4}.items():
            monkeypatch.setattr(attention_kernels, name, value)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    keep = torch.rand(2, 4, 9, 9) > 0.3
    runs = [ops.attention(q, k, v, causal=True, dropout=0.3, keep=keep), naive(q, k, v, keep, 0.3)]
    losses = [out.sin().sum() + (lse.square().sum() if through_lse else 0.0) for out, lse in runs]
    found, expected = (torch.autograd.grad(loss, (q, k, v)) for loss in losses)
    torch.testing.assert_close(runs[0], runs[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dropout": 0.0}, "is given a mask"),
        ({"keep": None}, "is given no mask"),
        ({"keep": torch.ones(2, 1, 3, 3, dtype=torch.bool)}, "does not fit"),
        ({"keep": torch.ones(2, 4, 3, 3)}, "does not fit"),
        ({"dropout": 1.0}, "probability 1.0"),
    ],
)
def test_masks_that_do_not_fit_attention(change: dict[str, Any], words: str) -> None:
    q = torch.randn(2, 4, 3, 8)
    with pytest.raises(air.UnsupportedError, match=words):
        ops.attention(q, q, q, **({"dropout": 0.3, "keep": torch.ones(2, 4, 3, 3, dtype=torch.bool)} | change))


def masked(**own: Any) -> air.Program:
    b = air.ProgramBuilder(mesh={"sp": 2})
    x = b.input("x", (2, 8, 4))
    state = b.autosp.random_state(None, [2, 4, 4], 0.5, "per_rank", **CPU)
    ranks = b.aten.arange(2, dtype=torch.int64, device=CPU["device"])
    index = b.autosp.shard(ranks, 0, "sp", 2) if own.pop("cut", True) else ranks
    keep = b.autosp.keep_mask(state, [2, 4, 4], 0.5, own.pop("rng", "per_rank"), **CPU, index=index, axis="sp", dim=1)
    y = b.aten.mul.Tensor(b.autosp.shard(x, 1, "sp", 2), keep)
    b.output(b.autosp.all_gather(y, 1, "sp", 2))
    return b.build()


def test_a_mask_of_ones_own_is_a_shard() -> None:
    program = masked()
    (keep,) = program.find("autosp.keep_mask")
    assert keep.result.tensor_type.layout["sp"] == air.Shard(1)
    program.verify()


@pytest.mark.parametrize("own", [{"cut": False}, {"rng": "global"}])
def test_a_mask_of_ones_own_needs_a_rank_and_no_dense_model(own: dict[str, Any]) -> None:
    with pytest.raises(air.LayoutError):
        masked(**own)


@pytest.mark.parametrize(("length", "cut"), [(1, False), (2, False), (4, True)])
def test_a_rank_s_index_is_one_number_of_a_cut_value(length: int, cut: bool) -> None:
    b = air.ProgramBuilder(mesh={"sp": 2})
    state = b.autosp.random_state(None, [12, 4], 0.5, "per_rank", **CPU)
    numbers = b.aten.arange(length, dtype=torch.int64, device=CPU["device"])
    where = {"index": b.autosp.shard(numbers, 0, "sp", 2) if cut else numbers, "axis": "sp", "dim": 0}
    with pytest.raises(air.LayoutError, match="does not say which rank this is"):
        b.autosp.keep_mask(state, [12, 4], 0.5, "per_rank", **CPU, **where)


def test_a_state_is_the_same_everywhere_and_a_mask_in_blocks_is_cut_in_blocks() -> None:
    b = air.ProgramBuilder(mesh={"sp": 2})
    state = b.autosp.random_state(None, [12, 4], 0.5, "per_rank", **CPU)
    assert state.type.layout["sp"] == INVARIANT
    index = b.autosp.shard(b.aten.arange(2, dtype=torch.int64, device=CPU["device"]), 0, "sp", 2)
    where = {"index": index, "axis": "sp", "dim": 0, "outer": 3}
    keep = b.autosp.keep_mask(state, [12, 4], 0.5, "per_rank", **CPU, **where)
    assert keep.type.layout["sp"] == air.Shard(0, 3)


def test_a_mask_of_all_ranks_is_drawn_from_what_all_ranks_know() -> None:
    b = air.ProgramBuilder(mesh={"sp": 2})
    own = b.input("own", (5056,), torch.uint8, layout={"sp": air.Shard(0)})
    with pytest.raises(air.LayoutError, match="what all ranks know"):
        b.autosp.keep_mask(own, [12, 4], 0.5, "per_rank", **CPU)


def test_a_mask_that_nothing_reads_is_a_lost_dropout() -> None:
    b = air.ProgramBuilder(mesh={"sp": 2}, facts=["canonical"])
    x = b.input("x", (2, 8, 4))
    state = b.autosp.random_state(None, [2, 8, 4], 0.5, "per_rank", **CPU)
    keep = b.autosp.keep_mask(state, [2, 8, 4], 0.5, "per_rank", **CPU)
    dropped = b.aten.mul.Tensor(x, keep)
    b.output(dropped)
    program = b.build()
    program.verify()
    program.graph.output_node.set_args(((x,),))
    program.graph.erase(dropped.producer)
    with pytest.raises(air.VerifyError, match="dropout is lost"):
        program.verify()
    program.graph.erase(keep.producer)
    with pytest.raises(air.VerifyError, match="dropout is lost"):
        program.verify()
