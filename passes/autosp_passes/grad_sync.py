"""`grad-sync`: who completes the parameter gradients, the program or DDP.

A parameter that meets sharded work passes `invariant_to_replicate`, so its gradient ends in an all-reduce. Mode
`in_graph` keeps one all-reduce per parameter, as soon as the gradient is there: autograd leaves them all to the end,
where nothing is left to run beside them. Small ones, such as those of norms, can share one: what they take is latency.
That of an
embedding may be made of the gathered gradients of all tokens instead, where these are smaller than the table. Mode
`external` leaves the reduction out and multiplies by the number of ranks, so that averaging over the ranks, which DDP
does, gives the complete gradient.
"""

from __future__ import annotations

from typing import Literal

from autosp_ir.analysis.cost import link
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import InputKind, OutputKind, Program, Stage
from autosp_ir.ir.types import PARTIAL, Layout
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._buckets import buckets, reduce_together
from autosp_passes._embedding_gradients import Choice, gather_rows

_REDUCE = "autosp.all_reduce"
# Linear in their first operand whatever the others are, so that they commute with a sum over ranks.
_LINEAR = frozenset(
    {
        "aten.view",
        "aten._unsafe_view",
        "aten.reshape",
        "aten.t",
        "aten.transpose.int",
        "aten.permute",
        "aten.unsqueeze",
        "aten.squeeze.dim",
        "aten.clone",
        "aten.alias",
        "aten.neg",
    }
)


class GradSync(Pass):
    """Settle where parameter gradients are reduced: `mode=in_graph` or `mode=external`.

    Gradients of inputs, and of parameters that no sharded work uses, are complete on every rank and stay so.
    """

    name = "grad-sync"
    stage = Stage.JOINT
    provides = frozenset({"grad-synced"})
    conflicts = frozenset({"grad-synced"})

    class Options(Pass.Options):
        """Options of `grad-sync`."""

        mode: Literal["in_graph", "external"] = "in_graph"
        """`in_graph`: every rank returns the complete gradient. `external`: ranks x its partial sum, to be averaged."""
        bucket: float | Literal["auto"] = 0.0
        """MiB up to which gradients share a reduction; `auto`: what the link sends in the time of its latency."""
        embeddings: Choice = "auto"
        """How gradients of embeddings become whole: `reduce` them, `gather` their tokens, or what takes less time."""
        link: str = "nvlink4"
        """What connects the ranks, for `auto`: nvlink4, nvlink3, pcie5, pcie or network-400g."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            UnsupportedError: The table does not know the link.
        """
        rewriter = ctx.rewriter(program)
        over = link(self.options.link)
        limit = over.latency * over.bandwidth if self.options.bucket == "auto" else self.options.bucket * 2**20
        for position in _positions(program):
            gradient = program.graph.output_node.args[0][position].producer
            if rewriter.allows(gradient, "one-reduction-each"):
                _sink_reductions(gradient, rewriter, ctx)
        if self.options.mode == "external":
            _leave_to_caller(program, rewriter, ctx)
        else:
            for reduction in _reductions(program):
                if rewriter.allows(reduction, "gather-rows") and gather_rows(
                    reduction, self.options.embeddings, over, rewriter
                ):
                    ctx.count("gathered embeddings")
            _reduce_when_ready(program, rewriter, ctx)
            for members in buckets(_reductions(program), limit):
                if rewriter.allows(members[-1], "bucket"):
                    with rewriter.rewrite("bucket"):
                        reduce_together(members, rewriter)
                    ctx.count("buckets")
        rewriter.dead_code()
        program.info["grad_sync"] = self.options.mode


def _positions(program: Program) -> list[int]:
    """Where gradients of parameters stand in the output tuple."""
    parameters = {s.target for s in program.signature.inputs if s.kind is InputKind.PARAMETER}
    outputs = program.graph.output_node.args[0]
    return [
        i
        for i, spec in enumerate(program.signature.outputs)
        if spec.kind is OutputKind.GRADIENT and spec.target in parameters and isinstance(outputs[i], Value)
    ]


