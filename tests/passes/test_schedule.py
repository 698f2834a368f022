"""Schedules: valid orders, never slower than the program's own, within the memory, the same on every rank."""

from __future__ import annotations

import functools
import random
from typing import get_args

import pytest
import torch

import autosp_ir as air
from autosp_ir.analysis.cost import DEVICES, Link, is_costed
from autosp_ir.analysis.fused import Fusion, fused_durations, fused_liveness
from autosp_ir.analysis.liveness import liveness
from autosp_ir.analysis.timeline import Durations, durations, run
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._schedule.cp_sat import solve
from autosp_passes._schedule.lists import Yielding, list_order
from autosp_passes._schedule.portfolio import best, settled
from autosp_passes._schedule.problem import Problem, halves
from autosp_passes.overlap import reorder
from tests.models import build

_LOWERED = (
    "canonicalize,pad-tokens,token-partition,ulysses,head-chunk{chunks=2},differentiate,remat,grad-sync,lower-comm"
)
# As fast as makes communication and compute of a tiny model about equal.
MODES: tuple[Yielding, ...] = get_args(Yielding)
_LINKS = (Link("slow", 1e8, 2e-5), Link("fast", 1e10, 2e-6))


@functools.cache
def lowered(name: str = "llama-gqa", world: int = 2, length: int = 32) -> air.Program:
    model, batch = build(name, dtype=torch.float64, length=length)
    return air.PassManager(_LOWERED).run(air.capture(model, batch), mesh={"sp": world}).program


def problems(program: air.Program, link: Link, fused: bool = False) -> list[Problem]:
    if not fused:
        return halves(program, durations(program, DEVICES["cpu"], link))
    fusion = Fusion(program)
    return halves(program, fused_durations(fusion, DEVICES["cpu"], link), fusion)


def is_valid(problem: Problem, order: tuple[int, ...] | list[int]) -> bool:
    place = {task: at for at, task in enumerate(order)}
    whole = sorted(order) == list(range(len(problem.nodes)))
    return whole and all(place[b] < place[t] for t, needed in enumerate(problem.before) for b in needed)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("link", _LINKS, ids=lambda link: str(link.name))
def test_the_best_order_is_valid_no_slower_and_within_the_cap(link: Link, fused: bool) -> None:
    for problem in problems(lowered(), link, fused):
        own = range(len(problem.nodes))
        for cap in (problem.peak(own), 1.05 * problem.peak(own), float("inf")):
            found = best(problem, cap)
            assert is_valid(problem, found.order)
            assert problem.lower_bound <= found.timeline.makespan * (1 + 1e-9)
            assert found.timeline.makespan <= problem.timeline(own).makespan
            assert found.peak == problem.peak(found.order) <= cap


def test_a_slow_link_is_hidden_at_least_by_half() -> None:
    forward, backward = problems(lowered(), Link("even", 1e9, 2e-6))
    for problem in (forward, backward):
        own = problem.timeline(range(len(problem.nodes)))
        assert best(problem, float("inf")).timeline.exposed < 0.5 * own.exposed


@pytest.mark.parametrize("seed", range(20))
def test_any_urgency_gives_an_order_and_settling_it_never_slows_it(seed: int) -> None:
    draw = random.Random(seed)
    for problem in problems(lowered(), _LINKS[seed % 2]):
        urgency = [draw.random() for _ in problem.nodes]
        order = list_order(problem, urgency, draw.choice((0, 3, 50, 10**9)), draw.choice((0.0, 1e-3)), MODES[seed % 3])
        assert is_valid(problem, order) and is_valid(problem, settled(problem, order))


def test_no_place_ahead_is_the_programs_own_order() -> None:
    for problem in problems(lowered(), _LINKS[0]):
        order = list_order(problem, [0.0] * len(problem.nodes), 0)
        assert order == list(range(len(problem.nodes)))


@pytest.mark.parametrize("fused", [False, True])
def test_the_peak_of_the_own_order_is_that_of_the_liveness_analysis(fused: bool) -> None:
    program = lowered()
    report = fused_liveness(Fusion(program)) if fused else liveness(program)
    peaks = [p.peak(range(len(p.nodes))) for p in problems(program, _LINKS[0], fused)]
    assert max(peaks) == report.peak_bytes
    assert peaks[0] == report.by_phase[air.Phase.FORWARD]


def test_the_solver_is_never_worse_than_its_bound_and_never_worse_than_lists() -> None:
    for problem in problems(lowered(), _LINKS[0]):
        lists = best(problem, float("inf"))
        solution = solve(problem, lists.order, effort=2.0)
        assert solution.bound <= lists.timeline.makespan + 1e-6
        both = best(problem, float("inf"), effort=2.0)
        assert is_valid(problem, both.order)
        assert both.timeline.makespan <= lists.timeline.makespan


