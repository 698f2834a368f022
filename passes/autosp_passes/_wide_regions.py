"""Regions of token-wise work whose insides are wider than the stream between the layers.

The width of a value is its elements per token. The stream is the width that most values have. A value is wide from
some multiple of it: the hidden layer of an MLP, the logits. A region is a connected set of operations that make or
read wide values; what it reads and what it hands on is narrow. Where tokens lie is read off the layouts of a
partitioned program, and off the token-axis analysis of any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from autosp_ir.analysis.chunked import chunk_values
from autosp_ir.analysis.token_axis import token_factors
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Dim, Shard, TensorType, TupleType

_NEVER = frozenset({Trait.COLLECTIVE, Trait.ATTENTION, Trait.RANDOM, Trait.MUTATES, Trait.READS_RANK, Trait.IDENTITY})


@dataclass(frozen=True)
class Region:
    """One region.

    Attributes:
        nodes: Its operations, in program order.
        inputs: Values from outside that run over tokens, by where the tokens lie.
        outputs: Values that are read outside.
        width: Elements per token of its widest value.
        tokens: Tokens of one rank in what it reads.
    """

    nodes: tuple[Node, ...]
    inputs: dict[Value, Shard]
    outputs: tuple[Value, ...]
    width: int
    tokens: int

    @property
    def outside(self) -> list[Value]:
        """Everything it reads, tokens or not."""
        return _outside(self.nodes, set(self.nodes))


class TokenMap:
    """Where the tokens of one rank lie in every value.

    Args:
        program: A forward program, partitioned along `axis` or not at all.
        axis: The sequence axis.
    """

    def __init__(self, program: Program, axis: str) -> None:
        self._axis = axis
        self._cut = program.mesh.get(axis, 1) > 1
        factors = None if self._cut else token_factors(program)
        self._factors = factors.factors if factors is not None else {}
        self.tokens: Dim | None = factors.length if factors is not None else self._local(program)

    def _local(self, program: Program) -> Dim | None:
        """Tokens of one rank: what an input is cut to."""
        for node in program.graph.nodes:
            numbers_ranks = any(u.is_op("autosp.keep_mask") for u in node.users)
            if node.is_op("autosp.shard") and node.arg("axis") == self._axis and not numbers_ranks:
                kind = node.result.tensor_type
                extent: Dim = kind.shape[node.arg("dim") % kind.ndim]
                return extent
        return None

    def of(self, value: Value) -> Shard | None:
        """The shard that its tokens are, None for a value without tokens or with two token axes."""
        if not isinstance(value.type, TensorType):
            return None
        if self._cut:
            here = value.type.layout.get(self._axis)
            return here if isinstance(here, Shard) and self._fits(value.type, here) else None
        found = self._factors.get(value, ())
        return found[0] if len(found) == 1 else None

    def _fits(self, kind: TensorType, shard: Shard) -> bool:
        return self.tokens is not None and bool(kind.shape[shard.dim] == shard.outer * self.tokens)

    def count(self, value: Value) -> int | None:
        """Tokens in a value; None without tokens or where a length is symbolic. Padded values hold more than inputs."""
        shard = self.of(value)
        if shard is None:
            return None
        extent, outer = value.tensor_type.shape[shard.dim], shard.outer
        return extent // outer if isinstance(extent, int) and isinstance(outer, int) else None

    def width(self, value: Value) -> int | None:
        """Elements per token; None without tokens or where a length is symbolic."""
        count, elements = self.count(value), value.tensor_type.numel if isinstance(value.type, TensorType) else None
        return elements // count if count and isinstance(elements, int) else None


def stream_width(tokens: TokenMap, program: Program) -> int | None:
    """The width that most floating values have, parts such as groups of heads not counted; of several, the smallest."""
    widths: Counter[int] = Counter()
    parts = chunk_values(program)
    for node in program.graph.nodes:
        for value in node.results:
            width = tokens.width(value) if value not in parts else None
            if width is not None and value.tensor_type.dtype.is_floating_point and value.tensor_type.ndim > 1:
                widths[width] += 1
    return max(widths, key=lambda w: (widths[w], -w)) if widths else None


def wide_regions(program: Program, tokens: TokenMap, least: float) -> tuple[list[Region], list[tuple[Node, str]]]:
    """Find the regions whose insides have more than `least` elements per token.

    Args:
        program: A forward program.
        tokens: Where its tokens lie.
        least: From where a value is wide, in elements per token.

    Returns:
        The regions in program order, and the first wide operation of each that is left out, with the reason.
    """
    finder = _Finder(program, tokens, least)
    return finder.regions, finder.missed


class _Finder:
    def __init__(self, program: Program, tokens: TokenMap, least: float) -> None:
        self.tokens = tokens
        self.least = least
        self.order = program.graph.index()
        self.regions: list[Region] = []
        self.missed: list[tuple[Node, str]] = []
        seen: set[Node] = set()
        for node in program.graph.nodes:
            if node not in seen and self._makes_wide(node) and self._may(node):
                members = self._grow(node)
                seen |= members
                self._keep(members)

    def _wide(self, value: Value) -> bool:
        kind = value.type
        if isinstance(kind, TupleType):
            return any(self._wide(u.result) for u in value.users if u.is_op("operator.getitem"))
        width = self.tokens.width(value)
        return width is not None and width > self.least

    def _makes_wide(self, node: Node) -> bool:
        return any(self._wide(v) for v in node.results)

    @staticmethod
    def _may(node: Node) -> bool:
        # A mask is drawn once for all chunks, and cut like other operands.
        whole = "attention" in node.op.name or node.is_op("autosp.keep_mask")
        return node.op.kind == "call_function" and not node.op.traits & _NEVER and not whole

    def _grow(self, seed: Node) -> set[Node]:
        """The operations connected to the seed by wide values."""
        found: set[Node] = set()
        stack = [seed]
        while stack:
            node = stack.pop()
            if node in found or not self._may(node):
                continue
            found.add(node)
            stack.extend(v.producer for v in node.operands if self._wide(v))
            stack.extend(u for v in node.results if self._wide(v) for u in v.users)
        return found

    def _keep(self, members: set[Node]) -> None:
        members |= self._elements(members)
        nodes = tuple(sorted(members, key=self.order.__getitem__))
        reason = self._reason_against(nodes, members)
        if reason is not None:
            self.missed.append((nodes[0], reason))
            return
        inputs = {v: s for v in _outside(nodes, members) if (s := self.tokens.of(v)) is not None}
        outputs = tuple(v for n in nodes for v in n.results if any(u not in members for u in v.users))
        width = max(w for n in nodes for v in n.results if (w := self.tokens.width(v)) is not None)
        counts = {self.tokens.count(v) for v in inputs}
        if len(counts) != 1 or None in counts:
            self.missed.append((nodes[0], f"what it reads differs in its number of tokens: {counts}"))
            return
        self.regions.append(Region(nodes, inputs, outputs, width, counts.pop() or 0))

    @staticmethod
    def _elements(members: Iterable[Node]) -> set[Node]:
        """What reads elements of a member's several results belongs to it."""
        return {
            u
            for n in members
            for v in n.results
            if isinstance(v.type, TupleType)
            for u in v.users
            if u.is_op("operator.getitem")
        }

    def _reason_against(self, nodes: tuple[Node, ...], members: set[Node]) -> str | None:
        for node in nodes:
            for value in node.results:
                leaves = any(u not in members for u in value.users)
                if leaves and (self._wide(value) or isinstance(value.type, TupleType)):
                    return f"%{value.name} is wide and is read outside"
        if not any(self.tokens.of(v) is not None for v in _outside(nodes, members)):
            return "it reads nothing that runs over tokens"
        return None if self._convex(nodes, members) else "what it hands on comes back to it"

    def _convex(self, nodes: tuple[Node, ...], members: set[Node]) -> bool:
        """Whether no path leaves the region and comes back."""
        last = self.order[nodes[-1]]
        stack = [u for n in nodes for v in n.results for u in v.users if u not in members]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or self.order[node] > last:
                continue
            if node in members:
                return False
            seen.add(node)
            stack.extend(u for v in node.results for u in v.users)
        return True


def _outside(nodes: Iterable[Node], members: set[Node]) -> list[Value]:
    return list(dict.fromkeys(v for n in nodes for v in n.operands if v.producer not in members))


__all__ = ["Region", "TokenMap", "stream_width", "wide_regions"]
