"""`tile`: exact in every composition, and one chunk alive at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from autosp_ir.analysis.chunked import chunk_values
from autosp_ir.analysis.liveness import liveness
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.testing import DenseReference, count_operations
from tests.models import ZOO, build
from tests.sampling import sampled

torch.set_num_threads(1)
CUT = "canonicalize,pad-tokens,token-partition,ulysses"
REST = "differentiate{{decompose={decompose}}},remat{{policy={policy}}},grad-sync,lower-comm"


class Wide(nn.Module):
    """A residual MLP of four times the width, and a head of sixteen times."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.up = nn.ModuleList(nn.Linear(16, 64) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(64, 16) for _ in range(layers))
        self.head = nn.Linear(16, 256, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.nn.functional.gelu(up(x)))
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def wide(length: int = 64, batch: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (batch, length))
    labels = ids.roll(-1, 1).masked_fill(torch.arange(length) % 5 == 0, -100)
    return Wide(), {"input_ids": ids, "labels": labels}


def run(program: air.Program, pipeline: str, ranks: int = 1) -> air.PassResult:
    return air.PassManager(pipeline).run(program, mesh={"sp": ranks} if ranks > 1 else {})


@pytest.mark.parametrize(("name", "ranks"), sampled([(name, (1, 2, 4)[i % 3]) for i, name in enumerate(ZOO)], 2))
def test_every_model_is_exact(name: str, ranks: int) -> None:
    model, batch = build(name, batch_size=3 if ranks == 4 else 1, length=33 if ranks == 4 else 32, ignored=5)
    reference = DenseReference.of(model, batch)
    result = run(reference.program, ("canonicalize" if ranks == 1 else CUT) + ",tile{wide=1.5}", ranks)
    assert result.statistics["tile"]["tiled"] >= 1
    reference.check(result.program)


@pytest.mark.parametrize(
    ("fuse", "policy", "ranks"),
    [("none", "save-all", 1), ("none", "min-cut", 2), ("qkv", "save-all", 2), ("qkv", "min-cut", 4)],
)
def test_every_composition_is_exact(fuse: str, policy: str, ranks: int) -> None:
    model, batch = build("gpt2", length=32)
    reference = DenseReference.of(model, batch)
    front = "canonicalize" if ranks == 1 else CUT.replace("ulysses", f"ulysses{{fuse={fuse}}}")
    rest = REST.format(decompose=str(fuse == "qkv").lower(), policy=policy)
    rest = rest if ranks > 1 else rest.replace(",grad-sync", "")
    lowered = run(reference.program, f"{front},tile{{chunks=4}},{rest}", ranks)
    reference.check(lowered.program)
    assert not any(n.op.has(Trait.COLLECTIVE) for n in lowered.program.graph.nodes if n.phase is Phase.RECOMPUTE)


@pytest.mark.parametrize(("regions", "tiled"), [("loss", 1), ("mlp", 1), ("all", 2)])
@pytest.mark.parametrize("batch", [1, 2])
def test_regions_are_told_apart(regions: str, tiled: int, batch: int) -> None:
    reference = DenseReference.of(*wide(batch=batch))
    result = run(reference.program, f"canonicalize,tile{{regions={regions} chunks=8}}")
    assert result.statistics["tile"] == {"tiled": tiled, "chunks": 8 * tiled}
    reference.check(result.program)


def test_no_wide_value_is_whole_and_none_is_saved() -> None:
    reference = DenseReference.of(*wide())
    result = run(reference.program, "canonicalize,tile{chunks=16},differentiate,remat")
    whole = 64 * 64  # elements of the hidden layer; the logits have four times as many
    weights = {s.name for s in result.program.signature.inputs}
    for node in result.program.graph.nodes:
        for value in node.results:
            if isinstance(value.type, air.TensorType) and value.type.shape[:1] in ((64,), (1,)):
                assert value.type.numel < whole or value.name in weights, node
    chunks = chunk_values(result.program)
    saved = {v for v in chunks if any(u.phase is not Phase.FORWARD for u in v.users)}
    assert not {v for v in saved if not v.producer.is_op("operator.getitem")}


