"""Copies to host memory and back: plain copies on the CPU, started and awaited in pairs, counted apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autosp_ir as air
from autosp_ir._torch_compat import new_fake_mode
from autosp_ir.analysis.cost import DEVICES, HOST_LINKS, LINKS, cost_of
from autosp_ir.analysis.fused import Fusion, fused_liveness
from autosp_ir.analysis.timeline import Durations, durations, run
from autosp_ir.comm import host_memory
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.types import INVARIANT, PARTIAL, Placement, Shard
from autosp_ir.testing.memory import StorageTracker

operators = torch.ops.autosp


@pytest.mark.parametrize("x", [torch.randn(3, 4), torch.randn(3, 4).t(), torch.tensor(2.0), torch.arange(6)[::2]])
def test_on_the_cpu_they_are_plain_copies(x: Tensor) -> None:
    started = operators.offload(x)
    host = operators.wait_copy(started, x)
    assert torch.equal(host, x) and host.data_ptr() == started.data_ptr() != x.data_ptr()
    coming = operators.reload(host, device=x.device)
    back = operators.wait_copy(coming, host)
    assert torch.equal(back, x) and back.data_ptr() == coming.data_ptr() != host.data_ptr()
    assert back.stride() == (x.stride() if x.is_contiguous() or x.t().is_contiguous() else (1,))


def test_types_are_those_of_a_device_without_the_device() -> None:
    with new_fake_mode():
        x = torch.empty_strided((3, 4), (1, 3), dtype=torch.bfloat16, device="cuda")
        host = operators.wait_copy(operators.offload(x), x)
        back = operators.wait_copy(operators.reload(host, device=x.device), host)
    assert host.device.type == "cpu" and host.dtype == torch.bfloat16
    assert (back.device, back.dtype, back.stride()) == (x.device, x.dtype, x.stride())


def test_a_wait_for_another_source_is_refused() -> None:
    """A compiler that copies the operand once for the start and once for the wait keeps the wrong one alive."""
    x = torch.randn(3, 4)
    host = operators.wait_copy(operators.offload(x), x)
    for started in (operators.offload(x), operators.reload(host, device=x.device)):
        with pytest.raises(air.UnsupportedError, match="another source"):
            operators.wait_copy(started, x.clone())
    with pytest.raises(air.UnsupportedError, match="another source"):
        operators.wait_copy(operators.offload(x).clone(), x)


def test_what_was_not_offloaded_is_not_reloaded() -> None:
    """A compiler that gives host memory other strides has it copied by the host, which does not wait for the device."""
    x = torch.randn(3, 4)
    host = operators.wait_copy(operators.offload(x), x)
    with pytest.raises(air.UnsupportedError, match="was not offloaded"):
        operators.reload(host.t().contiguous(), device=x.device)
    address = host.data_ptr()
    assert address in host_memory._at_rest
    del host
    assert address not in host_memory._at_rest


def test_strides_that_are_asked_for() -> None:
    x = torch.randn(3, 4)
    host = operators.wait_copy(operators.offload(x, stride=(1, 3)), x)
    assert torch.equal(host, x) and host.stride() == (1, 3)
    with new_fake_mode():
        assert operators.offload(torch.empty(3, 4), stride=(1, 3)).stride() == (1, 3)


def test_nothing_is_copied_too() -> None:
    x = torch.randn(0, 4)
    assert operators.wait_copy(operators.offload(x), x).shape == x.shape


def test_other_devices_are_refused() -> None:
    with pytest.raises(air.UnsupportedError, match="not to meta"):
        operators.reload(torch.ones(2), device=torch.device("meta"))


class Round:
    """x [8, 4]; its double goes to host memory and back."""

    def __init__(self, placement: Placement = INVARIANT) -> None:
        self.b = air.ProgramBuilder(mesh={"sp": 2}, stage="joint")
        self.x = self.b.input("x", (8, 4), torch.float64, layout={"sp": placement})
        self.double = self.b.aten.mul.Scalar(self.x, 2.0)
        self.started = self.b.autosp.offload(self.double)

    def program(self, out: Value) -> air.Program:
        self.b.output(out=out)
        return self.b.build()

    def rest(self) -> Value:
        host = self.b.autosp.wait_copy(self.started, self.double)
        coming = self.b.autosp.reload(host, device=torch.device("cpu"))
        back: Value = self.b.autosp.wait_copy(coming, host)
        return back


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), PARTIAL])
def test_a_copy_stands_where_its_source_stands(placement: Placement) -> None:
    back = Round(placement).rest()
    assert back.tensor_type.layout["sp"] == placement


def test_a_wait_keeps_alive_what_is_copied() -> None:
    made = Round()
    other = made.b.aten.mul.Scalar(made.x, 3.0)
    program = made.program(made.b.autosp.wait_copy(made.started, other))
    with pytest.raises(air.VerifyError, match="keeps %mul_1 alive, but %offload copies %mul"):
        program.verify()


def test_a_wait_placed_elsewhere_is_refused() -> None:
    made = Round()
    cut = made.b.input("cut", (8, 4), torch.float64, layout={"sp": Shard(0)})
    with pytest.raises(air.LayoutError, match="waits for a source placed"):
        made.b.autosp.wait_copy(made.started, cut)


def _read_early(made: Round) -> Any:
    made.rest()
    return made.b.aten.neg(made.started)


def _await_twice(made: Round) -> Any:
    return made.b.aten.add.Tensor(made.rest(), made.b.autosp.wait_copy(made.started, made.double))


def _await_nothing(made: Round) -> Any:
    return made.b.autosp.wait_copy(made.rest(), made.double)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda made: made.double, "%offload is awaited never"),
        (_await_twice, "%offload is awaited 2 times"),
        (_read_early, "neg reads %offload, a copy that has only been started"),
        (_await_nothing, "which starts no copy"),
    ],
)
def test_starts_and_waits_pair_up(write: Any, message: str) -> None:
    made = Round()
    program = made.program(write(made))
    with pytest.raises(air.VerifyError, match=message):
        program.verify()


def _program() -> air.Program:
    """48 bytes go away behind their first use, a long product later they come back."""
    text = """autosp-ir 1
