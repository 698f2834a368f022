"""`canonicalize` is exact, and leaves one spelling behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autosp_ir.capture.fx_import import import_graph
from autosp_ir.capture.program import capture
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import PassContext
from autosp_ir.sim.lockstep import simulate
from autosp_passes.canonicalize import Canonicalize
from tests.models import build
from tests.passes import attention_spellings as spell

torch.set_num_threads(1)


def canonical(program: Program) -> tuple[Program, PassContext]:
    copy = program.clone()
    ctx = PassContext(program=copy, pass_name="canonicalize")
    Canonicalize().run(copy, ctx)
    copy.verify()
    return copy, ctx


def assert_exact(model: nn.Module, program: Program, batch: dict[str, Tensor]) -> None:
    loss = model(**batch)["loss"]
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    result = simulate(program, batch)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(result.grads[name], grad, rtol=1e-10, atol=1e-12)


def op_names(program: Program) -> set[str]:
    return {n.op.name for n in program.graph.nodes}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", spell.CAUSAL)
def test_causal_attention_in_any_spelling(name: str, dynamic: bool) -> None:
    model, batch = spell.Decoder(spell.CAUSAL[name]), spell.batch()
    program, _ = canonical(capture(model, batch, dynamic=dynamic))
    (attention,) = program.find("autosp.attention")
    assert attention.arg("causal") is True and attention.arg("bias") is None
    assert attention.arg("k").tensor_type.shape[1] == 2, "keys stay unexpanded"
    assert not op_names(program) & {"aten.softmax.int", "aten.matmul", "aten.bmm", "aten.expand", "aten.tril"}
    assert_exact(model, program, batch)
    if dynamic:
        shorter = spell.batch(length=7)
        loss = simulate(program, shorter, gradients=False).loss
        torch.testing.assert_close(loss, model(**shorter)["loss"].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", spell.LOSSES)
def test_losses_of_cut_logits_read_shifted_labels(name: str, dynamic: bool) -> None:
    model, batch = spell.Decoder(loss=spell.LOSSES[name]), spell.batch()
    batch["y"][0, 4:7] = 3 if name == "sliced_contiguous" else -100
    program, ctx = canonical(capture(model, batch, dynamic=dynamic))
    assert ctx.statistics["losses-shifted"] == 1
    (loss,) = [n for n in program.graph.nodes if "loss" in n.op.name]
    rows = {loss.args[0].tensor_type.numel, loss.args[1].tensor_type.numel * spell.VOCAB}
    assert len(rows) == 1, "every row of the logits is read"
    assert_exact(model, program, batch)


@pytest.mark.parametrize("spelling", [spell.capped, spell.capped_by_a_tensor])
def test_a_bound_on_the_scores_becomes_an_attribute(spelling: spell.Attention) -> None:
    model, batch = spell.Decoder(spelling), spell.batch()
    program, _ = canonical(capture(model, batch))
    (attention,) = program.find("autosp.attention")
    assert (attention.arg("softcap"), attention.arg("causal"), attention.arg("bias")) == (1.5, True, None)
    assert "aten.tanh" not in op_names(program)
    assert_exact(model, program, batch)


def test_a_bound_on_biased_scores_stays_as_it_is() -> None:
    model, batch = spell.Decoder(spell.capped_behind_a_bias), spell.batch()
    program, _ = canonical(capture(model, batch))
    assert not program.find("autosp.attention")
    assert_exact(model, program, batch)


def test_a_window_becomes_an_attribute() -> None:
    model, batch = spell.Decoder(spell.windowed), spell.batch()
    program, _ = canonical(capture(model, batch))
    (attention,) = program.find("autosp.attention")
    assert (attention.arg("causal"), attention.arg("window"), attention.arg("bias")) == (True, 5, None)
    assert_exact(model, program, batch)


def test_attention_without_a_mask_is_not_causal() -> None:
    model, batch = spell.Decoder(spell.full), spell.batch()
    program, _ = canonical(capture(model, batch))
    (attention,) = program.find("autosp.attention")
    assert attention.arg("causal") is False and attention.arg("scale") == 1.0
    assert_exact(model, program, batch)


def blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    mask = (i[:, None] // 4) == (i[None, :] // 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def skewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] + 2 >= i[None, :], enable_gqa=True)


@pytest.mark.parametrize("attention", [blockwise, skewed])
def test_a_mask_that_is_not_provable_stays(attention: Callable[..., Tensor]) -> None:
    model, batch = spell.Decoder(attention), spell.batch()
    program, ctx = canonical(capture(model, batch))
    (node,) = program.find("autosp.attention")
    assert node.arg("bias") is not None and node.arg("causal") is False
    assert any("not provably causal" in r.message for r in ctx.remarks)
    assert_exact(model, program, batch)


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)
    bias = slopes[:, None, None] * (i[None, :] - i[:, None]).to(q.dtype)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.5 + bias
    return scores.masked_fill(i[:, None] < i[None, :], float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)


def test_a_bias_stays_beside_a_causal_attribute() -> None:
    model, batch = spell.Decoder(alibi), spell.batch()
    program, _ = canonical(capture(model, batch))
    (node,) = program.find("autosp.attention")
    assert node.arg("causal") is True and node.arg("bias") is not None
    assert_exact(model, program, batch)


class LearnedBias(spell.Decoder):
    """Attention with a learned position bias."""

    def __init__(self) -> None:
        super().__init__(self.biased)
        self.bias = nn.Parameter(torch.randn(12, 12, dtype=torch.float64))

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, enable_gqa=True)


def test_a_learned_bias_is_an_operand() -> None:
    model, batch = LearnedBias(), spell.batch()
    program, _ = canonical(capture(model, batch))
    (node,) = program.find("autosp.attention")
    assert node.arg("bias").name == "p_bias"
    assert_exact(model, program, batch)


class MaskedBias(LearnedBias):
    """A learned bias under a mask, in one floating operand."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = ~torch.ones(12, 12, dtype=torch.bool).tril()
        far = torch.arange(12)[:, None] - torch.arange(12) >= 5
        zero = torch.zeros(12, 12, dtype=q.dtype)
        bias = {
            "where": lambda: torch.where(later, torch.finfo(q.dtype).min, self.bias),
            "filled": lambda: self.bias.masked_fill(later, -torch.inf).contiguous(),
            "added": lambda: self.bias + zero.masked_fill(later, -torch.inf),
            "both": lambda: (zero.masked_fill(later, -torch.inf) + self.bias).masked_fill(far, -torch.inf),
            "unknown": lambda: self.bias.masked_fill(self.bias > 0, -torch.inf),
        }[self.spelling]()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


