"""Pins: which dependencies keep collectives and chunks in order, and that none is given that others imply."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx

import autosp_ir as air
from autosp_ir._torch_compat import order_nodes
from autosp_ir.emit import pins as module
from autosp_ir.emit.pins import pinning_pass, pins
from tests.emit.written import halves_of, without_kernels
from tests.models import build


def is_product(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.mm.default


def _exchange_beside_products() -> torch.fx.GraphModule:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        started = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
        beside = torch.mm(w, w)
        awaited: torch.Tensor = torch.ops._c10d_functional.wait_tensor(started)
        return torch.mm(awaited, beside)

    return make_fx(run, tracing_mode="fake")(torch.ones(2, 2), torch.ones(2, 2))


def test_pins_tie_starts_and_waits_to_the_products_around_them() -> None:
    module = _exchange_beside_products()
    order_nodes(module.graph, pins(module.graph, is_product))
    module.graph.lint()
    pinned = {n.name: n for n in module.graph.nodes if str(n.target) == "control_deps"}
    assert [d.name for d in pinned["mm"].args[0]] == ["all_reduce"]
    assert [d.name for d in pinned["wait_tensor"].args[0]] == ["mm"]
    assert "mm_1" not in pinned


def test_pins_keep_chunks_of_a_sum_apart() -> None:
    """The second product of a chunk loop waits for the first and for the loss that the first chunk gave."""

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(4, 4)
        losses = []
        for chunk in x.split(4):
            made = torch.mm(chunk, w)
            losses.append(made.exp().sum())
            total = torch.addmm(total, made, w)
        return torch.stack(losses).sum() + total.sum()

    module = make_fx(run, tracing_mode="fake")(torch.ones(8, 4), torch.ones(4, 4))
    order_nodes(module.graph, pins(module.graph, is_product, chunked=True))
    module.graph.lint()
    pinned = {n.name: n for n in module.graph.nodes if str(n.target) == "control_deps"}
    assert [d.name for d in pinned["mm_1"].args[0]] == ["sum_1"], "which stands behind mm"
    assert set(pinned) == {"mm_1"}


def test_a_pinning_pass_identifies_itself_to_the_cache_of_compiled_graphs() -> None:
    given = [(False, "a"), (False, "a"), (False, "b"), (True, "a")]
    first, same, *others = (pinning_pass(lambda _: True, *each).uuid() for each in given)
    assert first == same and len({first, *others}) == 3


@pytest.mark.parametrize("implied", [False, True])
def test_the_gradient_of_logits_takes_their_place(implied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless what data implies is pinned too: then each chunk holds both at once."""
    if implied:
        monkeypatch.setattr(module, "_not_implied", lambda nodes, found: found)
    model, batch = build("llama-gqa", length=256, num_hidden_layers=1, vocab_size=2000)
    pipeline = (
        "canonicalize,pad-tokens{multiple=4},token-partition,ulysses,tile{regions=loss chunks=4},"
        "differentiate{decompose=true},remat,early-loss-gradient,grad-sync,lower-comm,overlap{fused=true}"
    )
    forward, _ = halves_of(model, batch, pipeline)
    logits = re.findall(r"empty_strided_cpu\(\((?:1, )?64, 2000\),", forward)
    assert len(logits) == (8 if implied else 4), "those of one chunk after the other"


@pytest.mark.parametrize("tiled", [False, True])
def test_chunks_leave_no_memory_waiting_for_a_later_buffer(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor keeps what is no longer read for the next buffer of its size: the chunks in between would do without."""
    inner = compile_fx.compile_fx_inner
    kept: list[bool] = []

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        kept.append(torch._inductor.config.allow_buffer_reuse)
        return inner(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_inner)
    model, batch = build("plain", length=32)
    cut = "tile{chunks=4}," if tiled else ""
    pipeline = (
        f"canonicalize,pad-tokens{{multiple=4}},token-partition,ulysses,{cut}differentiate,remat,grad-sync,lower-comm"
    )
    with without_kernels():
        air.parallelize(model, batch, backend="inductor", pipeline=pipeline)
    assert kept == [not tiled] * 2
    assert torch._inductor.config.allow_buffer_reuse
