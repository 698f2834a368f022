"""`overlap`: order a lowered program so that communication runs beside compute.

Orders of each half are made by list scheduling and judged on a timeline of one compute stream, one communication stream
for each process group and one for each direction of copies to host memory, and by their memory: a collective goes out
as soon as it is ready and is awaited in front of the first costed work that reads it; where that would still stall,
other work comes first, in a backward the gradients of weights. The program's own order is one of the candidates, so
that no schedule is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from autosp_ir.analysis.cost import device, host_link, is_costed, link
from autosp_ir.analysis.fused import Fusion, fused_durations
from autosp_ir.analysis.timeline import Durations, Timeline, durations, is_start, run, stream_of
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.streams import mesh_axis, stream
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._motion import is_light, out_of_place
from autosp_passes._schedule.portfolio import Schedule, best
from autosp_passes._schedule.problem import Problem, halves


class Overlap(Pass):
    """Move starts up, waits down, and work in between: `overlap{device=h100 link=nvlink4}`.

    Statistics are microseconds of the estimate: the makespan and the communication that no compute covers, before and
    after, and the bound below which no order can go.
    """

    name = "overlap"
    stage = Stage.LOWERED
    requires = frozenset({"comm-lowered"})
    provides = frozenset({"overlapped"})
    conflicts = frozenset({"overlapped"})

    class Options(Pass.Options):
        """Options of `overlap`."""

        device: str = "h100"
        """What computes, for the estimate: h100, h200, a100 or cpu."""
        link: str = "nvlink4"
        """What connects the ranks, for the estimate: nvlink4, nvlink3, pcie5, pcie or network-400g."""
        host_link: str = "pcie5"
        """What connects a device to host memory, where the program offloads: pcie5, pcie4 or nvlink-c2c."""
        memory: float = 1.02
        """The peak may grow to this multiple of that of the program's own order."""
        fused: bool = False
        """Price and weigh the program as a compiler fuses it, such as Inductor."""
        gradients: Literal["shared", "own"] = "shared"
        """`own`: gradients of parameters are reduced in a process group of their own, in no exchange's way."""
        exchanges: Literal["shared", "own"] = "shared"
        """`own`: results of attentions are exchanged in a process group of their own, so that they can be under way
        together with the queries, keys and values of the next one: beside an attention one group has at most one
        collective under way. A communicator more."""
        solver: Literal["lists", "cp-sat"] = "lists"
        """`cp-sat`: also search with OR-tools, which must be installed; minutes for a deep model."""
        effort: float = 20.0
        """How long `cp-sat` searches each half, in its deterministic seconds."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Reorder `program` in place.

        A program that writes in place, does not communicate, or was captured with a symbolic length keeps its order,
        with a remark.

        Raises:
            UnsupportedError: The tables do not know the device or a link, or `cp-sat` is not installed.
        """
        on, over, to_host = device(self.options.device), link(self.options.link), host_link(self.options.host_link)
        kept = _reason_to_keep(program, self.options.memory)
        if kept is not None:
            ctx.remark("missed", None, kept)
            return
        rewriter = ctx.rewriter(program)
        if self.options.gradients == "own":
            _separate_gradients(program, rewriter, ctx)
        if self.options.exchanges == "own":
            _separate_exchanges(program, rewriter, ctx)
        fusion = Fusion(program) if self.options.fused else None
        if fusion is not None:
            priced = fused_durations(fusion, on, over, to_host)
        else:
            priced = durations(program, on, over, host_link=to_host)
        problems = halves(program, priced, fusion)
        cap = max(p.peak(range(len(p.nodes))) for p in problems) * self.options.memory
        found = [best(p, cap, self._effort()) for p in problems]
        order = [p.nodes[i] for p, schedule in zip(problems, found, strict=True) for i in schedule.order]
        own = [n for p in problems for n in p.nodes]
        before = run(own, priced)
        reorder(rewriter, order)
        _report(ctx, priced, before, run(order, priced))
        for problem, schedule in zip(problems, found, strict=True):
            _explain(ctx, problem, schedule)

    def _effort(self) -> float:
        return self.options.effort if self.options.solver == "cp-sat" else 0.0


