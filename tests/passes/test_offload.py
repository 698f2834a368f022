"""`offload`: what goes to host memory, when, and what stays; the numbers are the same."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from autosp_ir.analysis.cost import DEVICES, HOST_LINKS, LINKS, Link
from autosp_ir.analysis.fused import Fusion, fused_durations
from autosp_ir.analysis.timeline import durations, is_start, run
from autosp_ir.comm.host_memory import OFFLOAD, RELOAD, WAIT_COPY
from autosp_ir.emit.split import crossing_values
from autosp_ir.ir.graph import Graph, Node, Phase
from autosp_ir.ir.text import structurally_equal
from autosp_ir.testing import DenseReference
from autosp_passes._host_copies import Candidate, Copy
from autosp_passes._host_schedule import FULL, HostSchedule, select
from tests.models import build

torch.set_num_threads(1)
CUT = "canonicalize,pad-tokens,token-partition,ulysses,differentiate,remat{policy=save-all}"
OVERLAP = "overlap{device=cpu link=network-400g host_link=nvlink-c2c memory=2.0}"
SLOW = "device=cpu host_link=nvlink-c2c smallest=0"


@functools.cache
def reference() -> DenseReference:
    return DenseReference.of(*build("llama-gqa", batch_size=2, length=64, num_hidden_layers=1))


@functools.cache
def saved(world: int = 2) -> air.Program:
    """One program for many tests: a pass manager rewrites a clone."""
    return air.PassManager(f"{CUT},grad-sync,lower-comm").run(reference().program, mesh={"sp": world}).program


def offloaded(options: str = SLOW, program: air.Program | None = None) -> air.PassResult:
    return air.PassManager(f"offload{{{options}}}").run(program or saved())


def missed(result: air.PassResult) -> str:
    return "\n".join(str(r) for r in result.remarks if r.kind == "missed")


# Selection ------------------------------------------------------------------------------------------------------------


class Steps:
    """Nodes of one second each, the first `forward` of them the forward; values of one byte, one byte a second."""

    def __init__(self, forward: int, backward: int, curve: list[int] | None = None, seconds: float = 1.0) -> None:
        self._graph = Graph()
        count = forward + backward
        link = Link("slow", 1.0 / seconds, 0.0)
        self.schedule = HostSchedule([1.0] * count, forward, link, curve or [10] * count)

    def candidate(self, made: int, used: int, read: int, size: int = 1) -> Candidate:
        value = self._graph.create("placeholder").result
        return Candidate((Copy(value, size, made, read),), size, used, read)


def test_copies_end_under_the_forward_and_begin_under_the_backward() -> None:
    steps = Steps(4, 4)
    early, late = steps.candidate(0, 1, 7), steps.candidate(2, 2, 5)
    slots = steps.schedule.place([early, late])
    assert not isinstance(slots, str)
    assert [(s.of, s.freed, s.reload) for s in slots] == [(late, 4, 4), (early, 2, 6)]
    assert steps.schedule.place([steps.candidate(3, 3, 7)]) == "the copy to the host would end behind the forward"
    first = steps.candidate(0, 0, 4)
    assert steps.schedule.place([first]) == "the copy back would have to begin in front of the backward"


def test_a_value_is_not_freed_before_its_last_use() -> None:
    steps = Steps(6, 2)
    slots = steps.schedule.place([steps.candidate(0, 4, 7)])
    assert not isinstance(slots, str) and slots[0].freed == 5


def test_copies_of_one_direction_queue_up() -> None:
    steps = Steps(4, 4, seconds=2.0)
    one, two = steps.candidate(0, 0, 7), steps.candidate(1, 1, 6)
    assert not isinstance(steps.schedule.place([one]), str) and not isinstance(steps.schedule.place([two]), str)
    assert steps.schedule.place([one, two]) == "the copy to the host would end behind the forward"


HILL = [*range(1, 13), *range(12, 0, -1)]


def test_the_longest_idle_goes_first_until_the_target_is_met() -> None:
    steps = Steps(12, 12, HILL)
    short, long = steps.candidate(4, 6, 17), steps.candidate(0, 0, 23)
    assert select([short, long], steps.schedule, 100, 11).chosen == [long]
    both = select([short, long], steps.schedule, 100, 10)
    assert both.chosen == [long, short] and both.peak == 10
    assert select([short, long], steps.schedule, 100, 12).stays == {"the peak is low enough without it": [long, short]}


def test_what_does_not_lower_the_peak_stays() -> None:
    steps = Steps(4, 4, [9, 2, 3, 4, 4, 3, 2, 1])
    across = steps.candidate(0, 0, 7)
    selection = select([across], steps.schedule, 100, 0)
    assert selection.chosen == [] and selection.peak == 9
    assert selection.stays == {"the peak is as low without it": [across]}


def test_host_memory_is_counted_in_powers_of_two() -> None:
    steps = Steps(12, 12, HILL)
    three, two = steps.candidate(0, 0, 23, size=3), steps.candidate(4, 4, 18, size=2)
    assert (three.host_bytes, two.host_bytes) == (4, 2)
    assert select([three, two], steps.schedule, 5, 0).stays == {FULL: [two]}
    assert select([three, two], steps.schedule, 3, 0).stays == {FULL: [three]}


# Programs -------------------------------------------------------------------------------------------------------------


def test_the_peak_falls_and_nothing_stalls() -> None:
    result = offloaded()
    figures = result.statistics["offload"]
    program, before = result.program, air.liveness(saved())
    after = air.liveness(program)
    assert (figures["peak_bytes_before"], figures["peak_bytes"]) == (before.peak_bytes, after.peak_bytes)
    assert after.peak_bytes < 0.6 * before.peak_bytes
    assert figures["offloaded_bytes"] == after.host_bytes <= figures["host_bytes"] <= 2 * after.host_bytes
    nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    slow = Link("slow", 1e8)
    for link, shows in ((HOST_LINKS["nvlink-c2c"], False), (slow, True)):
        timeline = run(nodes, fused_durations(Fusion(program), DEVICES["cpu"], LINKS["nvlink4"], link))
        assert any(n.is_op(WAIT_COPY) and s > 1e-9 for n, s in timeline.stalls.items()) is shows
    assert figures["exposed_us"] == 0
    assert air.simulate(program, reference().batch).peak_bytes == [after.peak_bytes] * 2
    assert sum(r.kind == "applied" for r in result.remarks) == len(program.find(OFFLOAD))


def test_every_copy_is_a_pair_of_pairs_in_its_phase() -> None:
    program = offloaded().program
    position = program.graph.index()
    for start in program.find(OFFLOAD):
        (host,) = (u for u in start.users if u.is_op(WAIT_COPY))
        (coming,) = (u for u in host.users if u.is_op(RELOAD))
        (back,) = (u for u in coming.users if u.is_op(WAIT_COPY))
        places = [position[n] for n in (start.operands[0].producer, start, host, coming, back, *back.users)]
        assert all(a < b for a, b in pairwise(places[:5])) and min(places[5:]) > places[4]
        assert {start.phase, host.phase} == {Phase.FORWARD} and {coming.phase, back.phase} == {Phase.RECOMPUTE}
        assert all(u.phase is Phase.FORWARD for u in start.operands[0].users), "the backward reads what came back"
    assert {v.name for v in crossing_values(program)} >= {w.name for w in program.find(WAIT_COPY) if _is_forward(w)}


def _is_forward(node: Node) -> bool:
    return node.phase is Phase.FORWARD


def test_parameters_inputs_and_outputs_stay() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            given = x @ self.w
            hidden = given.exp()
            for _ in range(6):
                hidden = (hidden @ self.w.t()).tanh()
            return hidden.sum(), hidden

    batch = {"x": torch.randn(1, 16, 8, dtype=torch.float64)}
    reference = DenseReference.of(Kept(), batch, seq_dims={"x": 1})
    result = air.PassManager(f"differentiate,remat{{policy=save-all}},offload{{{SLOW}}}").run(reference.program)
    moved = {n.operands[0].producer.op.name for n in result.program.find(OFFLOAD)}
    assert moved and not moved & {"placeholder", "aten.t", "aten.view"}
    assert "the caller gets it as well" in missed(result)
    reference.check(result.program, 1e-10)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_are_the_dense_ones(world: int) -> None:
    result = offloaded(program=saved(world))
    assert result.statistics["offload"]["storages"] > 0
    reference().check(result.program, 1e-10)
    assert structurally_equal(air.parse(str(result.program)), result.program) is None


def test_behind_overlap_its_copies_hide_under_the_final_order() -> None:
    program = air.PassManager(f"{OVERLAP},offload{{{SLOW}}}").run(saved()).program
    reference().check(program, 1e-10)
    nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    priced = fused_durations(Fusion(program), DEVICES["cpu"], LINKS["network-400g"], HOST_LINKS["nvlink-c2c"])
    assert sum(s for node, s in run(nodes, priced).stalls.items() if node.is_op(WAIT_COPY)) <= 1e-9


def test_in_front_of_overlap_its_copies_count_in_the_order() -> None:
    program = offloaded().program
    result = air.PassManager(OVERLAP).run(program)
    reference().check(result.program, 1e-10)
    figures = result.statistics["overlap"]
    assert figures["makespan_us"] < figures["makespan_us_before"]
    nodes = [n for n in result.program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    priced = durations(result.program, DEVICES["cpu"], LINKS["network-400g"], host_link=HOST_LINKS["nvlink-c2c"])
    assert round(run(nodes, priced).makespan * 1e6) == figures["makespan_us"]
    assert len(priced.comm) > len([n for n in nodes if is_start(n)])


# Limits and refusals --------------------------------------------------------------------------------------------------


def test_it_stops_at_the_peak_that_was_asked_for() -> None:
    whole = air.liveness(saved()).peak_bytes
    least = offloaded().statistics["offload"]
    for options in (f"{SLOW} fraction=0.8", f"{SLOW} peak={int(0.8 * whole)}"):
        figures = offloaded(options).statistics["offload"]
        assert figures["peak_bytes"] <= 0.8 * whole
        assert figures["offloaded_bytes"] < least["offloaded_bytes"]
    assert "KiB asked for" in missed(offloaded(f"{SLOW} peak=1KiB"))


def test_host_memory_that_is_too_small() -> None:
    some = offloaded(f"{SLOW} host=32KiB")
    assert 0 < some.statistics["offload"]["host_bytes"] <= 2**15
    assert "host= is used up" in missed(some)
    none = offloaded(f"{SLOW} host=0")
    assert none.statistics["offload"]["peak_bytes"] == none.statistics["offload"]["peak_bytes_before"]
    assert "nothing fits into host=0" in missed(none) and not none.program.find(OFFLOAD)


def test_small_storages_stay_by_default() -> None:
    result = offloaded("device=cpu")
    assert "smaller than smallest=" in missed(result) and not result.program.find(OFFLOAD)


def test_on_a_fast_device_over_a_slow_link_nothing_hides() -> None:
    result = offloaded("smallest=0 host_link=pcie4")
    assert not result.program.find(OFFLOAD) or result.statistics["offload"]["exposed_us"] == 0
    assert "would" in missed(result)


class Scaled(nn.Module):
    """Nothing of it is needed for its gradient but an input."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=torch.float64), trained)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).sum()


