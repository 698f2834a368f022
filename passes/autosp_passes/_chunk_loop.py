"""One region as a program of one chunk, and that program written out once for every chunk, or once in a loop.

A chunk stands to its region as a rank to the whole model: the region is cut along the tokens by the walk of
`token-partition`, over an axis that is a loop and not a mesh axis. So every operation is chunked by its own layout
rule, weights stay whole, sums over tokens become sums over chunks, and what cannot be cut shows as a gather.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Graph, Node, Value, map_values
from autosp_ir.ir.program import InputKind, InputSpec, OutputKind, OutputSpec, Program, Signature
from autosp_ir.ir.types import Dim, Shard, TensorType, without_layout
from autosp_ir.pipeline.base import PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._loop_body import loop_body
from autosp_passes._means import split_means
from autosp_passes._wide_regions import Region
from autosp_passes.token_partition import PartitionWalk

_LOOP = "chunk"
_JOINS = ("autosp.all_gather", "autosp.all_reduce")


class NotChunkable(AutoSPError):
    """A region that cannot run chunk by chunk."""


class ChunkLoop:
    """A region cut into chunks.

    Args:
        program: The program that holds the region, which is not changed yet.
        region: The region.
        chunks: How many chunks; they divide the tokens of one rank.

    Raises:
        NotChunkable: Some operation needs all tokens at once.
    """

    def __init__(self, program: Program, region: Region, chunks: int) -> None:
        self.region = region
        self.chunks = chunks
        self._source: dict[Node, Node] = {}
        self._inputs: dict[Value, Value] = {}
        self._body = self._extract(program)
        split_means(self._body, Rewriter(self._body))
        context = PassContext(mesh={_LOOP: chunks}, program=self._body)
        self._body.mesh = {_LOOP: chunks}
        PartitionWalk(self._body, context, _LOOP, chunks).run()
        self._varying = self._find_varying()
        self._check()

    # -- one chunk ---------------------------------------------------------------------------------------------------

    def _extract(self, program: Program) -> Program:
        """The region alone, in the shapes of one rank and without layouts."""
        graph = Graph()
        copies: dict[Value, Value] = {}
        specs: list[InputSpec] = []
        opened: list[tuple[Value, Value]] = []
        dims: dict[str, int] = {}
        for value in self.region.outside:
            shard = self.region.inputs.get(value)
            kind = without_layout(value.type)
            if shard is not None and isinstance(kind, TensorType):
                kind = TensorType(opened_shape(kind.shape, shard), kind.dtype, kind.device)
            made = graph.create("placeholder", name=value.name, type=kind)
            copies[value] = made.result
            self._inputs[made.result] = value
            floating = isinstance(kind, TensorType) and kind.dtype.is_floating_point
            role = InputKind.PARAMETER if shard is None else InputKind.USER_INPUT
            specs.append(InputSpec(made.name, role, made.name, floating))
            if shard is not None:
                dims[made.name] = opened_dim(shard)
                if shard.outer != 1:
                    opened.append((value, made.result))
        for value, whole in opened:
            shape = value.tensor_type.shape
            closed = graph.create("aten.reshape", (whole, list(shape)), type=without_layout(value.type))
            copies[value] = closed.result
        for node in self.region.nodes:
            copy = graph.create(
                node.op,
                map_values(node.args, copies.__getitem__),
                map_values(dict(node.kwargs), copies.__getitem__),
                name=node.name,
                type=without_layout(node.result.type),
                origin=node.origin,
            )
            copies[node.result] = copy.result
            self._source[copy] = node
        graph.create("output", (tuple(copies[v] for v in self.region.outputs),))
        outputs = [OutputSpec(f"out{i}", OutputKind.USER_OUTPUT, f"out{i}") for i in range(len(self.region.outputs))]
        body = Program(graph, Signature(specs, outputs))
        body.fake_mode, body.attrs = program.fake_mode, program.attrs
        body.info = {"seq_dims": dims}
        return body

    def _find_varying(self) -> set[Node]:
        """The operations that differ from chunk to chunk."""
        found: set[Node] = set()
        for node in self._body.graph.nodes:
            if node.op.kind == "output" or node.is_op(*_JOINS):
                continue
            if node.is_op("autosp.shard") or any(v.producer in found for v in node.operands):
                found.add(node)
        return found

    def _check(self) -> None:
        joined: set[Node] = set()
        gathered: set[Node] = set()
        for node in self._body.graph.nodes:
            if node.op.kind == "output":
                continue
            if node.is_op(*_JOINS) or any(v.producer in joined for v in node.operands):
                joined.add(node)
            if node.is_op("autosp.all_gather") or any(v.producer in gathered for v in node.operands):
                gathered.add(node)
            if node in self._varying and node in joined:
                raise NotChunkable(f"%{node.name} reads a sum over all tokens")
            if node in gathered and node in self._source:
                raise NotChunkable(f"%{node.name} ({node.op.name}) needs all tokens at once")
        if not self._varying:
            raise NotChunkable("nothing in it can be cut along the tokens")
        self._joined = joined

    # -- all chunks --------------------------------------------------------------------------------------------------

    def write(self, rewriter: Rewriter) -> list[Value]:
        """Create the chunks at the rewriter's insertion point.

        Returns:
            What the region's outputs become, in their order.
        """
        whole: dict[Value, Value] = {}
        parts: dict[Value, Sequence[Value]] = {}
        nodes = [n for n in self._body.graph.nodes if n.op.kind not in ("placeholder", "output")]
        for inner, outer in self._inputs.items():
            whole[inner] = self._opened(outer, rewriter)
        for node in nodes:
            if node.is_op("autosp.shard"):
                source = self._whole_of(node.operands[0], whole, rewriter, nodes)
                cut = rewriter.create("autosp.chunk", (source, node.arg("dim"), self.chunks))
                parts[node.result] = rewriter.unpack(cut)
            elif node not in self._varying and node not in self._joined:
                self._whole_of(node.result, whole, rewriter, nodes)
        for index in range(self.chunks):
            self._write_chunk(index, nodes, whole, parts, rewriter)
        for node in nodes:
            if node in self._joined:
                whole[node.result] = self._join(node, whole, parts, rewriter)
        return self._outputs(whole)

    def write_loop(self, rewriter: Rewriter) -> list[Value]:
        """Create one operation that runs all chunks, at the rewriter's insertion point.

        Returns:
            What the region's outputs become, in their order.

        Raises:
            NotChunkable: Something that every chunk reads is no tensor.
        """
        nodes = [n for n in self._body.graph.nodes if n.op.kind not in ("placeholder", "output")]
        joins = [n for n in nodes if n.is_op(*_JOINS) and n.operands[0].producer in self._varying]
        body = loop_body(nodes, self._varying, joins)
        if isinstance(body, str):
            raise NotChunkable(body)
        whole = {inner: self._opened(outer, rewriter) for inner, outer in self._inputs.items()}
        for node in nodes:
            if node not in self._varying and node not in self._joined:
                self._whole_of(node.result, whole, rewriter, nodes)
        operands = [self._whole_of(v, whole, rewriter, nodes) for v in body.operands]
        loop = rewriter.create(
            "autosp.chunk_loop",
            (operands, body.text, self.chunks, list(body.cuts), list(body.joins), "eager"),
            origin_from=self.region.nodes[-1],
        )
        whole |= dict(zip((j.result for j in joins), rewriter.unpack(loop), strict=True))
        for node in nodes:
            if node in self._joined and node.result not in whole:
                whole[node.result] = self._copy(node, whole.__getitem__, rewriter)
        return self._outputs(whole)

    def _outputs(self, whole: Mapping[Value, Value]) -> list[Value]:
        return [whole[v] for v in self._body.graph.output_node.operands]

    def _write_chunk(
        self,
        index: int,
        nodes: Sequence[Node],
        whole: dict[Value, Value],
        parts: dict[Value, Sequence[Value]],
        rewriter: Rewriter,
    ) -> None:
        for node in nodes:
            if node not in self._varying or node.is_op("autosp.shard"):
                continue

            def mine(value: Value) -> Value:
                return parts[value][index] if value in parts else whole[value]

            made = self._copy(node, mine, rewriter)
            parts[node.result] = [*parts.get(node.result, ()), made]

    def _whole_of(self, value: Value, whole: dict[Value, Value], rewriter: Rewriter, nodes: Sequence[Node]) -> Value:
        """The value of an operation that is the same for every chunk; operands come first in program order."""
        if value not in whole:
            node = value.producer
            if node.is_op("autosp.invariant_to_replicate"):
                whole[value] = self._whole_of(node.operands[0], whole, rewriter, nodes)
            else:
                whole[value] = self._copy(node, lambda v: self._whole_of(v, whole, rewriter, nodes), rewriter)
        return whole[value]

    def _copy(self, node: Node, mapped: Any, rewriter: Rewriter) -> Value:
        return rewriter.create(
            node.op,
            map_values(node.args, mapped),
            map_values(dict(node.kwargs), mapped),
            name=node.name,
            origin_from=self._source.get(node, self.region.nodes[-1]),
        )

    def _join(
        self, node: Node, whole: dict[Value, Value], parts: dict[Value, Sequence[Value]], rewriter: Rewriter
    ) -> Value:
        if node.is_op("autosp.all_gather"):
            return rewriter.create("autosp.unchunk", (list(parts[node.operands[0]]), node.arg("dim")))
        if not node.is_op("autosp.all_reduce"):
            return self._copy(node, whole.__getitem__, rewriter)
        first, *others = parts[node.operands[0]]
        for other in others:
            first = rewriter.create("aten.add.Tensor", (first, other))
        return first

    def _opened(self, value: Value, rewriter: Rewriter) -> Value:
        """A value whose tokens lie in several blocks, with the blocks in a dimension of their own."""
        shard = self.region.inputs.get(value)
        if shard is None or shard.outer == 1:
            return value
        shape = list(opened_shape(value.tensor_type.shape, shard))
        return rewriter.create("aten.reshape", (value, shape), origin_from=self.region.nodes[0])


def opened_shape(shape: Sequence[Dim], shard: Shard) -> tuple[Dim, ...]:
    """The shape with the token blocks of a flattened dimension, such as the batch of [B*S, H], split off."""
    if shard.outer == 1:
        return tuple(shape)
    return (*shape[: shard.dim], shard.outer, shape[shard.dim] // shard.outer, *shape[shard.dim + 1 :])


def opened_dim(shard: Shard) -> int:
    """The token dimension of the opened shape."""
    return shard.dim if shard.outer == 1 else shard.dim + 1


__all__ = ["ChunkLoop", "NotChunkable"]