@pytest.mark.parametrize("policy", ["save-all", "min-cut"])
def test_the_peak_falls_with_the_chunks(policy: str) -> None:
    """Without the weights' gradients, which are as large whatever is tiled, sixteen chunks need a fourth at most."""
    model, batch = wide(length=2048)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_parameter("embed.weight").requires_grad_(True)
    program = air.capture(model, batch)
    rest = f"differentiate,remat{{policy={policy}}}"
    untiled = liveness(run(program, f"canonicalize,{rest}").program)
    tiled = liveness(run(program, f"canonicalize,tile{{chunks=16}},{rest}").program)
    assert tiled.by_phase[Phase.BACKWARD] <= untiled.by_phase[Phase.BACKWARD] / 4
    chunk = 2048 * 256 * 4 // 16
    stream = 2048 * 16 * 4
    assert tiled.peak_bytes <= 6 * chunk + 6 * stream


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_an_emitted_step_equals_dense(backend: Any) -> None:
    model, batch = wide()
    loss = model(**batch)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    program = run(air.capture(model, batch), "canonicalize,tile{chunks=8},differentiate,remat,lower-comm").program
    step = program.emit(backend=backend)
    found = step(**batch)
    found.backward()
    torch.testing.assert_close(found, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_gradients_of_many_chunks_are_added_up_in_float32() -> None:
    model, batch = wide(length=512)
    model.bfloat16()
    exact = DenseReference.of(model, batch)
    program = run(exact.program, "canonicalize,tile{chunks=32},differentiate").program
    sums = [n for n in program.graph.nodes if n.is_op("autosp.addmm_float32") and n.phase is Phase.BACKWARD]
    weights = [n for n in sums if n.result.tensor_type.shape == (256, 16)]
    assert len(weights) == 31
    assert all(n.result.tensor_type.dtype == torch.float32 for n in weights)
    gradients = {s.target: s for s in program.signature.outputs if s.kind.name == "GRADIENT"}
    assert set(gradients) == {n for n, _ in model.named_parameters()}
    program.verify()


def test_a_number_that_does_not_divide_is_refused_with_those_that_do() -> None:
    program = air.capture(*wide(length=20))
    with pytest.raises(air.PassError, match="20 tokens on a rank cannot be cut into 3 equal chunks") as caught:
        run(program, "canonicalize,tile{chunks=3}")
    assert "[2, 4, 5, 10]" in str(caught.value)


@pytest.mark.parametrize("chunks", ["0", "-1", "many"])
def test_a_senseless_number_is_refused(chunks: str) -> None:
    with pytest.raises(air.AutoSPError):
        run(air.capture(*wide(length=20)), f"canonicalize,tile{{chunks={chunks}}}")


def test_what_is_wide_when_it_is_returned_stays_whole_and_says_so() -> None:
    class Logits(Wide):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embed(input_ids))
            return logits

    _, batch = wide()
    result = run(air.capture(Logits(), batch), "canonicalize,tile")
    assert count_operations(result.program, "chunk") == 0
    assert any("wide and is read outside" in r.message for r in result.remarks)


def test_a_symbolic_length_is_left_alone() -> None:
    model, batch = wide()
    result = run(air.capture(model, batch, dynamic=True), "canonicalize,tile")
    assert count_operations(result.program, "chunk") == 0
    assert any("not a number" in r.message for r in result.remarks)


def test_softmax_over_tokens_is_not_cut() -> None:
    class OverTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(32, 16), nn.Linear(16, 128), nn.Linear(128, 16)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for _ in range(2):
                x = x + self.down(self.up(x).softmax(1))
            total: Tensor = x.pow(2).mean()
            return total

    torch.manual_seed(0)
    reference = DenseReference.of(OverTokens(), {"input_ids": torch.randint(0, 32, (2, 32))})
    result = run(reference.program, "canonicalize,tile")
    assert not result.statistics["tile"].get("tiled")
    reference.check(result.program)


@pytest.mark.parametrize("later", ["pad-tokens", "token-partition"])
def test_what_is_in_chunks_is_neither_padded_nor_cut(later: str) -> None:
    """A chunk of a whole sequence holds other tokens than the chunks of its shards do together."""
    with pytest.raises(air.PipelineError, match=f"{later} conflicts with .tiled."):
        run(air.capture(*wide()), f"canonicalize,tile,{later}", 2)
