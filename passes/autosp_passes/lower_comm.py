"""`lower-comm`: layout operators become asynchronous collectives and plain shape operations.

The collectives of `_c10d_functional` work on dimension 0. Around each one the blocks of the ranks are therefore moved
outermost, to `[ranks, …]`, so that the permutes fuse into their neighbours:

    all_to_all(x, split, concat):  view […, P, n, …]  permute [P, …]  start  …  wait  permute […, P, m, …]  view

Within its block the longer of the two dimensions, such as tokens rather than heads, is outermost: where tokens are put
together they arrive in order, to be read as they lie, and where they are taken apart what was computed from such
tokens already lies in blocks.

A start stands where its operator stood and its wait in front of the first reader, so that whatever the program has in
between runs while the collective does. Which operations those are is a scheduling decision of other passes.
Group names stay logical, and what reads the rank (`shard`, `axis_index`) or names its peers (`permute`) stays an
`autosp::` operator: real process groups are bound at emission.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Phase, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import INVARIANT, Layout, Shard, TensorType, map_tensors
from autosp_ir.ir.verify import nested_graphs
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._rank_blocks import RankBlocks

_ERASED_ALONE = ("autosp.axis_index",)


class LowerComm(Pass):
    """Turn `autosp::` collectives into start and wait pairs; erase identities, and groups of one rank."""

    name = "lower-comm"
    stage = Stage.JOINT
    produces = Stage.LOWERED
    provides = frozenset({"comm-lowered"})

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            UnsupportedError: A nested graph communicates, or two mesh axes cut the dimension that a collective moves.
        """
        _refuse_nested(program)
        rewriter = ctx.rewriter(program)
        _forget_single_ranks(program, rewriter)
        order = program.graph.index()
        for node in program.graph.nodes:
            if not _communicates(node) or node.is_op(*_ERASED_ALONE):
                continue
            lowers = node.arg("size") == 1 or node.op.has(Trait.IDENTITY) or node.op.name in _LOWERINGS
            if lowers and not rewriter.allows(node):
                continue
            if node.arg("size") == 1 or node.op.has(Trait.IDENTITY):
                rewriter.replace(node, node.operands[0])
                ctx.count("erased")
            elif node.op.name in _LOWERINGS:
                with rewriter.rewrite("lower"):
                    _lower(node, rewriter, _first_reader(node, order))
                ctx.count("lowered")
            else:
                ctx.count("kept")
        rewriter.dead_code()
        program.stage = Stage.LOWERED


def _communicates(node: Node) -> bool:
    return node.op.name.startswith("autosp.") and bool(
        node.op.traits & {Trait.COLLECTIVE, Trait.IDENTITY, Trait.READS_RANK}
    )


def _forget_single_ranks(program: Program, rewriter: Rewriter) -> None:
    """Along an axis of one rank everything is whole, once its collectives are gone."""
    single = [axis for axis, size in program.mesh.items() if size == 1]

    def whole(kind: TensorType) -> TensorType:
        return kind.with_layout(Layout({a: p for a, p in kind.layout.items() if a not in single}))

    for node in program.graph.nodes if single else ():
        for value in node.results:
            rewriter.set_type(value, map_tensors(value.type, whole))


def _refuse_nested(program: Program) -> None:
    for name, graph in nested_graphs(program):
        found = next((n for n in graph.nodes if _communicates(n)), None)
        if found is not None:
            raise UnsupportedError(
                f"the nested graph {name!r} communicates ({found.op.name}), which cannot be scheduled",
                node=found,
                hint="inline the region before partitioning, for instance by capturing without checkpoint wrappers",
            )


def _lower(node: Node, rewriter: Rewriter, reader: Node | None) -> None:
    """Start at the node's place, wait in front of `reader`; right behind the start when there is none."""
    with rewriter.before(node):
        blocks, finish = _LOWERINGS[node.op.name](node, rewriter)
    with rewriter.before(reader or node):
        blocks.wait()
        lowered = finish(blocks)
    rewriter.replace(node, lowered)


def _first_reader(node: Node, order: Mapping[Node, int]) -> Node | None:
    """The first node that reads the result, unless the start would then be awaited in another phase."""
    first = min(node.users, key=order.__getitem__, default=None)
    if first is None or first.phase is node.phase:
        return first
    # The gradients that backward returns are read by the output alone.
    return first if first.op.kind == "output" and node.phase is not Phase.FORWARD else None


def _all_reduce(node: Node, rewriter: Rewriter) -> _Started:
    blocks = RankBlocks(node, rewriter, node.arg("x"))
    blocks.start("_c10d_functional.all_reduce", ("sum", str(node.arg("axis"))), str(node.arg("axis")), INVARIANT)
    return blocks, RankBlocks.value


def _all_gather(node: Node, rewriter: Rewriter) -> _Started:
    dim, axis, size = _dim(node, "dim"), str(node.arg("axis")), node.arg("size")
    blocks = RankBlocks(node, rewriter, node.arg("x")).unsqueeze().contiguous()
    blocks.start("_c10d_functional.all_gather_into_tensor", (size, axis), axis, INVARIANT)
    return blocks, partial(RankBlocks.merge, dim=dim)


def _reduce_scatter(node: Node, rewriter: Rewriter) -> _Started:
    dim, axis, size = _dim(node, "dim"), str(node.arg("axis")), node.arg("size")
    blocks = RankBlocks(node, rewriter, node.arg("x")).split(dim, size).contiguous()
    blocks.start("_c10d_functional.reduce_scatter_tensor", ("sum", size, axis), axis, Shard(0))
    return blocks, partial(RankBlocks.merge, dim=dim)


def _all_to_all(node: Node, rewriter: Rewriter) -> _Started:
    split, concat = _dim(node, "split_dim"), _dim(node, "concat_dim")
    axis, even = str(node.arg("axis")), [1] * node.arg("size")
    blocks = RankBlocks(node, rewriter, node.arg("x")).split(split, len(even))
    gathers = _extent(node, concat) * len(even) >= _extent(node, split)
    lead = concat if gathers else split
    blocks.lead(lead + 1).contiguous()
    left = split + 1 if lead < split else split + 2
    blocks.start("_c10d_functional.all_to_all_single", (even, even, axis), axis, Shard(left if gathers else 1))
    if gathers:
        return blocks, partial(RankBlocks.merge_led, dim=concat)
    return blocks, lambda arrived: arrived.follow(lead + 1).merge(concat)


def _extent(node: Node, dim: int) -> float:
    """Local extent of a dimension; one that is a symbol counts as long."""
    extent = node.operands[0].tensor_type.shape[dim]
    return extent if isinstance(extent, int) else math.inf


def _dim(node: Node, argument: str) -> int:
    dim: int = node.arg(argument)
    return dim % node.operands[0].tensor_type.ndim


_Started = tuple[RankBlocks, Callable[[RankBlocks], Value]]
"""A collective in flight, and what makes the operator's result of what arrives."""

_LOWERINGS: dict[str, Callable[[Node, Rewriter], _Started]] = {
    "autosp.all_reduce": _all_reduce,
    "autosp.all_gather": _all_gather,
    "autosp.reduce_scatter": _reduce_scatter,
    "autosp.all_to_all": _all_to_all,
}