stage: joint

program(
    %x: f32[3, 4] = input "x",
) -> (
    "out0": output "out0",
):
    %a: f32[3, 4] = aten.neg(%x)
    %start: f32[3, 4] = autosp.offload(%a)
    %b: f32[3, 4] = aten.neg(%a)
    %host: f32[3, 4] = autosp.wait_copy(%start, %a)
    %c: f32[3, 4] = aten.neg(%b)
    %d: f32[3, 4] = aten.mul.Tensor(%c, %b)
    %coming: f32[3, 4] = autosp.reload(%host, device=device("cpu"))
    %e: f32[3, 4] = aten.neg(%d)
    %back: f32[3, 4] = autosp.wait_copy(%coming, %host)
    %f: f32[3, 4] = aten.mul.Tensor(%e, %back)
    return (%f,)
"""
    program = air.parse(text)
    program.verify()
    return program


def test_host_memory_is_not_the_devices() -> None:
    program = _program()
    report = air.liveness(program)
    assert [count // 48 for count in report.curve[1:]] == [1, 1, 2, 2, 2, 3, 2, 3, 2, 3]
    assert report.host_bytes == 48
    x = torch.randn(3, 4)
    simulation = air.simulate(program, {"x": x})
    assert simulation.peak_bytes == [report.peak_bytes]
    module = program.to_graph_module()
    with StorageTracker([x]) as tracker, torch.no_grad():
        (out,) = module(x)
    assert tracker.peak == report.peak_bytes
    assert torch.equal(out, x.neg().mul(x) * x) and torch.equal(simulation.outputs[0]["out0"], out)
    fused = fused_liveness(Fusion(program))
    assert fused.host_bytes == 48 and fused.peak_bytes < report.peak_bytes


def test_copies_cost_their_stream_and_stalls_are_what_does_not_hide() -> None:
    program = _program()
    nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    named = {n.name: n for n in nodes}
    priced = durations(program, DEVICES["h100"], LINKS["nvlink4"], host_link=HOST_LINKS["pcie4"])
    assert priced.compute[named["start"]] == priced.compute[named["back"]] == 0
    assert priced.comm.keys() == {named["start"], named["coming"]}
    assert cost_of(named["coming"]).sent == 48

    def stalls(copy: float) -> dict[str, float]:
        compute = {n: 1.0 if n.name in "abcdef" else 0.0 for n in nodes}
        timeline = run(nodes, Durations(compute, dict.fromkeys(priced.comm, copy)))
        return {n.name: seconds for n, seconds in timeline.stalls.items()}

    assert stalls(1.0) == {}
    assert stalls(1.5) == {"host": 0.5, "back": 0.5}


def test_copies_in_one_direction_queue_up_and_do_not_in_both() -> None:
    program = _program()
    nodes = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
    compute: dict[Node, float] = dict.fromkeys(nodes, 0.0)
    comm = {n: 1.0 for n in nodes if n.name in ("start", "coming")}
    assert run(nodes, Durations(compute, comm)).makespan == 2.0, "the second waits for the first by its wait alone"
    assert Durations(compute, comm).lower_bound == 2.0, "they need each other"
