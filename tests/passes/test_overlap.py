"""Communication beside compute: the same results in another order, never slower by the estimate, within the memory."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import pytest
import torch

import autosp_ir as air
from autosp_ir.analysis.cost import DEVICES, HOST_LINKS, LINKS, cost_of, is_costed
from autosp_ir.analysis.timeline import is_start, is_wait
from autosp_ir.emit.parallelize import default_pipeline
from autosp_ir.ir.graph import Node
from autosp_ir.pipeline.registry import parse_pipeline
from autosp_ir.plan import rungs
from autosp_ir.testing import DenseReference
from autosp_passes._motion import out_of_place, start_early, wait_late
from tests.models import build

_LOWERED = "canonicalize,pad-tokens,token-partition,ulysses,differentiate,remat,grad-sync,lower-comm"


@functools.cache
def lowered(name: str = "llama-gqa", world: int = 4) -> air.Program:
    """One program for many tests: a pass manager rewrites a clone."""
    model, batch = build(name, dtype=torch.float64)
    return air.PassManager(_LOWERED).run(air.capture(model, batch), mesh={"sp": world}).program


def body(program: air.Program) -> list[Node]:
    return [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]


def slow_link(program: air.Program) -> air.PassResult:
    return air.PassManager("overlap{device=cpu link=network-400g memory=4.0}").run(program)


@pytest.mark.parametrize(("name", "world"), [("llama-gqa", 2), ("gpt2", 4), ("plain", 4)])
def test_results_are_bit_identical(name: str, world: int) -> None:
    model, batch = build(name, dtype=torch.float64, length=33)
    program = air.PassManager(_LOWERED).run(air.capture(model, batch), mesh={"sp": world}).program
    before, after = air.simulate(program, batch), air.simulate(slow_link(program).program, batch)
    assert torch.equal(before.loss, after.loss)
    assert before.grads.keys() == after.grads.keys()
    assert all(torch.equal(before.grads[n], after.grads[n]) for n in before.grads)
    sent = [sorted((c.op, c.axis, c.bytes, c.phase) for c in sim.comm) for sim in (before, after)]
    assert sent[0] == sent[1]


def test_less_communication_is_exposed_and_the_estimate_says_how_much() -> None:
    program = lowered()
    figures = slow_link(program).statistics["overlap"]
    assert figures["exposed_us"] < 0.8 * figures["exposed_us_before"]
    assert figures["lower_bound_us"] <= figures["makespan_us"] <= figures["makespan_us_before"]


def test_projections_run_beside_the_exchange_of_q_and_weight_gradients_beside_the_backward() -> None:
    program = lowered()
    order = body(slow_link(program).program)
    costed = [i for i, n in enumerate(order) if is_costed(n)]
    starts = {n: i for i, n in enumerate(order) if n.is_op("_c10d_functional.all_to_all_single")}
    covered = {
        start: [i for i in costed if at < i < order.index(next(u for u in start.users if is_wait(u)))]
        for start, at in starts.items()
    }
    forward = [len(c) for s, c in covered.items() if s.phase.value == "forward"]
    backward = [len(c) for s, c in covered.items() if s.phase.value != "forward"]
    assert max(forward[:3]) >= 1, "a projection is computed beside the exchange of another"
    assert sum(c >= 1 for c in backward) >= len(backward) // 4, "gradients of weights are computed beside exchanges"


def test_the_memory_cap_holds() -> None:
    program = lowered()
    before = air.liveness(program).peak_bytes
    for factor in (1.0, 1.1, 4.0):
        result = air.PassManager(f"overlap{{device=cpu link=network-400g memory={factor}}}").run(program)
        assert air.liveness(result.program).peak_bytes <= factor * before


def test_a_second_overlap_is_refused_and_nothing_to_overlap_is_said() -> None:
    program = lowered()
    with pytest.raises(air.PipelineError, match="overlap"):
        air.PassManager("overlap,overlap").run(program)
    alone = lowered(world=1)
    result = air.PassManager("overlap").run(alone)
    assert "does not communicate" in str(result.remarks[0])


def test_a_symbolic_length_keeps_its_order() -> None:
    model, batch = build("plain")
    program = air.capture(model, batch, dynamic=True)
    result = air.PassManager(f"{_LOWERED},overlap").run(program, mesh={"sp": 2})
    assert "the length is symbolic" in "".join(str(r) for r in result.remarks)


@pytest.mark.parametrize(("option", "value"), [("device", "h1000"), ("link", "carrier-pigeon"), ("host_link", "pcie9")])
def test_unknown_devices_and_links_are_named_with_those_there_are(option: str, value: str) -> None:
    program = lowered()
    with pytest.raises(air.UnsupportedError, match=value) as caught:
        air.PassManager(f"overlap{{{option}={value}}}").run(program)
    tables: dict[str, dict[str, object]] = {"device": {**DEVICES}, "link": {**LINKS}, "host_link": {**HOST_LINKS}}
    assert next(iter(tables[option])) in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_moves_turn_any_order_into_any_other(seed: int) -> None:
    program = lowered("plain", 2)
    own = body(program)
    wanted = own[:]
    random.Random(seed).shuffle(wanted)
    now = own[:]
    for node, behind in out_of_place(own, wanted):
        now.remove(node)
        now.insert(now.index(behind) + 1 if behind is not None else 0, node)
    assert now == wanted
    assert out_of_place(own, own) == []


@pytest.mark.parametrize("motion", [start_early, wait_late])
def test_every_motion_keeps_operands_in_front(motion: Callable[[Sequence[Node]], list[Node]]) -> None:
    program = lowered()
    for part in ("forward", "rest"):
        own = [n for n in body(program) if (n.phase.value == "forward") == (part == "forward")]
        order = motion(own)
        assert sorted(order, key=id) == sorted(own, key=id)
        place = {n: i for i, n in enumerate(order)}
        assert all(place[v.producer] < i for n, i in place.items() for v in n.operands if v.producer in place)


def test_costs_follow_the_formulas() -> None:
    program = lowered()
    for node in program.find("aten.mm"):
        rows, inner = node.operands[0].tensor_type.shape
        columns = node.operands[1].tensor_type.shape[1]
        assert cost_of(node).flops == 2 * rows * inner * columns
    attention = program.find("autosp.attention")[0]
    batch, heads, queries, width = attention.arg("q").tensor_type.shape
    assert cost_of(attention).flops == 4 * batch * heads * queries * queries * width / 2
    start = next(n for n in program.graph.nodes if n.is_op("_c10d_functional.all_to_all_single"))
    assert cost_of(start).sent == start.operands[0].tensor_type.numel * 8 * 3 / 4
    assert is_start(start)


@pytest.mark.parametrize("world", [2, 4])
def test_over_a_slow_link_the_default_cuts_heads_for_overlap(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    pipeline = default_pipeline(backend="inductor")
    assert "head-chunk{chunks=overlap" in pipeline and "exchanges=own" in pipeline
    # The tiny model's exchanges are latency alone: two groups stand for what is worth it at real lengths.
    pipeline = pipeline.replace("chunks=overlap", "chunks=2")
    model, batch = build("llama-mha", dtype=torch.float64, length=31, ignored=3)
    reference = DenseReference.of(model, batch)
    result = air.PassManager(pipeline).run(reference.program, mesh={"sp": world})
    assert result.statistics["head-chunk"]["attentions"] > 0
    streams = {n.arg("group_name") for n in result.program.graph.nodes if is_start(n)}
    assert streams == {"sp", "sp:gradients", "sp:results"}
    reference.check(result.program)
    ladder = rungs(parse_pipeline(pipeline), 16384, host=1e9)
    assert all(rung.pipeline.count("head-chunk") == 1 for rung in ladder)
    reference.check(air.PassManager(list(ladder[-1].passes)).run(reference.program, mesh={"sp": world}).program)
