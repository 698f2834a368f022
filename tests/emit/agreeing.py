"""Steps on which the ranks do not agree, and values that are not finite; each function runs on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import autosp_ir as air
from tests.models import build
from tests.refusals.bodies import Met, met


def _built(length: int = 16) -> tuple[nn.Module, dict[str, Tensor]]:
    return build("llama-gqa", length=length, num_hidden_layers=1)


def later_batches(rank: int, world: int) -> dict[str, Met]:
    """Batches that differ on the last rank after a first step on equal ones; each is followed by a good step."""
    model, batch = _built()
    last = rank == world - 1
    step = air.parallelize(model, batch, backend="aot_eager", check_batch="content")
    loose = air.parallelize(model, batch, backend="aot_eager")
    step(**batch)
    loose(**batch)
    shorter = {n: t[:, :12] for n, t in batch.items()} if last else batch
    other = {n: t.clone() for n, t in batch.items()}
    other["labels"][0, 3] += last
    found = {
        "shape": met(lambda: loose(**shorter)),
        "after": met(lambda: loose(**batch)),
        "content": met(lambda: step(**other)),
        "argument": met(lambda: loose(**batch, **({"input_idz": batch["labels"]} if last else {}))),
    }
    with torch.set_grad_enabled(not last):
        found["grad mode"] = met(lambda: loose(**batch))
    return found


def weights_that_differ(rank: int, world: int) -> dict[str, Met]:
    """Ranks built from other seeds, and gradients left to a caller who does not reduce them over the ranks."""
    model, batch = build("llama-gqa", length=16, num_hidden_layers=1, seed=rank)
    _, batch = _built()
    seeds = air.parallelize(model, batch, backend="aot_eager")
    model, _ = _built()
    external = air.parallelize(model, batch, backend="aot_eager", grad_sync="external")
    optimizer = torch.optim.SGD(external.parameters(), lr=0.1)
    for _ in range(2):
        # Gradients are accumulated over two batches.
        external(**batch)["loss"].backward()
    optimizer.step()
    return {"seeds": met(lambda: seeds(**batch)), "gradients": met(lambda: external(**batch))}


class SwapOnLast(air.Pass):
    """A schedule with two exchanges of equal type in the other order."""

    name = "swap-on-last"
    stage = "lowered"

    def run(self, program: air.Program, ctx: air.PassContext) -> None:
        """Rewrite `program` in place."""
        swap_exchanges(program)


def swap_exchanges(program: air.Program) -> tuple[air.Node, air.Node]:
    """Move the second of the first two exchanges, which have one type, and what makes it in front of the first."""
    graph = program.graph
    first, second = [n for n in graph.nodes if n.is_op("_c10d_functional.all_to_all_single")][:2]
    assert first.result.type == second.result.type
    order = dict(graph.index())
    moved, pending = {second}, [second]
    while pending:
        behind = [v.producer for v in pending.pop().operands if order[v.producer] > order[first]]
        pending += [n for n in behind if n not in moved]
        moved.update(behind)
    for node in sorted(moved, key=lambda n: order[n]):
        graph.move(node, before=first)
    return first, second


def programs_that_differ(rank: int, world: int) -> dict[str, Met]:
    """Two models over the same batch, run in another order on the last rank, and a pipeline of its own there."""
    model, batch = _built()
    other, _ = build("llama-gqa", length=16, num_hidden_layers=1, seed=1)
    last = rank == world - 1
    actor, critic = (air.parallelize(m, batch, backend="aot_eager") for m in (model, other))
    one, two = (critic, actor) if last else (actor, critic)
    found = {}
    for step in (actor, critic):
        step(**batch)
    found["order"] = met(lambda: one(**batch))
    found["order again"] = met(lambda: two(**batch))
    found["after"] = met(lambda: [step(**batch) for step in (critic, actor)])
    fused = air.DEFAULT_PIPELINE.replace("ulysses", "ulysses{fuse=qkv}")
    mixed = air.parallelize(model, batch, backend="aot_eager", pipeline=fused if last else air.DEFAULT_PIPELINE)
    found["pipeline"] = met(lambda: mixed(**batch))
    passes = air.parse_pipeline(air.DEFAULT_PIPELINE)
    same_model, _ = build("llama-mha", length=16, num_hidden_layers=1)
    swapped = air.parallelize(
        same_model, batch, backend="aot_eager", pipeline=[*passes, SwapOnLast()] if last else passes
    )
    found["schedule"] = met(lambda: swapped(**batch))
    # A rank may build what it never runs.
    spare = [air.parallelize(model, batch, backend="aot_eager") for _ in range(1 + last)]
    found["spare"] = met(lambda: spare[-1](**batch))
    return found


class Root(nn.Module):
    """A token-wise layer whose value, or only whose derivative, is not finite for a token of zeros."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.safe = nn.Embedding(8, 4), nn.Linear(4, 4), safe

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Ids `[B, S]` to a loss."""
        h = self.embed(x).square().sum(-1)
        # The square root has no finite derivative at zero, the logarithm no finite value.
        y = h.sqrt() if self.safe else h.log() * h
        return {"loss": self.out(y[..., None].expand(-1, -1, 4)).sum()}


def _train(step: nn.Module, x: Tensor) -> None:
    step(x=x)["loss"].backward()


def not_finite(rank: int, world: int, backend: Any) -> dict[str, Met]:
    """A forward, and a backward, that give NaN on the rank that holds the last tokens."""
    x = torch.arange(1, 8).repeat(2)[None, :8].clone() % 7
    x[0, 0] = 1
    x[0, -1] = 7
    found = {}
    for name, safe in (("forward", False), ("backward", True)):
        model = Root(safe)
        step = air.parallelize(model, {"x": x}, seq_dims={"x": 1}, backend=backend, check_finite=True)
        with torch.no_grad():
            model.embed.weight[7] = 0
        found[name] = met(partial(_train, step, x))
        found[f"{name} of others"] = met(partial(_train, step, x.clamp(max=6)))
    return found
