"""What a recorder keeps is what happened: every program can be read back, and nothing is changed by watching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import autosp_ir as air
from autosp_ir.ir.hashing import structural_hash
from autosp_ir.ir.printer import show_type
from autosp_ir.pipeline.trace import Trace
from autosp_ir.rewrite import Rewriter
from autosp_ir.sim.lockstep import simulate
from autosp_ir.viz.lanes import predicted_lanes
from autosp_ir.viz.recorder import BY_HAND, Recorder
from autosp_ir.viz.recording import Line, Recording
from autosp_ir.viz.recording_json import dumps, loads
from tests.models.transformers_zoo import llama
from tests.pipeline.toys import FoldRelu, small_program
from tests.viz.recorded import llama_program, llama_recording, llama_result


class Snapshots(air.instruments.Instrument):
    """The program after every rewrite, the expensive way."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def before_pipeline(self, program: air.Program, passes: Sequence[air.Pass]) -> None:
        self.program = program

    def on_rewrite(self, event: object) -> None:
        self.names.append([n.name for n in self.program.graph.nodes])


def texts(program: air.Program) -> list[tuple[str, str, str]]:
    return [(n.name, n.op.name, show_type(n.result.type) if n.results else "") for n in program.graph.nodes]


def shown(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    return [(n.name, n.op, n.type) for n in lines]


def test_the_last_program_is_the_result() -> None:
    result = llama_result()
    assert shown(result.trace.recording.program(-1)) == texts(result.program)


def test_the_program_after_each_pass_is_what_the_pass_left() -> None:
    recording = llama_recording()
    program = llama_program()
    for number, pass_ in enumerate(air.parse_pipeline(air.DEFAULT_PIPELINE), start=1):
        program = air.PassManager([pass_]).run(program, mesh={"sp": 4}).program
        assert shown(recording.program(number)) == texts(program), pass_.name


def test_operands_are_keys_of_lines_above() -> None:
    recording = llama_recording()
    for stage in range(len(recording.stages)):
        seen: set[int] = set()
        for line in recording.program(stage):
            assert seen.issuperset(line.operands), line.text
            seen.add(line.key)


def test_every_rewrite_can_be_stepped_through() -> None:
    snapshots, recorder = Snapshots(), Recorder()
    air.PassManager(air.DEFAULT_PIPELINE, instruments=[snapshots, recorder]).run(llama_program(), mesh={"sp": 4})
    recording = recorder.recording()
    # An event is handed over when the next node is already there, so names may be one ahead of the event.
    steps = [
        {n.name for n in recording.program(s, k + 1)}
        for s, stage in enumerate(recording.stages)
        for k, delta in enumerate(stage.rewrites)
        if delta.rule != BY_HAND
    ]
    assert len(steps) == len(snapshots.names)
    for names, step in zip(snapshots.names, steps, strict=True):
        assert step <= set(names)
        assert len(set(names) - step) <= 1


def test_watching_changes_nothing() -> None:
    plain = air.PassManager(air.DEFAULT_PIPELINE).run(llama_program(), mesh={"sp": 4})
    assert structural_hash(llama_result().program) == structural_hash(plain.program)


def test_a_file_reads_back(tmp_path: Path) -> None:
    trace = llama_result().trace
    loaded = Trace.load(trace.save(tmp_path / "run.json"))
    assert loaded.recording.lines == trace.recording.lines
    assert [s.communication for s in loaded.recording.stages] == [s.communication for s in trace.recording.stages]
    assert shown(loaded.recording.program(-1)) == shown(trace.recording.program(-1))
    assert [r.name for r in loaded] == [r.name for r in trace]
    ulysses = loaded.record("ulysses")
    assert ulysses is not None
    assert [(len(e.removed), len(e.created), len(e.changed)) for e in ulysses.rewrites] == [(2, 6, 1)]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1, "lines": {}}'])
def test_what_is_no_recording_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(air.AutoSPError, match="recording"):
        Recording.load(tmp_path / "run.json")


def test_a_run_without_a_recorder_says_how_to_record() -> None:
    trace = air.PassManager([FoldRelu()]).run(small_program()).trace
    with pytest.raises(air.AutoSPError, match=r"instruments\.Recorder"):
        trace.save("nowhere.json")


