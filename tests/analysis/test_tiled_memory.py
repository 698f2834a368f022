"""Memory of a step in 16 chunks, as the allocator counts it: a fraction of the whole one, compiled or not."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autosp_ir as air
from autosp_ir.analysis.aliasing import Aliasing
from autosp_ir.analysis.chunked import chunk_values
from autosp_ir.ir.types import TensorType
from autosp_ir.testing.memory import allocated_peak

torch.set_num_threads(1)
TOKENS, CHUNKS = 1024, 16
Region = Literal["loss", "mlp"]
_REST = "differentiate{{decompose={compiled}}},remat{{aggressive={compiled}}},grad-sync,lower-comm"


class Head(nn.Module):
    """A wide vocabulary behind a narrow model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(4096, 32), nn.LayerNorm(32), nn.Linear(32, 4096, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids `[1, S]` to a loss."""
        logits = self.head(self.norm(self.embed(ids)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.flatten())}


class Gated(nn.Module):
    """A wide gated MLP in a narrow model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(64, 32), nn.LayerNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 2048), nn.Linear(32, 2048), nn.Linear(2048, 32)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids `[1, S]` to a loss."""
        h = self.norm(self.embed(ids))
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        return {"loss": h.float().square().mean()}


def lowered(region: Region, chunks: int, compiled: bool) -> tuple[air.Program, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Head() if region == "loss" else Gated()
    ids = torch.arange(TOKENS).mul(7).remainder(64).view(1, TOKENS)
    tile = f"tile{{regions={region} chunks={chunks}}}," if chunks > 1 else ""
    pipeline = f"canonicalize,pad-tokens,{tile}{_REST.format(compiled=str(compiled).lower())}"
    program = air.capture(model, {"ids": ids}, seq_dims={"ids": 1})
    return air.PassManager(pipeline).run(program, mesh={"sp": 1}).program, {"ids": ids}


def backward_peak(region: Region, chunks: int, backend: Literal["aot_eager", "inductor"]) -> int:
    """Bytes that a step holds at most while its backward runs, what the forward saved among them."""
    program, batch = lowered(region, chunks, backend == "inductor")
    step = program.emit(backend=backend)
    for _ in range(2):
        step.zero_grad(set_to_none=True)
        step(**batch)["loss"].backward()
    step.zero_grad(set_to_none=True)
    loss, _, saved = allocated_peak(lambda: step(**batch)["loss"])
    _, peak, _ = allocated_peak(lambda: loss.backward())
    return saved + peak


@pytest.mark.parametrize(
    ("backend", "most", "region"),
    [
        ("aot_eager", 1 / 4, "loss"),
        ("aot_eager", 1 / 4, "mlp"),
        ("inductor", 1 / 3, "mlp"),
        pytest.param("inductor", 1 / 3, "loss", marks=pytest.mark.long),
    ],
)
def test_the_backward_holds_a_fraction(region: Region, backend: Literal["aot_eager", "inductor"], most: float) -> None:
    assert backward_peak(region, CHUNKS, backend) <= most * backward_peak(region, 1, backend)


@pytest.mark.parametrize("region", ["loss", "mlp"])
def test_no_more_than_six_chunks_of_a_region_are_alive(region: Region) -> None:
    program, _ = lowered(region, CHUNKS, compiled=False)
    inside = [v for v in chunk_values(program) if isinstance(v.type, TensorType)]
    wide = max(v.tensor_type.numel * v.tensor_type.dtype.itemsize for v in inside)
    aliasing = Aliasing()
    alive: dict[int, int] = {}
    last: dict[int, int] = {}
    nodes = [n for n in program.graph.nodes if n.op.kind != "output"]
    for at, node in enumerate(nodes):
        aliasing.step(node)
        for value in (*node.results, *node.operands):
            last.update((s.id, at) for s in aliasing.storages(value))
    chunks = {s.id: s.bytes for v in inside for s in aliasing.storages(v) if s.owned and s.bytes >= wide / 4}
    most = 0
    for at, node in enumerate(nodes):
        for value in node.results:
            alive.update((s.id, s.bytes) for s in aliasing.storages(value) if s.id in chunks)
        most = max(most, sum(alive.values()))
        alive = {each: size for each, size in alive.items() if last[each] > at}
    assert wide <= most <= 6 * wide
