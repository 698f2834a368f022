"""The attention operator pair against dense attention in plain arithmetic."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_ir._torch_compat import new_fake_mode
from autosp_ir.comm import attention_kernels
from autosp_ir.errors import UnsupportedError

attention = torch.ops.autosp.attention
CPU_FLASH, BLOCKWISE = "cpu-flash", "blockwise"


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the whole score matrix; rows without a visible key give 0 and -inf."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    query = torch.arange(q.shape[2], device=q.device)[:, None] + q_offset
    key = torch.arange(k.shape[2], device=q.device)[None] + kv_offset
    visible = torch.ones_like(query - key, dtype=torch.bool)[None, None]
    if causal:
        visible = visible & (key <= query)
    if window is not None:
        visible = visible & ((query - key).abs() < window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, query] == segment_ids[:, key])[:, None]
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        visible = visible & (bias > -torch.inf)
        scores = scores + bias
    live = visible.expand_as(scores).any(-1)
    scores = scores.masked_fill(~visible, -torch.inf)
    safe = torch.where(live[..., None], scores, 0.0)
    out = torch.where(live[..., None], safe.softmax(-1) @ v, 0.0)
    return out, torch.where(live, safe.logsumexp(-1), -torch.inf)


def tensors(
    heads: int = 4,
    kv_heads: int = 4,
    queries: int = 7,
    keys: int = 7,
    width: int = 4,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, width), (2, kv_heads, keys, width), (2, kv_heads, keys, width)]
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in shapes]


def segments(*lengths: int) -> Tensor:
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([row, row.flip(0)])


def gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor], with_lse: bool) -> tuple[Tensor, ...]:
    out, lse = outputs
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weights).sum()
    if with_lse:
        finite = torch.where(lse == -torch.inf, 0.0, lse)
        loss = loss + (finite * torch.linspace(0.5, 2, lse.numel(), dtype=lse.dtype).view_as(lse)).sum()
    return torch.autograd.grad(loss, inputs, retain_graph=True)


FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"causal": True, "scale": 0.3},
    "window": {"causal": True, "window": 3},
    "two-sided window": {"window": 3},
    "window of one": {"window": 1},
    "later queries": {"causal": True, "q_offset": 3},
    "later keys": {"causal": True, "kv_offset": 3},
    "window at offsets": {"causal": True, "window": 4, "q_offset": 9, "kv_offset": 4},
    "capped": {"softcap": 0.7},
    "capped, with a window and a bias": {
        "softcap": 1.5,
        "scale": 2.0,
        "causal": True,
        "window": 4,
        "bias": torch.linspace(-2, 2, 49, dtype=torch.float64).view(7, 7),
    },
    "out of sight": {"causal": True, "kv_offset": 20},
    "segments": {"causal": True, "segment_ids": segments(3, 1, 3)},
    "segments at offsets": {"segment_ids": segments(5, 6, 5), "q_offset": 2, "kv_offset": 9},
    "bias": {"bias": torch.linspace(-2, 2, 4 * 49, dtype=torch.float64).view(1, 4, 7, 7)},
    "bias per key": {"bias": torch.linspace(-2, 2, 7, dtype=torch.float64)},
    "causal bias": {"causal": True, "bias": torch.linspace(-2, 2, 14, dtype=torch.float64).view(2, 1, 1, 7)},
    "mask": {"bias": torch.arange(2 * 49).view(2, 1, 7, 7) % 3 > 0},
    "mask with an empty row": {"bias": (torch.arange(7) != 2)[:, None].expand(7, 7)},
    "bias with an empty row": {
        "bias": torch.zeros(7, 7, dtype=torch.float64).masked_fill((torch.arange(7) == 2)[:, None], -torch.inf)
    },
}


@pytest.fixture(params=["whole", "tiled"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tiled":
        monkeypatch.setattr(attention_kernels, "_MAX_ROWS", 3)
        monkeypatch.setattr(attention_kernels, "_MIN_KEYS", 2)
        monkeypatch.setattr(attention_kernels, "_TILE_ELEMENTS", 1)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_dense_attention(form: str, kv_heads: int) -> None:
    attributes = FORMS[form]
    inputs = tensors(kv_heads=kv_heads)
    actual, expected = attention(*inputs, **attributes), dense(*inputs, **attributes)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for with_lse in (False, True):
        grads, reference = gradients(actual, inputs, with_lse), gradients(expected, inputs, with_lse)
        torch.testing.assert_close(grads, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("form", ["full", "window", "capped", "segments"])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (4, 1, 7), (1, 4, 7, 7), (2, 1, 7, 7), (2, 4, 1, 1), (2, 4, 7, 7)])
def test_gradient_of_a_learned_bias(shape: tuple[int, ...], form: str) -> None:
    bias = torch.linspace(-2, 2, torch.Size(shape).numel(), dtype=torch.float64).cos().view(shape).requires_grad_()
    inputs, attributes = tensors(kv_heads=2), FORMS[form]
    actual, expected = attention(*inputs, bias, **attributes), dense(*inputs, bias=bias, **attributes)
    for with_lse in (False, True):
        grads, reference = (gradients(x, [*inputs, bias], with_lse) for x in (actual, expected))
        torch.testing.assert_close(grads, reference, rtol=1e-12, atol=1e-12)


def test_a_learned_bias_keeps_its_dtype_and_hidden_scores_have_no_gradient() -> None:
    inputs = tensors(dtype=torch.bfloat16)
    bias = torch.zeros(7, 7, requires_grad=True)
    out, _ = attention(*inputs, bias, causal=True)
    (grad,) = torch.autograd.grad(out.float().square().sum(), [bias])
    assert grad.dtype == torch.float32 and grad.tril(-1).any() and not grad.triu(1).any()


def test_blocks_of_keys_merge_into_the_whole() -> None:
    q, k, v = tensors(kv_heads=2, queries=4, keys=8)
    whole = attention(q, k, v, causal=True, q_offset=4)
    parts = [
        attention(q, k[:, :, at : at + 4], v[:, :, at : at + 4], causal=True, q_offset=4, kv_offset=at) for at in (0, 4)
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * torch.exp(part_lse - lse)[..., None] for part, part_lse in parts)
    torch.testing.assert_close((out, lse), tuple(whole))
    torch.testing.assert_close(gradients((out, lse), [q, k, v], True), gradients(whole, [q, k, v], True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["causal", "window"])
def test_lower_precision(form: str, dtype: torch.dtype) -> None:
    inputs = tensors(kv_heads=2, dtype=dtype)
    out, lse = attention(*inputs, **FORMS[form])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense(*wide, **FORMS[form])
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close((out.double(), lse.double()), expected, rtol=tolerance, atol=tolerance)
    for grad, reference in zip(gradients((out, lse), inputs, True), gradients(expected, wide, True), strict=True):
        torch.testing.assert_close(grad.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", ["full", "causal", "window", "segments", "bias", "mask with an empty row"])
def test_gradcheck(form: str) -> None:
    attributes = FORMS[form]
    has_empty_row = "empty" in form

    def function(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out, lse = attention(*inputs, **attributes)
        return out if has_empty_row else (out, lse)

    assert torch.autograd.gradcheck(function, tensors(kv_heads=2, width=2))


def test_values_may_be_wider_than_keys() -> None:
    q, k, _ = tensors(kv_heads=2)
    v = torch.randn(2, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    inputs = [q, k, v]
    actual, expected = attention(*inputs, causal=True), dense(q, k, v, causal=True)
    torch.testing.assert_close(tuple(actual), expected)
    torch.testing.assert_close(gradients(actual, inputs, True), gradients(expected, inputs, True))


def test_no_keys_at_all() -> None:
    inputs = tensors(keys=0)
    out, lse = attention(*inputs)
    assert not out.any() and (lse == -torch.inf).all()
    assert not gradients((out, lse), inputs, True)[0].any()


def test_an_undefined_gradient_of_an_empty_row_does_not_spread() -> None:
    inputs = tensors()
    out, lse = attention(*inputs, causal=True, kv_offset=3)
    gradient = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.full_like(lse, torch.nan)))
    live = attention(*inputs, causal=True, kv_offset=3)[1] > -torch.inf
    assert not gradient[0][~live].any()


@pytest.mark.parametrize(
    ("attributes", "keys", "with_lse", "kernel"),
    [
        ({}, 9, False, CPU_FLASH),
        ({"causal": True}, 7, False, CPU_FLASH),
        ({"causal": True, "q_offset": 5, "kv_offset": 5}, 7, False, CPU_FLASH),
        ({"causal": True}, 9, False, BLOCKWISE),
        ({"causal": True, "q_offset": 1}, 7, False, BLOCKWISE),
        ({"window": 2}, 7, False, BLOCKWISE),
        ({"causal": True}, 7, True, BLOCKWISE),
    ],
)
def test_choice_of_kernel(attributes: dict[str, Any], keys: int, with_lse: bool, kernel: str) -> None:
    q, k, v = tensors(keys=keys)
    values: dict[str, Any] = {"bias": None, "segment_ids": None, "causal": False, "window": None}
    values |= {"q_offset": 0, "kv_offset": 0, "scale": 0.5} | attributes
    call = attention_kernels.Call(q, k, v, **values)
    assert next(entry.name for entry in attention_kernels.KERNELS if entry.supports(call, with_lse)) == kernel


def test_scores_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_TILE_ELEMENTS", 2**12)
    largest = 0
    scores = attention_kernels._scores

    def measured(*args: Any) -> Tensor:
        nonlocal largest
        result = scores(*args)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(attention_kernels, "_scores", measured)
    inputs = tensors(heads=1, kv_heads=1, queries=500, keys=500)
    gradients(attention(*inputs, causal=True, window=400), inputs, False)
    assert 0 < largest <= 2**12


def test_tiles_outside_the_window_are_skipped() -> None:
    q, k, v = tensors(heads=1, kv_heads=1, queries=4096, keys=4096)
    call = attention_kernels.Call(q, k, v, None, None, True, 128, 0, 0, 1.0)
    visited = sum(column.stop - column.start for _, columns in attention_kernels._tiles(call) for column in columns)
    assert visited <= 4096 + 4 * 128


@pytest.mark.parametrize("form", ["causal", "window", "segments", "bias"])
def test_opcheck(form: str) -> None:
    inputs = tensors(kv_heads=2)
    torch.library.opcheck(torch.ops.autosp.attention.default, tuple(inputs), FORMS[form])
    out, lse = attention(*inputs, **FORMS[form])
    extra = [FORMS[form].get(name) for name in ("bias", "segment_ids")]
    attributes = {name: value for name, value in FORMS[form].items() if name not in ("bias", "segment_ids")}
    operands = [x.detach() if isinstance(x, Tensor) else x for x in (out, None, *inputs, *extra, out, lse)]
    torch.library.opcheck(torch.ops.autosp.attention_backward.default, tuple(operands), attributes)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_traces_whole(mode: Literal["fake", "symbolic"], with_lse: bool) -> None:
    inputs = tensors(kv_heads=2)

    def step(*operands: Tensor) -> tuple[Tensor, ...]:
        return gradients(attention(*operands, causal=True), list(operands), with_lse)

    traced = make_fx(step, tracing_mode=mode)(*inputs)
    calls = [node for node in traced.graph.nodes if str(node.target).startswith("autosp.")]
    assert [str(call.target) for call in calls] == ["autosp.attention.default", "autosp.attention_backward.default"]
    assert (calls[1].args[1] is not None) == with_lse
    torch.testing.assert_close(traced(*inputs), step(*inputs))


def test_compiles_without_a_graph_break() -> None:
    inputs = tensors(kv_heads=2)

    def step(*operands: Tensor) -> Tensor:
        out: Tensor = attention(*operands, causal=True)[0].transpose(1, 2).reshape(2, 7, -1)
        return out.square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    actual, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_results_have_the_strides_of_their_operands(order: tuple[int, ...]) -> None:
    """Fused kernels write them so, and what reads out without its heads needs no copy."""
    back = [order.index(d) for d in range(4)]
    inputs = [x.detach().permute(order).contiguous().permute(back).requires_grad_() for x in tensors()]
    for attributes in (FORMS["causal"], FORMS["window"]):
        out, lse = attention(*inputs, **attributes)
        arguments = (None, *inputs, None, None, out, lse)
        grads = [
            torch.ops.autosp.attention_backward(dout, *arguments, **attributes) for dout in (out, out.contiguous())
        ]
        assert out.stride() == inputs[0].stride() and lse.is_contiguous()
        for each in grads:
            assert [g.stride() for g in each] == [x.stride() for x in inputs]
        torch.testing.assert_close(*grads)


def test_operands_without_memory_of_their_own_get_results_that_have_it() -> None:
    q, k, v = (x.detach()[:, :1].expand(-1, 4, -1, -1) for x in tensors())
    out, lse = attention(q, k, v, causal=True)
    grads = torch.ops.autosp.attention_backward(out, None, q, k, v, None, None, out, lse, causal=True)
    with new_fake_mode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        wanted, _ = attention(*fakes, causal=True)
    assert out.stride() == wanted.stride() == torch.empty_like(q).stride()
    assert all(g.stride() == torch.empty_like(x).stride() for g, x in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"window": 0}, "window"),
        ({"softcap": 0.0}, "capped at 0.0"),
        ({"k": torch.zeros(2, 3, 7, 4, dtype=torch.float64)}, "do not fit"),
        ({"k": torch.zeros(2, 4, 7, 4)}, "one floating dtype"),
        ({"q": torch.zeros(4, 7, 4, dtype=torch.float64)}, "dimensions"),
        ({"bias": torch.zeros(3, 1, 1, 7)}, "broadcast"),
        ({"bias": torch.zeros(7, dtype=torch.int64)}, "broadcast"),
        ({"segment_ids": torch.zeros(2, 7)}, "segment_ids"),
        ({"segment_ids": torch.zeros(2, 6, dtype=torch.int64)}, "cover"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(UnsupportedError, match=message):
        attention(**({"q": q, "k": k, "v": v} | change))


def test_second_derivatives_are_refused() -> None:
    inputs = tensors()
    out, _ = attention(*inputs, causal=True)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        grad.sum().backward()