def test_changes_without_a_rewriter_are_recorded() -> None:
    class ByHand(air.Pass):
        name = "by-hand"

        def run(self, program: air.Program, ctx: air.PassContext) -> None:
            first, second = program.find("aten.relu")
            second.replace_operand(first.result, first.operands[0])
            program.graph.erase(first)
            program.graph.move(program.graph.inputs[1], before=program.graph.inputs[0])
            program.signature.inputs.reverse()
            program.graph.create("aten.neg", (second.result,), type=second.result.type, after=second)

    recorder = Recorder()
    result = air.PassManager([ByHand()], verify=False, instruments=[recorder]).run(small_program())
    recording = recorder.recording()
    assert [d.rule for d in recording.stages[1].rewrites] == [BY_HAND]
    assert shown(recording.program(1)) == texts(result.program)


def test_moved_nodes_stand_where_they_went() -> None:
    class Swap(air.Pass):
        name = "swap"

        def run(self, program: air.Program, ctx: air.PassContext) -> None:
            rewriter: Rewriter = ctx.rewriter(program)
            x, w = program.graph.inputs
            with rewriter.rewrite("swap"):
                rewriter.move(w, before=x)
            program.signature.inputs.reverse()

    recorder = Recorder()
    result = air.PassManager([Swap()], instruments=[recorder]).run(small_program())
    (event,) = result.trace.records[0].rewrites
    (delta,) = recorder.recording().stages[1].rewrites
    assert event.moved == event.changed
    assert (delta.removed, len(delta.placed), delta.changed) == ((), 1, ())
    assert shown(recorder.recording().program(1)) == texts(result.program)


def test_memory_and_communication_are_those_of_the_simulator() -> None:
    _, batch = llama(num_hidden_layers=1)
    result = llama_result()
    last = result.trace.recording.stages[-1]
    run = simulate(result.program, batch)
    assert [(c.op, c.axis, c.bytes, c.phase, c.size) for c in last.communication] == [
        (c.op, c.axis, c.bytes, c.phase, c.size) for c in run.comm
    ]
    assert max(last.memory) == air.liveness(result.program).peak_bytes
    assert len(last.memory) == len(result.trace.recording.program(-1)) - 1


def test_streams_are_those_of_the_estimate() -> None:
    result = llama_result()
    recording = result.trace.recording
    *before, last = recording.stages
    assert not any(s.lanes for s in before if s.stage != "lowered")
    expected = predicted_lanes(result.program)
    program = recording.program(-1)
    assert [lane.name for lane in last.lanes] == [lane.name for lane in expected]
    for lane, known in zip(last.lanes, expected, strict=True):
        assert [(program[n].name, kind) for n, _, _, kind in lane.slices] == [(s.name, s.kind) for s in known.slices]
        assert [b for _, b, _, _ in lane.slices] == pytest.approx([1e6 * s.begin for s in known.slices], abs=0.01)
        assert [t for _, _, t, _ in lane.slices] == pytest.approx([1e6 * s.seconds for s in known.slices], abs=0.01)
    assert loads(dumps(recording)).stages[-1].lanes == last.lanes


def test_a_symbolic_program_is_sized_by_its_example() -> None:
    model, batch = llama(num_hidden_layers=1)
    program = air.capture(model, batch, dynamic=True)
    recorder = Recorder()
    air.PassManager("canonicalize,pad-tokens,token-partition,ulysses", instruments=[recorder]).run(
        program, mesh={"sp": 4}
    )
    last = recorder.recording().stages[-1]
    assert last.memory and not last.lanes
    assert all(c.bytes > 0 for c in last.communication)


def test_an_unfinished_run_keeps_what_happened() -> None:
    class Broken(air.Pass):
        name = "broken"

        def run(self, program: air.Program, ctx: air.PassContext) -> None:
            raise RuntimeError("no")

    recorder = Recorder()
    with pytest.raises(air.PassError):
        air.PassManager([FoldRelu(), Broken()], instruments=[recorder]).run(small_program())
    assert [s.name for s in recorder.recording().stages] == ["input", "fold-relu"]


def test_each_run_keeps_its_own_recording() -> None:
    recorder = Recorder()
    with pytest.raises(air.AutoSPError, match="nothing was recorded"):
        recorder.recording()
    manager = air.PassManager([FoldRelu()], instruments=[recorder])
    first = manager.run(small_program()).trace
    second = air.PassManager([], instruments=[recorder]).run(small_program()).trace
    assert [s.name for s in first.recording.stages] == ["input", "fold-relu"]
    assert [s.name for s in second.recording.stages] == ["input"]
    assert recorder.recording() is second.recording


def test_a_node_is_found_by_its_id() -> None:
    program = small_program()
    relu = program.find("aten.relu")[1]
    assert program.graph.node(relu.id) is relu
    made = program.graph.create("aten.neg", (relu.result,), type=relu.result.type)
    assert program.graph.node(made.id) is made
    program.graph.erase(made)
    assert program.graph.node(made.id) is None
