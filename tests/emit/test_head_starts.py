"""Head starts: which collectives get one, and that compiled code keeps it between the collective and what follows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_ir.emit import head_starts
from autosp_ir.emit.head_starts import give_head_starts
from tests.emit import compiled
from tests.gloo import run_ranks
from tests.sampling import sampled

HEAD_START = torch.ops.autosp.head_start.default


def started(size: int, beside: bool) -> fx.Graph:
    """An all-reduce of `size` bytes, awaited in front of a product or behind it."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        sent = torch.ops._c10d_functional.all_reduce(x, "sum", "0")
        if not beside:
            awaited: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
            return torch.mm(w, awaited[:8, None].expand(8, 8))
        product = torch.mm(w, w)
        total: Tensor = torch.ops._c10d_functional.wait_tensor(sent).sum()
        return product + total

    return make_fx(run, tracing_mode="fake")(torch.ones(size // 4), torch.ones(8, 8)).graph


@pytest.mark.parametrize(
    ("size", "beside", "devices", "given"),
    [
        (2**23, True, ("cpu",), True),
        (2**23, False, ("cpu",), False),
        (2**20, True, ("cpu",), False),
        (2**23, True, ("cuda",), False),
    ],
)
def test_large_collectives_that_run_beside_a_product_get_one(
    size: int, beside: bool, devices: tuple[str, ...], given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_starts, "_FILLED", devices)
    graph = started(size, beside)
    give_head_starts(graph)
    graph.lint()
    targets = [str(n.target) for n in graph.nodes]
    assert targets.count(str(HEAD_START)) == int(given)
    if given:
        place = targets.index(str(HEAD_START))
        assert targets.index("_c10d_functional.all_reduce.default") < place == targets.index("aten.mm.default") - 1


def test_compiled_code_keeps_them_between_a_collective_and_what_it_runs_beside() -> None:
    for halves in run_ranks(compiled.head_starts_in_code, 2, "llama-gqa", timeout=500.0):
        for order in halves:
            begun = [kind for kind in order if kind != "wait"]
            behind = [after for kind, after in pairwise(begun) if kind == "head start"]
            assert behind and set(behind) <= {"product", "attention"}, "no exchange sets out in between"
        assert halves[0][: halves[0].index("head start")].count("start") == 1, "the first exchange has one"


@pytest.mark.parametrize("backend", sampled(["aot_eager", "inductor"], 2))
def test_a_step_with_head_starts_is_exact(backend: str) -> None:
    for errors, given in run_ranks(compiled.head_started_errors, 2, "llama-gqa", backend, timeout=500.0):
        assert max(errors) <= 1e-5
        assert given > 0