@pytest.mark.parametrize("spelling", ["where", "filled", "added", "both"])
def test_a_mask_over_a_learned_bias_becomes_an_attribute(spelling: str) -> None:
    model, batch = MaskedBias(spelling), spell.batch()
    program, _ = canonical(capture(model, batch))
    (node,) = program.find("autosp.attention")
    assert node.arg("causal") is True and node.arg("window") == (5 if spelling == "both" else None)
    assert node.arg("bias").name == "p_bias"
    assert_exact(model, program, batch)


def test_a_mask_that_depends_on_a_learned_bias_stays_in_it() -> None:
    model, batch = MaskedBias("unknown"), spell.batch()
    program, _ = canonical(capture(model, batch))
    (node,) = program.find("autosp.attention")
    assert node.arg("causal") is False and node.arg("bias").name != "p_bias"
    assert_exact(model, program, batch)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", [spell.merged, spell.merged_bias])
def test_heads_merged_into_the_batch_come_out_again(spelling: spell.Attention, dynamic: bool) -> None:
    model, batch = spell.Decoder(spelling), spell.batch()
    program, _ = canonical(capture(model, batch, dynamic=dynamic))
    (node,) = program.find("autosp.attention")
    assert node.arg("q").tensor_type.shape[1] == 4 and node.arg("k").tensor_type.shape[1] == 2
    assert node.arg("causal") is (spelling is spell.merged)
    assert_exact(model, program, batch)


