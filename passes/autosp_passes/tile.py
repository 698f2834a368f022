"""`tile`: run wide token-wise work, such as the head with its loss and MLPs, chunk by chunk along the tokens.

Logits of a long sequence are the largest tensor of a training step, and the hidden layers of MLPs come next. Neither
needs to exist whole: each chunk of tokens is computed, used and dropped. In the backward `remat` computes a chunk
again right before its gradients, so that one chunk is alive at a time there too. Nothing is approximated: the loss
keeps its global count, and gradients of weights are added up over the chunks. Where it comes from: tiled losses and
MLPs in Arctic Long Sequence Training (arXiv 2506.13996), as hand-written autograd functions for known models.
"""

from __future__ import annotations

import math
from typing import Literal

from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._chunk_loop import ChunkLoop, NotChunkable
from autosp_passes._wide_regions import Region, TokenMap, stream_width, wide_regions

_MOST_CHUNKS = 32
_LEAST_TOKENS = 2


class Tile(Pass):
    """Cut wide token-wise regions into chunks: `tile{regions=loss chunks=16}`.

    Works on a partitioned program and on one for a single device. A region that needs all its tokens at once, hands on
    something wide or has a symbolic length stays as it is, with a remark.
    """

    name = "tile"
    stage = "forward"
    requires = frozenset({"canonical"})
    provides = frozenset({"tiled"})
    conflicts = frozenset({"tiled"})

    class Options(Pass.Options):
        """Options of `tile`."""

        regions: Literal["all", "loss", "mlp"] = "all"
        """`loss`: those that end in a sum over tokens; `mlp`: those that hand tokens on."""
        chunks: int | Literal["auto"] = "auto"
        """Chunks of each region; `auto`: as many as make a chunk about as large as what flows between layers."""
        loss_chunks: int | Literal["auto"] | None = None
        """Chunks of the regions that end in a sum, where they are not `chunks`."""
        loop_from: int = 33
        """From how many chunks on a region is one operation that loops over them: the program stays short and compiles
        as fast for any number of chunks. Fewer chunks are written out one by one, which later passes see into."""
        wide: float = 2.0
        """From which multiple of the width between layers a value is wide."""
        axis: str = "sp"
        """Mesh axis that holds the token shards, where there is one."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            PassError: `chunks` does not divide the tokens of one rank.
        """
        tokens = TokenMap(program, self.options.axis)
        stream = stream_width(tokens, program)
        if stream is None or not isinstance(tokens.tokens, int):
            ctx.remark("missed", None, "no tokens, or a length that is not a number: nothing to tile")
            return
        regions, missed = wide_regions(program, tokens, self.options.wide * stream)
        for node, reason in missed:
            ctx.remark("missed", node, reason)
        rewriter = ctx.rewriter(program)
        for region in regions:
            if self._wanted(region, tokens):
                self._tile(program, ctx, rewriter, region, self._chunks(region, stream, tokens))
        rewriter.dead_code()
        if not ctx.statistics.get("tiled"):
            ctx.remark("missed", None, "no region is wide enough and cheap to hand on: nothing was tiled")

    def _wanted(self, region: Region, tokens: TokenMap) -> bool:
        return self.options.regions in ("all", "loss" if _is_summed(region, tokens) else "mlp")

    def _chunks(self, region: Region, stream: int, map_: TokenMap) -> int:
        tokens, asked = region.tokens, self.options.chunks
        if self.options.loss_chunks is not None and _is_summed(region, map_):
            asked = self.options.loss_chunks
        fitting = [n for n in range(2, tokens // _LEAST_TOKENS + 1) if tokens % n == 0]
        if asked != "auto":
            if asked not in fitting:
                raise PassError(
                    f"{tokens} tokens on a rank cannot be cut into {asked} equal chunks",
                    pass_name=self.name,
                    hint=f"use one of {fitting or 'none'}, chunks=auto, or pad-tokens{{multiple={max(asked, 1)}}}",
                )
            return asked
        wanted = min(_MOST_CHUNKS, math.ceil(region.width / stream))
        fitting = [n for n in fitting if n <= _MOST_CHUNKS]
        return min((n for n in fitting if n >= wanted), default=max(fitting, default=1))

    def _tile(self, program: Program, ctx: PassContext, rewriter: Rewriter, region: Region, chunks: int) -> None:
        first = region.nodes[0]
        if chunks < 2:
            ctx.remark("missed", first, "the tokens of a rank have no divisor to cut them by")
            return
        looped = chunks >= self.options.loop_from
        try:
            loop = ChunkLoop(program, region, chunks)
        except NotChunkable as reason:
            ctx.remark("missed", first, str(reason))
            return
        anchor = _anchor(program, region)
        if anchor is None:
            ctx.remark("missed", first, "something outside reads a part of it before all its operands are there")
            return
        if not rewriter.allows(first, "tile"):
            return
        with rewriter.rewrite("tile"):
            with rewriter.after(anchor):
                results = loop.write_loop(rewriter) if looped else loop.write(rewriter)
            for old, new in zip(region.outputs, results, strict=True):
                rewriter.replace(old, new)
        ctx.count("tiled")
        ctx.count("chunks", chunks)
        form = "in a loop over" if looped else "in"
        ctx.remark("applied", anchor, f"{len(region.nodes)} operations {form} {chunks} chunks of tokens")


def _is_summed(region: Region, tokens: TokenMap) -> bool:
    """Whether the region hands on a sum over its tokens, as losses do."""
    return any(tokens.of(v) is None for v in region.outputs)


def _anchor(program: Program, region: Region) -> Node | None:
    """The last node that the region waits for, if whatever reads the region stands behind it."""
    order = program.graph.index()
    sources = [v.producer for v in region.outside]
    last = max((n for n in [*sources, *program.graph.inputs]), key=order.__getitem__)
    members = set(region.nodes)
    readers = (u for v in region.outputs for u in v.users if u not in members)
    return last if all(order[u] > order[last] for u in readers) else None