def _reductions(program: Program) -> list[Node]:
    """The all-reduces that make gradients of parameters, each once."""
    outputs = program.graph.output_node.args[0]
    made = dict.fromkeys(outputs[i].producer for i in _positions(program))
    return [node for node in made if node.is_op(_REDUCE)]


def _sink_reductions(node: Node, rewriter: Rewriter, ctx: PassContext) -> None:
    """Move the all-reduces behind `node` to its end, and merge those that meet in a sum.

    A parameter used in several places has one all-reduce for each; their sum needs one.
    """
    if node.op.name in _LINEAR:
        _sink_reductions(node.operands[0].producer, rewriter, ctx)
        _sink_one(node, rewriter)
    elif node.is_op("aten.add.Tensor") and len(node.operands) == 2 and len(node.args) == 2 and not node.kwargs:
        for operand in dict.fromkeys(node.operands):
            _sink_reductions(operand.producer, rewriter, ctx)
        if _sink_one(node, rewriter):
            ctx.count("merged")


def _sink_one(node: Node, rewriter: Rewriter) -> bool:
    """op(all_reduce(x), all_reduce(y)) -> all_reduce(op(x, y)); False when it does not have this form."""
    reductions = [v.producer for v in node.operands]
    if not all(r.is_op(_REDUCE) and len(r.result.uses) == node.operands.count(r.result) for r in reductions):
        return False
    groups = {(r.arg("axis"), r.arg("size")) for r in reductions}
    if len(groups) != 1:
        return False
    axis, size = groups.pop()
    swap = {r.result: r.operands[0] for r in reductions}
    complete = node.result.tensor_type.layout
    with rewriter.before(node):
        partial = rewriter.clone_node(node, mapping=swap)
        rewriter.set_type(partial, partial.tensor_type.on_axis(axis, PARTIAL))
        reduced = rewriter.create(_REDUCE, (partial, axis, size), layout=complete)
    rewriter.replace(node, reduced)
    for reduction in dict.fromkeys(reductions):
        rewriter.erase(reduction)
    return True


def _reduce_when_ready(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    """Put each gradient's reduction right behind what it reduces."""
    for reduction in _reductions(program):
        ready = reduction.operands[0].producer
        movable = ready.phase is reduction.phase and ready.op.kind != "placeholder" and ready is not reduction.prev
        if movable and rewriter.allows(reduction, "reduce-when-ready"):
            rewriter.move(reduction, after=ready)
            ctx.count("reduced earlier")


def _leave_to_caller(program: Program, rewriter: Rewriter, ctx: PassContext) -> None:
    outputs = list(program.graph.output_node.args[0])
    averaged: dict[Value, Value] = {}
    for position in _positions(program):
        gradient = outputs[position]
        if gradient not in averaged:
            averaged[gradient] = _unreduced(gradient, rewriter, ctx)
        outputs[position] = averaged[gradient]
    rewriter.set_args(program.graph.output_node, (tuple(outputs),))


def _unreduced(gradient: Value, rewriter: Rewriter, ctx: PassContext) -> Value:
    """The rank's own share times the number of ranks, whose average over the ranks is the gradient."""
    partial, ranks, axes = gradient, 1, []
    while partial.producer.is_op(_REDUCE):
        axes.append(str(partial.producer.arg("axis")))
        ranks *= partial.producer.arg("size")
        partial = partial.producer.operands[0]
    if ranks == 1:
        return gradient
    layout = Layout({**dict(partial.tensor_type.layout.items()), **dict.fromkeys(axes, PARTIAL)})
    ctx.remark("applied", gradient, f"left to the caller to average over {', '.join(axes)}")
    ctx.count("left to the caller")
    with rewriter.after(gradient.producer):
        return rewriter.create("aten.mul.Scalar", (partial, ranks), layout=layout)
