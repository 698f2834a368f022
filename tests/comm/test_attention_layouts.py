"""The layout rules of attention, refusal by refusal: masks, positions, learned biases, keys of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autosp_ir.comm.layout import infer_layout
from autosp_ir.comm.rules.attention import unresolved_axes
from autosp_ir.errors import LayoutError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, Placement, Shard, TensorType, TupleType
from autosp_ir.rewrite.builder import ProgramBuilder

SP = "sp"
BATCH, HEADS, TOKENS = Shard(0), Shard(1), Shard(2)
SHAPE = (2, 2, 4, 4)


class Site:
    """q, k and v `[2, 2, 4, 4]` (local), placed as asked."""

    def __init__(self, q: Placement, k: Placement, stage: Stage = Stage.JOINT, ranks: int = 2) -> None:
        self.b = ProgramBuilder(mesh={SP: ranks}, stage=stage)
        self.q, self.k, self.v = (self.value(p, SHAPE) for p in (q, k, k))

    def value(self, placement: Placement, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Value:
        """An input of local shape."""
        return self.b.input(f"x{len(self.b.program.signature.inputs)}", shape, dtype, layout={SP: placement})

    def attention(self, **attributes: Any) -> Placement:
        """Where the output is."""
        out, lse = self.b.autosp.attention(self.q, self.k, self.v, **attributes)
        assert out.type.layout[SP] == lse.type.layout[SP]
        found: Placement = out.type.layout[SP]
        return found

    def bias_gradient(self, bias: Value, **attributes: Any) -> tuple[Placement, ...]:
        """Where the four gradients are."""
        like = self.q.tensor_type.layout[SP]
        out, dout = self.value(like, SHAPE), self.value(like, SHAPE)
        lse = self.value(like, SHAPE[:3])
        made = self.b.autosp.attention_bias_backward(
            dout, None, self.q, self.k, self.v, bias, None, out, lse, **attributes
        )
        return tuple(m.type.layout[SP] for m in made)


@pytest.mark.parametrize("cut", [BATCH, HEADS, INVARIANT])
def test_whole_heads_or_rows_are_local(cut: Placement) -> None:
    assert Site(cut, cut).attention(causal=True) == cut


@pytest.mark.parametrize("pair", [(HEADS, INVARIANT), (INVARIANT, HEADS), (HEADS, BATCH), (PARTIAL, INVARIANT)])
def test_queries_and_keys_are_cut_alike(pair: tuple[Placement, Placement]) -> None:
    with pytest.raises(LayoutError):
        Site(*pair).attention()


@pytest.mark.parametrize("cut", [Shard(0, 2), Shard(3)])
def test_other_cuts_are_refused(cut: Placement) -> None:
    with pytest.raises(LayoutError, match="cannot run cut along"):
        Site(cut, cut).attention()


@pytest.mark.parametrize(
    ("cut", "shape", "placement", "accepted"),
    [
        (HEADS, (2, 2, 4, 4), HEADS, True),
        (HEADS, (2, 2, 4, 4), INVARIANT, False),
        (HEADS, (2, 2, 4, 4), BATCH, False),
        (HEADS, (2, 1, 4, 4), INVARIANT, True),
        (HEADS, (4, 4), INVARIANT, True),
        (HEADS, (4, 4), Shard(0), False),
        (BATCH, (2, 1, 4, 4), BATCH, True),
        (BATCH, (2, 1, 4, 4), INVARIANT, False),
        (INVARIANT, (2, 1, 4, 4), BATCH, False),
    ],
)
def test_a_bias_follows_what_is_cut(
    cut: Placement, shape: tuple[int, ...], placement: Placement, accepted: bool
) -> None:
    site = Site(cut, cut)
    bias = site.value(placement, shape)
    if accepted:
        assert site.attention(bias=bias) == cut
        return
    with pytest.raises(LayoutError, match=r"mask|cut"):
        site.attention(bias=bias)


@pytest.mark.parametrize(
    ("cut", "placement", "accepted"),
    [(HEADS, INVARIANT, True), (HEADS, Shard(0), False), (BATCH, Shard(0), True), (BATCH, INVARIANT, False)],
)
def test_segment_ids_know_rows_and_no_heads(cut: Placement, placement: Placement, accepted: bool) -> None:
    site = Site(cut, cut)
    ids = site.value(placement, (2, 4), torch.int64)
    if accepted:
        assert site.attention(segment_ids=ids) == cut
        return
    with pytest.raises(LayoutError, match="mask"):
        site.attention(segment_ids=ids)


@pytest.mark.parametrize("placement", [Shard(2), Shard(0), PARTIAL])
def test_masks_of_unresolved_attention_stay_whole(placement: Placement) -> None:
    site = Site(TOKENS, TOKENS, Stage.FORWARD)
    with pytest.raises(LayoutError):
        site.attention(bias=site.value(placement, (2, 1, 4, 4)))


def test_cut_tokens_are_refused_behind_differentiation() -> None:
    with pytest.raises(LayoutError, match="still cut along the tokens"):
        Site(TOKENS, TOKENS).attention()


@pytest.mark.parametrize("placement", [INVARIANT, Shard(0)])
@pytest.mark.parametrize(("keys", "axis"), [(INVARIANT, None), (TOKENS, SP)])
def test_positions_are_cut_like_their_tokens(keys: Placement, axis: str | None, placement: Placement) -> None:
    site = Site(TOKENS, keys)
    where = site.value(placement, (4,), torch.int64)
    own = {"q_positions": where} if keys == INVARIANT else {"q_positions": where, "kv_positions": where}
    if placement == Shard(0):
        assert site.attention(causal=True, local_axis=axis, **own) == TOKENS
        return
    with pytest.raises(LayoutError, match="positions must be cut"):
        site.attention(causal=True, local_axis=axis, **own)


def test_positions_of_whole_keys_are_whole() -> None:
    site = Site(TOKENS, INVARIANT)
    rows, columns = (site.value(Shard(0), (4,), torch.int64) for _ in range(2))
    with pytest.raises(LayoutError, match="kv_positions must be cut"):
        site.attention(causal=True, q_positions=rows, kv_positions=columns)


@pytest.mark.parametrize("placement", [INVARIANT, Shard(1)])
def test_segment_ids_of_cut_queries_are_whole(placement: Placement) -> None:
    site = Site(TOKENS, INVARIANT)
    where, ids = site.value(Shard(0), (4,), torch.int64), site.value(placement, (2, 4), torch.int64)
    if placement == INVARIANT:
        assert site.attention(q_positions=where, segment_ids=ids) == TOKENS
        return
    with pytest.raises(LayoutError, match="stays whole"):
        site.attention(q_positions=where, segment_ids=ids)


@pytest.mark.parametrize(("keys", "axis", "accepted"), [(INVARIANT, None, True), (TOKENS, SP, False)])
def test_a_bias_over_all_keys_needs_all_keys(keys: Placement, axis: str | None, accepted: bool) -> None:
    site = Site(TOKENS, keys)
    bias = site.value(TOKENS, (1, 1, 4, 4))
    if accepted:
        assert site.attention(bias=bias) == TOKENS
        return
    with pytest.raises(LayoutError, match="meets the keys of one rank"):
        site.attention(bias=bias, local_axis=axis)


@pytest.mark.parametrize(
    ("cut", "shape", "placement", "expected"),
    [
        (HEADS, (1, 2, 4, 4), HEADS, HEADS),
        (HEADS, (1, 1, 4, 4), INVARIANT, PARTIAL),
        (HEADS, (4, 4), INVARIANT, PARTIAL),
        (BATCH, (1, 2, 4, 4), INVARIANT, PARTIAL),
        (INVARIANT, (1, 2, 4, 4), INVARIANT, INVARIANT),
        (HEADS, (1, 2, 4, 4), INVARIANT, None),
    ],
)
def test_the_gradient_of_a_learned_bias(
    cut: Placement, shape: tuple[int, ...], placement: Placement, expected: Placement | None
) -> None:
    site = Site(cut, cut)
    bias = site.value(placement, shape)
    if expected is None:
        with pytest.raises(LayoutError, match="must be cut like the queries"):
            site.bias_gradient(bias)
        return
    assert site.bias_gradient(bias) == (cut, cut, cut, expected)


def test_a_learned_bias_is_replicated_once_its_attention_is_placed() -> None:
    waiting, placed = (Site(cut, cut, Stage.FORWARD) for cut in (TOKENS, HEADS))
    assert waiting.attention(bias=waiting.b.parameter("bias", (1, 1, 8, 8), torch.float64)) == TOKENS
    learned = placed.b.parameter("bias", (1, 1, 4, 4), torch.float64)
    with pytest.raises(LayoutError, match="%bias is Invariant, needs a gradient"):
        placed.attention(bias=learned)
    assert placed.attention(bias=placed.b.autosp.invariant_to_replicate(learned, SP, 2)) == HEADS


@pytest.mark.parametrize(
    ("keys", "placement", "message"),
    [
        (INVARIANT, TOKENS, None),
        (INVARIANT, INVARIANT, "must be cut like the queries"),
        (INVARIANT, HEADS, "must be cut like the queries"),
        (TOKENS, TOKENS, "meets the keys of one rank"),
    ],
)
def test_a_dropout_mask_is_that_of_its_queries(keys: Placement, placement: Placement, message: str | None) -> None:
    site = Site(TOKENS, keys)
    drawn = {"keep": site.value(placement, SHAPE, torch.bool), "local_axis": None if keys == INVARIANT else SP}
    if message is None:
        assert site.attention(dropout=0.5, **drawn) == TOKENS
        return
    with pytest.raises(LayoutError, match=message):
        site.attention(dropout=0.5, **drawn)


@pytest.mark.parametrize("cut", [HEADS, INVARIANT, PARTIAL])
def test_torch_s_attention_of_three_dimensions_is_whole(cut: Placement) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (2, 4, 4), torch.float64, layout={SP: cut})
    if cut == INVARIANT:
        assert b.aten.scaled_dot_product_attention(x, x, x).type.layout[SP] == INVARIANT
        return
    with pytest.raises(LayoutError, match="keeps a shard"):
        b.aten.scaled_dot_product_attention(x, x, x)


def test_dropout_of_torch_s_attention_is_refused_on_a_shard() -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    x = b.input("x", (2, 2, 4, 4), torch.float64, layout={SP: HEADS})
    with pytest.raises(LayoutError, match="dropout"):
        b.aten.scaled_dot_product_attention(x, x, x, None, 0.5)


@pytest.mark.parametrize("pair", [(INVARIANT, HEADS), (HEADS, INVARIANT)])
def test_torch_s_attention_of_three_dimensions_takes_no_shard_among_whole_values(
    pair: tuple[Placement, Placement],
) -> None:
    b = ProgramBuilder(mesh={SP: 2}, stage=Stage.JOINT)
    q, k = (b.input(f"x{i}", (2, 4, 4), torch.float64, layout={SP: p}) for i, p in enumerate(pair))
    with pytest.raises(LayoutError, match="keeps a shard"):
        b.aten.scaled_dot_product_attention(q, k, k)


def test_one_rank_draws_the_mask_of_torch_s_attention_and_knows_where_its_tokens_stand() -> None:
    b = ProgramBuilder(mesh={SP: 1}, stage=Stage.JOINT)
    x = b.input("x", SHAPE, torch.float64)
    assert b.aten.scaled_dot_product_attention(x, x, x, None, 0.5).type.layout[SP] == INVARIANT
    assert Site(TOKENS, INVARIANT, ranks=1).attention(causal=True) == TOKENS


@pytest.mark.parametrize(
    ("k", "v", "axis", "expected"),
    [
        (TOKENS, TOKENS, None, [SP]),
        (TOKENS, TOKENS, SP, []),
        (INVARIANT, INVARIANT, None, []),
        (INVARIANT, TOKENS, None, [SP]),
        (TOKENS, INVARIANT, None, [SP]),
    ],
)
def test_attention_is_resolved_by_whole_keys_and_values(
    k: Placement, v: Placement, axis: str | None, expected: list[str]
) -> None:
    site = Site(TOKENS, INVARIANT, Stage.FORWARD)
    operands = (site.q, site.value(k, SHAPE), site.value(v, SHAPE))
    assert unresolved_axes(site.b.program.graph.create("autosp.attention", operands, {"local_axis": axis})) == expected


def _gradients(site: Site, dout: Value, dlse: Value | None) -> Any:
    """Where the gradients are; no kernel looks at the shapes."""
    like = site.q.tensor_type.layout[SP]
    out, lse = site.value(like, SHAPE), site.value(like, SHAPE[:3])
    operands = (dout, dlse, site.q, site.k, site.v, None, None, out, lse)
    kind = TupleType(tuple(TensorType(SHAPE, torch.float64) for _ in range(3)))
    made = site.b.program.graph.create("autosp.attention_backward", operands, type=kind)
    return infer_layout(made, site.b.program, SP)


@pytest.mark.parametrize(
    ("length", "heads", "accepted"), [(3, 2, True), (3, 4, False), (4, 2, True), (4, 4, False), (4, 1, False)]
)
def test_an_absent_gradient_is_as_long_as_a_shard(length: int, heads: int, accepted: bool) -> None:
    site = Site(HEADS, HEADS)
    zeros = site.b.aten.zeros([2, heads, 4, 4][:length], dtype=torch.float64)
    given = (zeros, None) if length == 4 else (site.value(HEADS, SHAPE), zeros)
    if accepted:
        assert _gradients(site, *given) == (HEADS, HEADS, HEADS)
        return
    with pytest.raises(LayoutError, match="other operands are"):
        _gradients(site, *given)


def test_a_partial_gradient_meets_zeros_and_no_other_whole_one() -> None:
    site = Site(INVARIANT, INVARIANT)
    dout = site.value(PARTIAL, SHAPE)
    zeros = site.b.aten.zeros([2, 2, 4], dtype=torch.float64)
    assert _gradients(site, dout, zeros) == (PARTIAL, PARTIAL, PARTIAL)
    with pytest.raises(LayoutError, match="once per rank"):
        _gradients(site, dout, site.value(INVARIANT, SHAPE[:3]))


@pytest.mark.parametrize("cut", [BATCH, HEADS])
def test_a_learned_bias_that_is_constant_along_the_cut_has_no_gradient_of_its_length(cut: Shard) -> None:
    # The masks may be constant there; how often the gradient of one counts is not known.
    site = Site(cut, cut)
    shape = [1 if d == cut.dim else n for d, n in enumerate(SHAPE)]
    bias = site.b.aten.expand(site.value(INVARIANT, tuple(shape)), list(SHAPE))
    assert site.attention(bias=bias) == cut
    with pytest.raises(LayoutError, match="the learned bias"):
        site.bias_gradient(bias)