def _reason_to_keep(program: Program, memory: float) -> str | None:
    if memory < 1:
        return f"a peak of {memory:g} times the program's own cannot be kept by ordering: the order stays as it is"
    nodes = list(program.graph.nodes)
    writer = next((n for n in nodes if n.op.has(Trait.MUTATES)), None)
    if writer is not None:
        return f"%{writer.name} writes in place, so the order stays as it is"
    if not any(is_start(n) for n in nodes):
        return "the program does not communicate, so there is nothing to overlap"
    shapes = (v.type.shape for n in nodes for v in n.results if isinstance(v.type, TensorType))
    if any(not isinstance(extent, int) for shape in shapes for extent in shape):
        return "the length is symbolic, so that nothing can be priced; capture it with dynamic=False"
    return None


def _separate_gradients(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Move the reductions that nothing but the caller waits for into a stream of their own."""
    computed: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node.op.kind != "output" and (is_costed(node) or is_start(node) or computed & set(node.users)):
            computed.add(node)
    for node in [n for n in program.graph.nodes if n.is_op("_c10d_functional.all_reduce")]:
        waited = computed & set(node.users) or node.phase is Phase.FORWARD
        if not waited and rewriter.allows(node, "own-stream"):
            _move_to(node, "gradients", rewriter, ctx)


def _separate_exchanges(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Move the exchanges of what attentions give into a stream of their own."""
    given: set[Node] = set()
    for node in program.graph.nodes:
        follows = bool(given & {v.producer for v in node.operands})
        if node.op.name.startswith("autosp.attention") or (is_light(node) and follows):
            given.add(node)
        elif node.is_op("_c10d_functional.all_to_all_single") and follows and rewriter.allows(node, "own-stream"):
            _move_to(node, "results", rewriter, ctx)


def _move_to(start: Node, purpose: str, rewriter: Rewriter, ctx: PassContext) -> None:
    own = stream(mesh_axis(stream_of(start)), purpose)
    rewriter.set_args(start, *start.with_arg("group_name", own))
    ctx.count("separated")


def reorder(rewriter: Rewriter, order: Sequence[Node]) -> None:
    """Bring the operations of a program into an order, with as few moves as that takes.

    Args:
        rewriter: Of the program.
        order: All its operations in a topological order, without placeholders and output.
    """
    now = [n for n in rewriter.graph.nodes if n.op.kind not in ("placeholder", "output")]
    inputs = [n for n in rewriter.graph.nodes if n.op.kind == "placeholder"]
    with rewriter.rewrite("order"):
        for node, behind in out_of_place(now, order):
            anchor = behind or (inputs[-1] if inputs else None)
            if anchor is None:
                rewriter.move(node, before=next(iter(rewriter.graph.nodes)))
            else:
                rewriter.move(node, after=anchor)


def _report(ctx: PassContext, priced: Durations, before: Timeline, after: Timeline) -> None:
    figures = {
        "makespan_us_before": before.makespan,
        "makespan_us": after.makespan,
        "exposed_us_before": before.exposed,
        "exposed_us": after.exposed,
        "lower_bound_us": priced.lower_bound,
    }
    for name, seconds in figures.items():
        ctx.count(name, round(seconds * 1e6))


def _explain(ctx: PassContext, problem: Problem, schedule: Schedule) -> None:
    phase = problem.nodes[0].phase.value
    if schedule.name == "program order":
        ctx.remark("missed", None, f"no order of the {phase} within the memory is faster than the program's own")
    else:
        ctx.remark("applied", None, f"{phase}: {schedule.name}, a peak of {schedule.peak / 2**20:.1f} MiB")
    for wait, stall in sorted(schedule.timeline.stalls.items(), key=lambda item: -item[1])[:4]:
        ctx.remark("missed", wait, f"still stalls for {stall * 1e6:.0f} us by estimate")
