"""`overlap`: order a lowered program so that communication runs beside compute.

A collective starts as soon as it is ready and is awaited in front of the first costed work that reads it. Where a wait
would still stall, work that stood in front of the start moves between the two: in a backward the gradients of weights,
which nothing waits for. Candidates are judged on a timeline of one compute stream and one communication stream for each
axis and each direction of copies to host memory, and by their memory; the order of the program itself is one of them,
so that no schedule is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence

from autosp_ir.analysis.cost import device, host_link, link
from autosp_ir.analysis.liveness import liveness
from autosp_ir.analysis.timeline import Durations, Timeline, durations, is_start, run
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import TensorType
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._motion import fill_stalls, out_of_place, start_early, wait_late


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
        """What connects the ranks, for the estimate: nvlink4, nvlink3, pcie or network-400g."""
        host_link: str = "pcie5"
        """What connects a device to host memory, where the program offloads: pcie5, pcie4 or nvlink-c2c."""
        memory: float = 1.02
        """The peak may grow to this multiple of that of the program's own order."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Reorder `program` in place.

        A program that writes in place, does not communicate, or was captured with a symbolic length keeps its order,
        with a remark.

        Raises:
            UnsupportedError: The tables do not know the device or a link.
        """
        on, over, to_host = device(self.options.device), link(self.options.link), host_link(self.options.host_link)
        kept = _reason_to_keep(program)
        if kept is not None:
            ctx.remark("missed", None, kept)
            return
        own = [n for n in program.graph.nodes if n.op.kind not in ("placeholder", "output")]
        priced = durations(own, on, over, host_link=to_host)
        rewriter = ctx.rewriter(program)
        before = run(own, priced)
        cap = liveness(program).peak_bytes * self.options.memory
        for order in sorted(_candidates(own, priced), key=lambda order: run(order, priced).makespan):
            after = run(order, priced)
            if after.makespan >= before.makespan:
                break
            _reorder(rewriter, order)
            if liveness(program).peak_bytes <= cap:
                _report(ctx, priced, before, after)
                return
            _reorder(rewriter, own)
        ctx.remark("missed", None, "no order within the memory cap is faster than the program's own")
        _report(ctx, priced, before, before)


def _reason_to_keep(program: Program) -> str | None:
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


def _candidates(own: Sequence[Node], priced: Durations) -> list[list[Node]]:
    """Orders to judge; each phase is ordered by itself, so that forward and backward can be cut apart."""
    forward = [n for n in own if n.phase is Phase.FORWARD]
    rest = [n for n in own if n.phase is not Phase.FORWARD]
    apart = [[*wait_late(start_early(part))] for part in (forward, rest)]
    filled = [fill_stalls(part, priced) for part in apart]
    return [apart[0] + apart[1], filled[0] + filled[1]]


def _reorder(rewriter: Rewriter, order: Sequence[Node]) -> None:
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
    for wait, stall in sorted(after.stalls.items(), key=lambda item: -item[1])[:8]:
        ctx.remark("missed", wait, f"still stalls for {stall * 1e6:.0f} us by estimate")