def finite_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    hidden = (i[:, None] < i[None, :]) | (i[None, :] % 5 == 0)
    scores = q @ k.repeat_interleave(2, 1).mT
    return scores.masked_fill(hidden, -1e4).softmax(-1) @ v.repeat_interleave(2, 1)


def test_a_finite_fill_that_is_not_provable_is_left_alone() -> None:
    model, batch = spell.Decoder(finite_padding), spell.batch()
    program, ctx = canonical(capture(model, batch))
    assert not program.find("autosp.attention")
    assert any("finite number" in r.message for r in ctx.remarks)
    assert_exact(model, program, batch)


def test_probabilities_read_elsewhere_keep_their_operators() -> None:
    class Peeking(spell.Decoder):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            h = self.embed(x)
            weights = (h @ h.mT).softmax(-1)
            return {"loss": self.loss(self.head(weights @ h), y) + weights.square().mean()}

    model, batch = Peeking(), spell.batch()
    program, _ = canonical(capture(model, batch))
    assert not program.find("autosp.attention")
    assert_exact(model, program, {**batch})


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True)


def test_heads_repeated_in_another_order_are_not_folded() -> None:
    model, batch = spell.Decoder(tiled), spell.batch()
    program, _ = canonical(capture(model, batch))
    (node,) = program.find("autosp.attention")
    assert node.arg("k").tensor_type.shape[1] == 4
    assert_exact(model, program, batch)


def test_stock_transformers_graphs_are_recognised() -> None:
    """A graph that was exported without this project: masks as data, expanded keys, SDPA."""
    model, batch = build("llama-gqa", length=16)
    exported = torch.export.export(model, (), {**batch, "use_cache": False}, strict=False)
    program = import_graph(exported.graph_module)
    assert program.find("aten.scaled_dot_product_attention")
    found, ctx = canonical(program)
    assert ctx.statistics["sdpa"] == ctx.statistics["repeats-folded"] == ctx.statistics["masks-folded"] == 2
    for node in found.find("autosp.attention"):
        assert (node.arg("causal"), node.arg("bias"), node.arg("k").tensor_type.shape[1]) == (True, None, 2)


def test_sdpa_of_a_graph_traced_at_the_torch_level() -> None:
    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, value=v, is_causal=True, scale=0.2)

    inputs = tuple(torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    program, _ = canonical(import_graph(fx.symbolic_trace(Attends()), inputs))
    (node,) = program.find("autosp.attention")
    assert node.arg("causal") is True and node.arg("scale") == 0.2
    torch.testing.assert_close(simulate(program, inputs, gradients=False).outputs[0]["out0"], Attends()(*inputs))


def test_three_dimensional_attention_has_one_head() -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            whole: Tensor = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            split: Tensor = (x @ x.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ x
            return whole + split

    x, mask = torch.randn(2, 6, 8, dtype=torch.float64), torch.rand(2, 6, 6) > 0.2
    mask |= torch.eye(6, dtype=torch.bool)
    program, _ = canonical(capture(Attends(), (x, mask), seq_dims={"x": 1}))
    assert len(program.find("autosp.attention")) == 2
    torch.testing.assert_close(simulate(program, (x, mask), gradients=False).outputs[0]["out0"], Attends()(x, mask))


def misaligned(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, 1:].reshape(-1, spell.VOCAB), targets[:, :-1].reshape(-1))


def transposed_rows(logits: Tensor, targets: Tensor) -> Tensor:
    rows = logits[:, :-1].transpose(0, 1).reshape(-1, spell.VOCAB)
    return F.cross_entropy(rows, targets[:, 1:].reshape(-1))


@pytest.mark.parametrize("loss", [misaligned, transposed_rows])
def test_other_cut_losses_are_left_alone(loss: spell.Loss) -> None:
    model, batch = spell.Decoder(loss=loss), spell.batch()
    program, ctx = canonical(capture(model, batch))
    assert "losses-shifted" not in ctx.statistics
    assert_exact(model, program, batch)
