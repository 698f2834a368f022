"""`ulysses`: resolve attention over token shards with all-to-alls that trade tokens for heads.

Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509. Each rank attends over the whole sequence with its own heads.
Keys and values travel unexpanded; where there are fewer of their heads than ranks they are replicated just enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from autosp_ir.comm.layout import whole
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.ir.types import INVARIANT, Shard, TensorType
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.random_masks import drawn_per_rank, own_part
from autosp_ir.rewrite.rewriter import Rewriter
from autosp_passes._packed_exchange import exchange_together, packs
from autosp_passes._token_walk import check_mesh_axis

_HEADS, _TOKENS = 1, 2
_ATTRIBUTES = ("causal", "window", "q_offset", "kv_offset", "scale", "softcap", "q_positions", "kv_positions")


class Ulysses(Pass):
    """Insert the all-to-alls of Ulysses sequence parallelism around every attention whose queries and keys are cut.

    q, k and v go from token shards to head shards, the output comes back. `fuse=qkv` sends q, k and v in one
    collective, `fuse=none` in three.
    """

    name = "ulysses"
    stage = "forward"
    requires = frozenset({"token-partitioned"})
    provides = frozenset({"attention-resolved"})
    conflicts = frozenset({"attention-resolved"})

    class Options(Pass.Options):
        """Options of `ulysses`."""

        fuse: Literal["none", "qkv"] = "none"
        """One collective for q, k and v (`qkv`), or three (`none`)."""
        axis: str | None = None
        """Mesh axis; None takes the one that token-partition used."""

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            UnsupportedError: The query heads are not divisible by the axis, or either keys or values are whole on
                every rank.
        """
        axis = self.options.axis or str(program.info.get("sp_axis", "sp"))
        size = check_mesh_axis(ctx, axis, self.name)
        rewriter = ctx.rewriter(program)
        placed: dict[tuple[Value, str], Value] = {}
        for node in program.find("autosp.attention"):
            if node.arg("q").tensor_type.layout[axis] != Shard(_TOKENS):
                continue
            if _keys_are_whole(node, axis):
                ctx.remark("applied", node, f"every rank has all keys: its queries of {axis} attend where they are")
                continue
            if not rewriter.allows(node):
                continue
            exchange = _Exchange(node, rewriter, axis, size, self.options.fuse == "qkv", placed)
            exchange.run()
            ctx.remark("applied", node, f"attention over {axis} by all-to-all, {size} ranks")
            if exchange.square is not None:
                ctx.remark("missed", exchange.square, _held(exchange.square.tensor_type))
            ctx.count("attentions", 1)
        rewriter.dead_code()


def _keys_are_whole(node: Node, axis: str) -> bool:
    """Whether every rank has all keys and values, of a learned memory or a short text, so that nothing need travel."""
    return all(whole(node.arg(name).tensor_type.layout[axis]) for name in ("k", "v"))


def _held(bias: TensorType) -> str:
    """What a bias over pairs of tokens costs."""
    size = bias.dtype.itemsize * math.prod(bias.shape)
    shape = ", ".join(map(str, bias.shape))
    return f"every rank holds a bias [{shape}] of {size} bytes, which grow with the square of the tokens"


