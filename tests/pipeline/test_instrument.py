"""Instruments watch a run; hashing decides what changed."""

from collections.abc import Sequence
from pathlib import Path

from autosp_ir.ir.graph import Phase
from autosp_ir.ir.hashing import structural_hash
from autosp_ir.ir.program import OutputKind, OutputSpec, Program, Stage
from autosp_ir.ir.types import Shard
from autosp_ir.pipeline import Instrument, Pass, PassManager, PassRecord, Trace
from autosp_ir.pipeline.instrument import PrintIR, Statistics, Timing
from autosp_ir.rewrite import RewriteEvent
from tests.pipeline.toys import Cut, FoldRelu, Whole, small_program


class Log(Instrument):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        self.calls.append(f"start {len(passes)}")

    def before_pass(self, pass_: Pass, program: Program) -> None:
        self.calls.append(f"before {pass_.name}")

    def on_rewrite(self, event: RewriteEvent) -> None:
        self.calls.append(f"rewrite by {event.pass_name}")

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        self.calls.append(f"after {record.text} {record.modified}")

    def after_pipeline(self, program: Program, trace: Trace) -> None:
        self.calls.append(f"end {len(trace)}")


def test_hooks_run_in_order() -> None:
    log = Log()
    PassManager([FoldRelu(), Whole()], instruments=[log]).run(small_program())
    assert log.calls == [
        "start 2",
        "before fold-relu",
        "rewrite by fold-relu",
        "after fold-relu True",
        "before whole",
        "after whole False",
        "end 2",
    ]


def test_timing_adds_up_over_runs() -> None:
    timing = Timing()
    manager = PassManager([FoldRelu()], instruments=[timing])
    manager.run(small_program())
    manager.run(small_program())
    assert timing.runs == {"fold-relu": 2}
    assert timing.seconds["fold-relu"] > 0
    assert "fold-relu" in str(timing)


def test_statistics_count_operations() -> None:
    statistics = Statistics()
    PassManager([FoldRelu(), Whole()], instruments=[statistics]).run(small_program())
    assert statistics.changes == [("fold-relu", {"aten.relu": -1}), ("whole", {})]
    assert str(statistics) == "fold-relu: -1 aten.relu\nwhole: no change"


def test_ir_is_printed_to_numbered_files(tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    PassManager([FoldRelu(), Whole(), Cut()], instruments=[PrintIR(folder)]).run(small_program(), mesh={"sp": 2})
    assert sorted(p.name for p in folder.iterdir()) == ["00-input.ir", "01-fold-relu.ir", "03-cut.ir"]
    assert "aten.relu" in (folder / "00-input.ir").read_text()


def test_the_trace_reads_like_a_log() -> None:
    trace = PassManager([FoldRelu()]).run(small_program()).trace
    assert str(trace).startswith("fold-relu: modified, 1 rewrites, ")
    record = trace.record("fold-relu")
    assert record is not None and record.rewrites[0].rule.startswith(__file__.replace("test_instrument", "toys"))
    assert trace.record("nothing") is None


def test_the_hash_sees_structure_and_not_names() -> None:
    base = structural_hash(small_program())
    same = small_program()
    same.graph.rename(same.graph.value("relu"), "renamed")
    same.find("aten.relu")[0].meta["val"] = object()
    same.facts.add("canonical")
    assert structural_hash(same) == base
    assert structural_hash(same.clone()) == base


def test_the_hash_sees_every_part() -> None:
    def args(p: Program) -> None:
        p.find("aten.relu")[1].set_args((p.graph.value("x"),))

    def layout(p: Program) -> None:
        value = p.find("aten.relu")[0].result
        value.type = value.tensor_type.on_axis("sp", Shard(0))

    def phase(p: Program) -> None:
        p.find("aten.relu")[0].phase = Phase.BACKWARD

    def mesh(p: Program) -> None:
        p.mesh["sp"] = 2

    def stage(p: Program) -> None:
        p.stage = Stage.JOINT

    def info(p: Program) -> None:
        p.info["seq_dims"]["x"] = 0

    def output(p: Program) -> None:
        p.signature.outputs[0] = OutputSpec("other", OutputKind.USER_OUTPUT, "other")

    def attribute(p: Program) -> None:
        p.find("aten.sum")[0].set_args((p.find("aten.mul.Tensor")[0].result,), {"dtype": None})

    def order(p: Program) -> None:
        first = p.graph.create("aten.abs", (p.graph.value("x"),))
        second = p.graph.create("aten.neg", (p.graph.value("x"),))
        p.graph.move(second, before=first)

    def nested(p: Program) -> None:
        p.attrs["body"] = small_program().graph

    changes = [args, layout, phase, mesh, stage, info, output, attribute, order, nested]
    hashes = set()
    for change in changes:
        program = small_program()
        change(program)
        hashes.add(structural_hash(program))
    assert len(hashes | {structural_hash(small_program())}) == len(changes) + 1