@pytest.mark.parametrize(("trained", "reason"), [(True, "nothing is saved"), (False, "no gradient")])
def test_nothing_to_offload_is_said(trained: bool, reason: str) -> None:
    program = air.capture(Scaled(trained), {"x": torch.ones(1, 8, 4, dtype=torch.float64)}, seq_dims={"x": 1})
    assert reason in missed(air.PassManager("differentiate,remat,offload").run(program))


def test_a_symbolic_length_stays_as_it_is() -> None:
    batch = {"x": torch.ones(1, 8, 4, dtype=torch.float64)}
    program = air.capture(Scaled(True), batch, seq_dims={"x": 1}, dynamic=True)
    result = air.PassManager("differentiate,remat,offload").run(program)
    assert "the length is symbolic" in missed(result)


@pytest.mark.parametrize(("option", "table"), [("device", DEVICES), ("host_link", HOST_LINKS)])
def test_unknown_names_are_refused_with_those_there_are(option: str, table: dict[str, object]) -> None:
    with pytest.raises(air.UnsupportedError, match="carrier-pigeon") as caught:
        offloaded(f"{option}=carrier-pigeon")
    assert next(iter(table)) in str(caught.value)


@pytest.mark.parametrize("options", ["peak=1GiB fraction=0.5", "host=many", "fraction=1.5", "smallest=-1", "hots=1GiB"])
def test_bad_options_are_refused(options: str) -> None:
    with pytest.raises(air.PipelineError, match="offload"):
        air.PassManager(f"offload{{{options}}}")


@pytest.mark.parametrize("pipeline", ["offload,offload", "offload,remat", "offload,early-loss-gradient"])
def test_passes_that_do_not_go_behind_it_are_refused(pipeline: str) -> None:
    with pytest.raises(air.PipelineError, match=pipeline.partition(",")[2]):
        air.PassManager(f"{CUT},{pipeline}").run(reference().program, mesh={"sp": 2})


def test_it_needs_remat_in_front() -> None:
    with pytest.raises(air.PipelineError, match="rematerialised"):
        air.PassManager("differentiate,offload").run(reference().program)