class _Exchange:
    """The rewrite of one attention node.

    Attributes:
        square: The bias over pairs of tokens that every rank holds, after `run`.
    """

    def __init__(
        self,
        node: Node,
        rewriter: Rewriter,
        axis: str,
        size: int,
        fuse: bool,
        placed: dict[tuple[Value, str], Value],
    ) -> None:
        self.placed = placed
        self.square: Value | None = None
        self.node, self.rewriter, self.axis, self.size, self.fuse = node, rewriter, axis, size, fuse
        self.q, self.k, self.v = node.arg("q"), node.arg("k"), node.arg("v")

    def run(self) -> None:
        """Replace the node."""
        self._check_heads()
        with self.rewriter.before(self.node):
            q, k, v = self._exchanged()
            bias = self._bias()
            if bias is not None and bias.tensor_type.ndim > 1 and 1 not in bias.tensor_type.shape[-2:]:
                self.square = bias
            extra = {"bias": bias, "segment_ids": self.node.arg("segment_ids")}
            attributes = {n: self.node.arg(n) for n in _ATTRIBUTES}
            if self.node.arg("keep") is not None:
                attributes |= {"dropout": self.node.arg("dropout"), "keep": self._keep(self.node.arg("keep"))}
            pair = self._op("autosp.attention", q, k, v, **self._set(extra), **self._set(attributes))
            out = self._back(pair, 0)
            lse = self._back(pair, 1) if self._lse_is_read() else None
        for reader in list(self.node.users):
            self.rewriter.replace(reader, out if reader.args[1] == 0 else lse or out)
        self.rewriter.erase(self.node)

    def _check_heads(self) -> None:
        heads = self.q.tensor_type.shape[_HEADS]
        if heads % self.size:
            raise UnsupportedError(
                f"{heads} query heads cannot be spread over {self.size} ranks",
                node=self.node,
                hint=f"use a number of ranks that divides {heads}, or another attention strategy",
            )
        for name, value in (("keys", self.k), ("values", self.v)):
            if value.tensor_type.layout[self.axis] == Shard(_TOKENS):
                continue
            raise UnsupportedError(
                f"the {name} of this attention are not cut over {self.axis!r}, and what goes with them is: they are "
                "no tokens, or tokens whose number the ranks do not divide",
                node=self.node,
                hint="let both keys and values come from tokens, or neither; or pad their number to a multiple of the "
                "ranks",
            )

    def _op(self, name: str, *args: Any, **kwargs: Any) -> Value:
        return self.rewriter.create(name, args, kwargs, origin_from=self.node)

    def _set(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in arguments.items() if v is not None}

    def _exchanged(self) -> tuple[Value, Value, Value]:
        shared = self.k is self.v
        k = self._replicated_heads(self.k)
        v = k if shared else self._replicated_heads(self.v)
        if self.fuse and packs((self.q, k, v)):
            q, k, v = exchange_together((self.q, k, v), self.axis, self.size, self._op, self.rewriter)
            return q, k, v
        q = self._to_heads(self.q)
        k = self._to_heads(k)
        return q, k, k if shared else self._to_heads(v)

    def _to_heads(self, value: Value) -> Value:
        return self._op("autosp.all_to_all", value, _HEADS, _TOKENS, self.axis, self.size)

    def _back(self, pair: Value, index: int) -> Value:
        element = self._op("operator.getitem", pair, index)
        return self._op("autosp.all_to_all", element, _TOKENS, _HEADS, self.axis, self.size)

    def _lse_is_read(self) -> bool:
        return any(reader.args[1] == 1 for reader in self.node.users)

    def _replicated_heads(self, value: Value) -> Value:
        """Repeat key/value heads until the axis divides them: `lcm(heads, ranks)`, which divides the query heads."""
        heads = value.tensor_type.shape[_HEADS]
        repeat = self.size // math.gcd(heads, self.size)
        if repeat == 1:
            return value
        batch, _, _, width = value.tensor_type.shape
        opened = self._op("aten.unsqueeze", value, 2)
        spread = self._op("aten.expand", opened, [-1, -1, repeat, -1, -1])
        return self._op("aten.reshape", spread, [batch, heads * repeat, -1, width])

    def _bias(self) -> Value | None:
        """The bias that this rank's heads read: a bias with a head dimension follows its heads."""
        bias: Value | None = self.node.arg("bias")
        if bias is None:
            return None
        head_dim = bias.tensor_type.ndim - 3
        if head_dim < 0 or bias.tensor_type.shape[head_dim] == 1:
            return self._once(bias, "whole", self._for_all_heads)
        return self._once(bias, "heads", lambda value: self._of_own_heads(value, head_dim))

    def _keep(self, mask: Value) -> Value:
        """The dropout mask of this rank's heads: its own, or a slice of the dense model's."""
        if drawn_per_rank(mask) is None:
            return self._op("autosp.shard", mask, _HEADS, self.axis, self.size)
        batch, heads, *square = mask.producer.arg("shape")
        return own_part(self.rewriter, mask, [batch, heads // self.size, *square], _HEADS, self.axis, self.size)

    def _once(self, bias: Value, name: str, place: Callable[[Value], Value]) -> Value:
        """Attentions that share a bias share its exchange, which stands behind what makes the bias."""
        if (bias, name) not in self.placed:
            following = bias.producer.next
            while following is not None and following.op.kind == "placeholder":
                following = following.next
            with self.rewriter.before(following or self.node):
                self.placed[bias, name] = place(bias)
        return self.placed[bias, name]

    def _for_all_heads(self, bias: Value) -> Value:
        """The same for every head: ranks add up what their heads contribute to its gradient."""
        if not bias.tensor_type.dtype.is_floating_point or bias.tensor_type.layout[self.axis] != INVARIANT:
            return bias
        return self._op("autosp.invariant_to_replicate", bias, self.axis, self.size)

    def _of_own_heads(self, bias: Value, head_dim: int) -> Value:
        """Rows that were gathered for this attention trade places with heads instead."""
        gather = bias.producer
        rows = gather.is_op("autosp.all_gather") and gather.arg("axis") == self.axis and gather.arg("dim") != head_dim
        if rows:
            return self._op("autosp.all_to_all", gather.args[0], head_dim, gather.arg("dim"), self.axis, self.size)
        return self._op("autosp.shard", bias, head_dim, self.axis, self.size)
