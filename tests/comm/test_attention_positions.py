"""Attention whose tokens stand where a tensor says: values, gradients, and what the layout rule refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autosp_ir as air
from autosp_ir.comm.attention_checks import located
from autosp_ir.errors import LayoutError, UnsupportedError
from autosp_ir.rewrite.rewriter import Rewriter

attention = torch.ops.autosp.attention
LENGTH = 12


def operands(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, LENGTH, 8), (2, 2, LENGTH, 8), (2, 2, LENGTH, 8)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def gradients(result: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out, lse = result
    return list(torch.autograd.grad(out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).cos().sum(), inputs))


@pytest.mark.parametrize("attributes", [{"causal": True}, {"causal": True, "window": 5}, {"window": 3}, {}], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_tokens_in_any_order_attend_as_in_order(attributes: dict[str, Any], documents: bool) -> None:
    q, k, v = operands()
    ids = torch.tensor([[0] * 5 + [1] * 7] * 2) if documents else None
    expected = attention(q, k, v, None, ids, **attributes)
    order, key_order = torch.randperm(LENGTH), torch.randperm(LENGTH)
    moved = [q[:, :, order], k[:, :, key_order], v[:, :, key_order]]
    found = attention(*moved, None, ids, **attributes, q_positions=order, kv_positions=key_order)
    torch.testing.assert_close(found[0], expected[0][:, :, order])
    torch.testing.assert_close(found[1], expected[1][:, :, order])
    expected_gradients = gradients(expected, [q, k, v])
    for a, b in zip(gradients(found, [q, k, v]), expected_gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("start", [0, 4, 30])
def test_tokens_one_behind_the_other_are_an_offset(start: int) -> None:
    q, k, v = operands()
    positions = torch.arange(start, start + LENGTH)
    assert located(positions, 0) == (start, None)
    keys = torch.arange(4, 4 + LENGTH)
    expected = attention(q, k, v, causal=True, q_offset=start, kv_offset=4)
    found = attention(q, k, v, causal=True, q_positions=positions, kv_positions=keys)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_keys_in_the_future_contribute_nothing() -> None:
    q, k, v = operands()
    out, lse = attention(
        q, k, v, causal=True, q_positions=torch.arange(LENGTH), kv_positions=torch.arange(LENGTH, 2 * LENGTH)
    )
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    assert not any(g.any() for g in torch.autograd.grad(out.sum() + lse.exp().sum(), [q, k, v]))


@pytest.mark.parametrize(
    ("positions", "offset"),
    [(torch.arange(LENGTH - 1), 0), (torch.arange(LENGTH).float(), 0), (torch.arange(LENGTH)[None], 0)],
)
def test_positions_that_do_not_fit_are_refused(positions: Tensor, offset: int) -> None:
    with pytest.raises(UnsupportedError, match="q_positions must be int64 of shape"):
        attention(*operands(), causal=True, q_offset=offset, q_positions=positions)


def test_positions_and_an_offset_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="both q_positions and q_offset=3"):
        attention(*operands(), causal=True, q_offset=3, q_positions=torch.arange(LENGTH))


# The layout rule -----------------------------------------------------------------------------------------------------


def sharded(gather: bool, positions: str | None, **attributes: Any) -> air.Program:
    """q, k and v of two ranks, cut along their tokens; keys gathered or not."""
    builder = air.ProgramBuilder(mesh={"sp": 2})
    q, k, v = (builder.input(name, (1, 2, LENGTH, 8), torch.float32) for name in "qkv")
    q, k, v = (builder.autosp.shard(x, 2, "sp", 2) for x in (q, k, v))
    if gather:
        k, v = (builder.autosp.all_gather(x, 2, "sp", 2, "replicate") for x in (k, v))
    if positions is not None:
        where = builder.aten.arange(LENGTH if positions == "cut" else LENGTH // 2, dtype=torch.int64)
        if positions == "cut":
            where = builder.autosp.shard(where, 0, "sp", 2)
        attributes["q_positions"] = where
        if not gather:
            attributes["kv_positions"] = where
    out, _ = builder.autosp.attention(q, k, v, **attributes)
    builder.output(builder.autosp.all_gather(out, 2, "sp", 2))
    return builder.build()


@pytest.mark.parametrize(("gather", "axis"), [(True, None), (False, "sp")])
def test_positions_cut_like_the_tokens_are_accepted(gather: bool, axis: str | None) -> None:
    program = sharded(gather, "cut", causal=True, local_axis=axis)
    program.verify()
    assert air.unresolved_attention(program, "sp") == []


@pytest.mark.parametrize("positions", [None, "whole"])
@pytest.mark.parametrize(("gather", "axis"), [(True, None), (False, "sp")])
def test_other_positions_are_refused(gather: bool, axis: str | None, positions: str | None) -> None:
    with pytest.raises(LayoutError, match="q_positions"):
        sharded(gather, positions, causal=True, local_axis=axis)


def test_without_a_mask_nobody_asks_where_tokens_stand() -> None:
    sharded(True, None).verify()


def test_cut_tokens_without_a_strategy_stay_unresolved() -> None:
    program = sharded(False, None, causal=True)
    assert len(air.unresolved_attention(program, "sp")) == 1


def test_positions_of_a_symbolic_length_do_not_shift() -> None:
    program = sharded(True, "cut", causal=True)
    (node,) = program.find("autosp.attention")
    with pytest.raises(UnsupportedError, match="need a length that is a number"):
        air.token_positions(Rewriter(program), node.arg("q"), "sp", 2, shift=1)