def test_a_search_gives_the_same_twice() -> None:
    for effort in (0.0, 1.0):
        found = [[best(p, float("inf"), effort).order for p in problems(lowered(), _LINKS[0])] for _ in range(2)]
        assert found[0] == found[1]


@functools.cache
def expected() -> tuple[air.Program, dict[str, torch.Tensor], air.Simulation]:
    model, batch = build("plain", dtype=torch.float64, length=8)
    program = (
        air.PassManager(_LOWERED.replace("chunks=2", "chunks=1")).run(air.capture(model, batch), mesh={"sp": 2}).program
    )
    return program, batch, air.simulate(program, batch)


@pytest.mark.parametrize("block", range(10))
def test_random_schedules_never_deadlock_and_change_no_bit(block: int) -> None:
    program, batch, own = expected()
    for seed in range(20 * block, 20 * block + 20):
        draw = random.Random(seed)
        tried = program.clone()
        order = []
        for problem in problems(tried, _LINKS[0]):
            urgency = [draw.random() for _ in problem.nodes]
            order += [problem.nodes[i] for i in list_order(problem, urgency, draw.choice((2, 20, 10**9)))]
        reorder(Rewriter(tried), order)
        tried.verify()
        found = air.simulate(tried, batch)
        assert torch.equal(found.loss, own.loss)
        assert all(torch.equal(found.grads[n], own.grads[n]) for n in own.grads)
    assert run(order, durations(tried, DEVICES["cpu"], _LINKS[0])).makespan > 0


def test_gradients_travel_in_a_stream_of_their_own() -> None:
    program, batch, own = expected()
    result = air.PassManager("overlap{device=cpu link=network-400g memory=4.0 gradients=own}").run(program)
    streams = [n.arg("group_name") for n in result.program.find("_c10d_functional.all_reduce")]
    assert result.statistics["overlap"]["separated"] == streams.count("sp:gradients") == len(own.grads)
    assert "sp" in streams, "the loss does not wait behind gradients"
    found = air.simulate(air.parse(str(result.program)).bind(expected_model()), batch)
    assert torch.equal(found.loss, own.loss)
    assert all(torch.equal(found.grads[n], own.grads[n]) for n in own.grads)


def test_what_attentions_give_travels_in_a_stream_of_its_own() -> None:
    program, batch, own = expected()
    result = air.PassManager("overlap{device=cpu link=network-400g memory=4.0 exchanges=own}").run(program)
    starts = result.program.find("_c10d_functional.all_to_all_single")
    streams = {phase: [n.arg("group_name") for n in starts if n.phase is phase] for phase in air.Phase}
    # Of each attention: queries, keys and values there and the output back; the gradient of the output, and theirs.
    for phase, given in ((air.Phase.FORWARD, 1), (air.Phase.BACKWARD, 3)):
        assert streams[phase].count("sp:results") == given * len(streams[phase]) / 4 > 0
    found = air.simulate(air.parse(str(result.program)).bind(expected_model()), batch)
    assert torch.equal(found.loss, own.loss)
    assert all(torch.equal(found.grads[n], own.grads[n]) for n in own.grads)


def test_what_the_caller_alone_reads_is_awaited_last() -> None:
    program, *_ = expected()
    found = air.PassManager("overlap{device=h100 link=network-400g memory=4.0}").run(program).program
    order = [n for n in found.graph.nodes if n.phase is not air.Phase.FORWARD]
    costed = max(i for i, n in enumerate(order) if is_costed(n))
    reductions = [n for n in order if n.is_op("_c10d_functional.all_reduce")]
    awaited = [order.index(next(iter(n.result.users))) for n in reductions]
    assert len(awaited) > 4 and min(awaited) > costed


@pytest.mark.parametrize(("crowded", "stall"), [(False, 0.0), (True, 1.0)])
def test_a_collective_that_was_not_there_before_it_waits_for_a_product(crowded: bool, stall: float) -> None:
    """Two collectives of one stream in front of a product: the second runs beside it, or begins behind it."""
    program = lowered()
    first, second = program.find("_c10d_functional.all_to_all_single")[:2]
    wait = next(iter(second.result.users))
    product = next(n for n in program.graph.nodes if is_costed(n))
    compute = {product: 2.0, wait: 0.0}
    priced = Durations(compute, {first: 1.0, second: 1.0}, frozenset({product} if crowded else ()))
    timeline = run([first, second, product, wait], priced)
    assert timeline.stalls.get(wait, 0.0) == stall
    assert timeline.makespan == 2.0 + stall


def expected_model() -> torch.nn.Module:
    return build("plain", dtype=torch.float64, length=8)[0]


def test_a_cap_below_the_programs_own_peak_keeps_its_order() -> None:
    program = lowered()
    result = air.PassManager("overlap{memory=0.9}").run(program)
    assert [n.name for n in result.program.graph.nodes] == [n.name for n in program.graph.nodes]
    assert "cannot be kept by ordering" in str(result.remarks[0])
