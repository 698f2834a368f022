"""`head-chunk`: attention by groups of heads, exact, with exchanges of the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autosp_ir as air
from autosp_ir.testing import DenseReference, count_operations
from tests.models import build
from tests.sampling import sampled

torch.set_num_threads(1)
CUT = "canonicalize,pad-tokens,token-partition,ulysses"
REST = "differentiate,remat,grad-sync,lower-comm"


def run(program: air.Program, pipeline: str, ranks: int) -> air.PassResult:
    return air.PassManager(pipeline).run(program, mesh={"sp": ranks})


@pytest.mark.parametrize(
    ("name", "ranks", "option", "groups"),
    sampled(
        [
            ("llama-mha", 2, "", 4),
            ("llama-mha", 4, "{chunks=2}", 2),
            ("llama-gqa", 1, "", 4),
            ("llama-gqa", 1, "{chunks=2}", 2),
            ("llama-gqa", 2, "{chunks=2 fuse=qkv}", 2),
            ("llama-mha", 2, "{chunks=2 fuse=qkv}", 2),
            ("llama-gqa", 2, "", 4),
            ("qwen3", 1, "{chunks=2}", 2),
            ("gpt2", 2, "{chunks=2}", 2),
            ("mistral", 1, "", 4),
            ("plain", 2, "", 4),
        ],
        3,
    ),
)
def test_models_are_exact(name: str, ranks: int, option: str, groups: int) -> None:
    model, batch = build(name, batch_size=2, length=33, ignored=5)
    reference = DenseReference.of(model, batch)
    result = run(reference.program, f"{CUT},head-chunk{option}", ranks)
    attentions = result.statistics["head-chunk"]["attentions"]
    assert count_operations(result.program, "attention") == attentions * groups
    reference.check(result.program)
    reference.check(air.PassManager(REST).run(result.program).program)


def test_the_same_bytes_travel_in_more_exchanges() -> None:
    model, batch = build("llama-mha", length=32)
    program = air.capture(model, batch)
    sent = []
    for pipeline in (CUT, f"{CUT},head-chunk{{chunks=2}}", f"{CUT},head-chunk{{chunks=2 fuse=qkv}}"):
        simulation = air.simulate(run(program, f"{pipeline},{REST}", 2).program, batch)
        exchanges = [c for c in simulation.comm if c.op == "all_to_all"]
        sent.append((len(exchanges), sum(c.bytes for c in exchanges)))
    assert sent[1] == (2 * sent[0][0], sent[0][1])
    # Instead of q, k and v of each group, all of them; and what comes back.
    assert sent[2] == (sent[0][0], sent[0][1])


def test_it_composes_with_tile() -> None:
    model, batch = build("gpt2", length=40, batch_size=2)
    reference = DenseReference.of(model, batch)
    pipeline = f"{CUT.replace('pad-tokens', 'pad-tokens{multiple=4}')},head-chunk,tile{{chunks=4}},{REST}"
    result = run(reference.program, pipeline, 2)
    assert result.statistics["tile"]["tiled"] >= 3
    reference.check(result.program)


@pytest.mark.parametrize(
    ("name", "pipeline", "reason"),
    [
        ("llama-gqa", f"{CUT},head-chunk{{chunks=8}}", "cannot be cut as asked"),
        ("llama-mha", f"{CUT},head-chunk{{chunks=3}}", "cannot be cut as asked"),
        ("llama-mha", f"{CUT.replace('ulysses', 'ulysses{fuse=qkv}')},head-chunk", "exchanged"),
    ],
)
def test_what_cannot_be_cut_stays_whole_and_says_why(name: str, pipeline: str, reason: str) -> None:
    model, batch = build(name, length=32)
    result = run(air.capture(model, batch), pipeline, 2)
    assert "attentions" not in result.statistics["head-chunk"]
    assert any(reason in r.message for r in result.remarks if r.kind == "missed")


def test_a_bias_that_differs_by_head_stays_with_its_heads() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv = nn.Embedding(32, 16), nn.Linear(16, 48)
            self.bias: torch.Tensor
            self.register_buffer("bias", torch.randn(1, 4, 16, 16))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.embed(input_ids)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
            total: torch.Tensor = out.pow(2).mean()
            return total

    torch.manual_seed(0)
    reference = DenseReference.of(Biased(), {"input_ids": torch.randint(0, 32, (2, 16))})
    result = air.PassManager("canonicalize,head-chunk").run(reference.program)
    assert any("differs by head" in r.message for r in result.remarks)
    reference.check(result.program)


@pytest.mark.parametrize("chunks", ["0", "-2", "some"])
def test_a_senseless_number_is_refused(chunks: str) -> None:
    program = air.capture(*build("plain", length=16))
    with pytest.raises(air.AutoSPError):
        air.PassManager(f"canonicalize,head-chunk{{chunks={chunks}}}").run(program)


@pytest.mark.parametrize("link", ["network-400g", "pcie"])
def test_small_exchanges_are_not_cut_for_overlap(link: str) -> None:
    model, batch = build("llama-mha", length=32)
    result = run(air.capture(model, batch), f"{CUT},head-chunk{{chunks=overlap link={link}}}", 2)
    assert "attentions" not in result.statistics["head-chunk"]
    assert any("more latency than they hide" in r.message for r in result.remarks)


@pytest.mark.parametrize(("link", "groups"), [("nvlink4", 2), ("pcie5", 4)])
def test_large_exchanges_are_cut_as_far_as_it_hides_more_than_it_costs(link: str, groups: int) -> None:
    b = air.ProgramBuilder(mesh={"sp": 2})
    q, k, v = (b.input(n, (1, 32, 65536, 128), dtype=torch.bfloat16, layout={"sp": air.Shard(2)}) for n in "qkv")
    exchanged = [b.call("autosp.all_to_all", (x, 1, 2, "sp", 2)) for x in (q, k, v)]
    out, _ = b.call("autosp.attention", tuple(exchanged), {"causal": True})
    b.output(b.call("autosp.all_to_all", (out, 2, 1, "sp", 2)))
    program = b.build()
    program.facts |= {"canonical", "token-partitioned", "attention-resolved"}
    result = air.PassManager(f"head-chunk{{chunks=overlap link={link}}}", verify=False).run(program)
    assert count_operations(result.program, "attention") == groups
