"""`head-chunk`: attention in groups of heads, each with its own exchanges.

Heads do not see each other, so attention over a group of heads is a part of the whole. With groups, the exchanges of
one group can run while another group attends, and an exchanged sequence of all heads never exists at once. Grouped
queries stay with their key heads; where these are too few to cut, such as one for each rank, every group attends to
the same ones with a part of its queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, Literal, NamedTuple

from autosp_ir.analysis.cost import Device, Link, compute_seconds, cost_of, device, link
from autosp_ir.errors import PassError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._packed_exchange import exchange_together, packs

_HEADS, _TOKENS = 1, 2
_MOST_CHUNKS = 4
_OPERANDS = ("q", "k", "v")

# Attention on a GPU: rows of queries that one block takes, and blocks that run at once. What two H200 lost to each
# further group was the time of 0.7 waves of blocks. The backward takes about this many times the time of the forward.
_BLOCK, _BLOCKS_AT_ONCE, _IDLE, _BACKWARD = 128, 132, 0.7, 3.0


class HeadChunk(Pass):
    """Cut every resolved attention into groups of heads: `head-chunk{chunks=2}`.

    The exchanges around an attention are cut with it. An attention whose heads do not divide, whose bias differs by
    head, whose probabilities drop out, whose `lse` is read, or that `ulysses{fuse=qkv}` already gave one collective
    stays whole, with a remark: leave `fuse` out of `ulysses` and give it here.
    """

    name = "head-chunk"
    stage = "forward"
    requires = frozenset({"canonical"})
    provides = frozenset({"head-chunked"})
    conflicts = frozenset({"head-chunked"})

    class Options(Pass.Options):
        """Options of `head-chunk`."""

        chunks: int | Literal["auto", "overlap"] = "auto"
        """Groups of heads of each attention; `auto`: up to four, for memory; `overlap`: as many of these as take the
        least time, what exchanges expose and what smaller attentions lose counted."""
        fuse: Literal["none", "qkv"] = "none"
        """One collective for the queries, keys and values of a group (`qkv`), or three (`none`). Beside a product or an
        attention only one collective of a process group can run, and only if it began before it: of three, two wait."""
        device: str = "h100"
        """What computes, for `overlap`: h100, h200, a100 or cpu."""
        link: str = "nvlink4"
        """What connects the ranks, for `overlap`: nvlink4, nvlink3, pcie5, pcie or network-400g."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            PassError: `chunks` is smaller than one.
            UnsupportedError: The tables do not know the device or the link.
        """
        self._over, self._on = link(self.options.link), device(self.options.device)
        if isinstance(self.options.chunks, int) and self.options.chunks < 1:
            raise PassError(
                f"attention cannot run in {self.options.chunks} groups of heads",
                pass_name=self.name,
                hint="use a positive number, chunks=auto or chunks=overlap",
            )
        rewriter = ctx.rewriter(program)
        for node in list(program.graph.nodes):
            if node.is_op("autosp.attention"):
                self._visit(node, ctx, rewriter)
        rewriter.dead_code()

    def _visit(self, node: Node, ctx: PassContext, rewriter: Rewriter) -> None:
        site = _Site.of(node)
        reason = site.reason_against()
        chunks = self._chunks(site) if reason is None else 1
        if reason is None and chunks < 2:
            reason = f"its {site.query_heads} query and {site.key_heads} key heads cannot be cut as asked"
            if self.options.chunks == "overlap":
                reason = "more exchanges would cost more latency than they hide, or its heads cannot be cut"
        if reason is not None:
            ctx.remark("missed", node, f"attention stays whole: {reason}")
            return
        if not rewriter.allows(node):
            return
        with rewriter.rewrite("head groups"):
            _write(site, chunks, self.options.fuse == "qkv", rewriter)
        ctx.count("attentions")
        ctx.count("chunks", chunks)

    def _chunks(self, site: _Site) -> int:
        heads = site.query_heads // site.ranks
        fits = [n for n in range(1, heads + 1) if site.query_heads % (n * site.ranks) == 0 and site.parts(n)]
        if isinstance(self.options.chunks, int):
            return self.options.chunks if self.options.chunks in fits else 1
        few = [n for n in fits if n <= _MOST_CHUNKS]
        if self.options.chunks == "auto":
            return max(few, default=1)
        return min(few, key=lambda n: site.seconds(n, self._over, self._on), default=1)


class _Site(NamedTuple):
    """One attention and the exchanges around it.

    Attributes:
        node: The attention.
        entries: The all-to-alls that make q, k and v; None where nothing is exchanged.
        exit: The all-to-all that reads the output, likewise.
    """

    node: Node
    entries: tuple[Node, ...] | None
    exit: Node | None

    @classmethod
    def of(cls, node: Node) -> _Site:
        """Look around an attention."""
        producers = tuple(node.arg(name).producer for name in _OPERANDS)
        entries = producers if all(_to_heads(p) for p in producers) else None
        out = next((u for u in node.users if u.is_op("operator.getitem") and u.args[1] == 0), None)
        readers = list(out.users) if out is not None else []
        back = readers[0] if len(readers) == 1 and _to_tokens(readers[0]) else None
        return cls(node, entries, back)

    @property
    def ranks(self) -> int:
        """Ranks of the exchange."""
        return int(self.entries[0].arg("size")) if self.entries is not None else 1

    @property
    def sources(self) -> tuple[Value, Value, Value]:
        """Queries, keys and values in front of the exchange."""
        q, k, v = (e.operands[0] for e in self.entries) if self.entries else map(self.node.arg, _OPERANDS)
        return q, k, v

    @property
    def query_heads(self) -> int:
        """Query heads in front of the exchange."""
        return int(self.sources[0].tensor_type.shape[_HEADS])

    @property
    def key_heads(self) -> int:
        """Key heads in front of the exchange."""
        return int(self.sources[1].tensor_type.shape[_HEADS])

    def parts(self, chunks: int) -> tuple[int, int] | None:
        """Parts of the key heads, and of the queries of each, that make `chunks` groups; None if none do."""
        if self.key_heads % self.ranks or self.query_heads % self.key_heads:
            return None
        keys = gcd(chunks, self.key_heads // self.ranks)
        queries = chunks // keys
        return (keys, queries) if self.query_heads // self.key_heads % queries == 0 else None

    def seconds(self, chunks: int, over: Link, on: Device) -> float:
        """What a number of groups costs, forward and backward, as far as it depends on the number; 0 without exchanges.

        Communication in front of the first group's attention and behind the last one's; the latency of every exchange;
        and the end of every further group's attention, where its last blocks leave most of the device idle. Without a
        number for the length, a group costs nothing.
        """
        kind = self.sources[0].tensor_type
        if self.entries is None or not isinstance(kind.numel, int):
            return 0.0
        moved = sum(x.tensor_type.numel * x.tensor_type.dtype.itemsize for x in (*self.sources, self.sources[0]))
        sent = moved * (self.ranks - 1) / self.ranks
        batch, heads, tokens, _ = self.node.arg("q").tensor_type.shape
        wave = compute_seconds(cost_of(self.node), on) * _BLOCKS_AT_ONCE / max(1, batch * heads * tokens / _BLOCK)
        tail = _IDLE * (1 + _BACKWARD) * wave * (chunks - 1)
        return float(2 * (sent / chunks / over.bandwidth + chunks * over.latency) + tail)

    def reason_against(self) -> str | None:
        """Why it cannot be cut, None if it can."""
        if (self.entries is None) != (self.exit is None):
            return "only one side of it is exchanged on its own"
        if self.entries is None and any(p.producer.is_op("autosp.all_to_all") for p in self.sources):
            return "its operands are exchanged together"
        bias = self.node.arg("bias")
        if isinstance(bias, Value) and bias.tensor_type.ndim >= 3 and bias.tensor_type.shape[-3] != 1:
            return "its bias differs by head"
        if self.node.arg("keep") is not None:
            return "its dropout mask differs by head"
        if any(u.is_op("operator.getitem") and u.args[1] == 1 for u in self.node.users):
            return "the denominators of its softmax are read"
        return None


def _to_heads(node: Node) -> bool:
    return node.is_op("autosp.all_to_all") and (node.arg("split_dim"), node.arg("concat_dim")) == (_HEADS, _TOKENS)


def _to_tokens(node: Node) -> bool:
    return node.is_op("autosp.all_to_all") and (node.arg("split_dim"), node.arg("concat_dim")) == (_TOKENS, _HEADS)


def _write(site: _Site, chunks: int, fuse: bool, rewriter: Rewriter) -> None:
    """Cut the operands; exchange, attend and exchange back by group; join the groups."""
    node = site.node
    old = site.exit if site.exit is not None else _output(node)
    keys, queries = site.parts(chunks) or (chunks, 1)
    heads = site.key_heads // keys
    with rewriter.before(node):
        joined = []
        for q, k, v in zip(*(_pieces(x, _HEADS, keys, rewriter) for x in site.sources), strict=True):
            kv: list[Value] = []
            # [B, heads, queries of each, S, D]: every group takes some queries of each key head.
            opened = rewriter.create("aten.unflatten.int", (q, _HEADS, [heads, -1])) if queries > 1 else None
            groups = [q] if opened is None else _pieces(opened, _HEADS + 1, queries, rewriter)
            outs = []
            for group in groups:
                if opened is not None:
                    group = rewriter.create("aten.flatten.using_ints", (group, _HEADS, _HEADS + 1))
                # The first group brings the keys and values that the others of its key heads read as well.
                q, *given = _exchanged(site, (group,) if kv else (group, k, v), fuse, rewriter)
                kv = kv or given
                attended = rewriter.create(node.op, *_with_operands(node, (q, *kv)), origin_from=node)
                out = rewriter.create("operator.getitem", (attended, 0))
                out = out if site.exit is None else _like(site.exit, out, rewriter)
                if opened is not None:
                    out = rewriter.create("aten.unflatten.int", (out, _HEADS, [heads, -1]))
                outs.append(out)
            if opened is None:
                joined += outs
                continue
            whole = rewriter.create("autosp.unchunk", (outs, _HEADS + 1))
            joined.append(rewriter.create("aten.flatten.using_ints", (whole, _HEADS, _HEADS + 1)))
        result = joined[0] if len(joined) == 1 else rewriter.create("autosp.unchunk", (joined, _HEADS))
    rewriter.replace(old, result)


def _pieces(value: Value, dim: int, count: int, rewriter: Rewriter) -> list[Value]:
    if count == 1:
        return [value]
    return list(rewriter.unpack(rewriter.create("autosp.chunk", (value, dim, count))))


def _exchanged(site: _Site, values: Sequence[Value], fuse: bool, rewriter: Rewriter) -> list[Value]:
    """Queries, and keys and values if they are given, as the attention reads them."""
    if site.entries is None:
        return list(values)
    if not fuse or len(values) == 1 or not packs(values):
        return [_like(entry, value, rewriter) for entry, value in zip(site.entries, values, strict=False)]
    entry = site.entries[0]

    def create(name: str, *args: Any) -> Value:
        return rewriter.create(name, args, origin_from=entry)

    return exchange_together(values, entry.arg("axis"), site.ranks, create, rewriter)


def _output(node: Node) -> Node:
    return next(u for u in node.users if u.is_op("operator.getitem") and u.args[1] == 0)


def _like(exchange: Node, value: Value, rewriter: Rewriter) -> Value:
    """The same exchange of another value."""
    return rewriter.create(exchange.op, (value, *exchange.args[1:]), dict(exchange.kwargs), origin_from=exchange)


def _with_operands(node: Node, group: tuple[Value, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(node.kwargs)
    args = list(node.args)
    for position, (name, value) in enumerate(zip(_OPERANDS, group, strict=True)):
        if position < len(args):
            args[position] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs
