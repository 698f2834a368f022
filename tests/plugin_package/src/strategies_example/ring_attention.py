"""`ring-attention`: keys and values travel from rank to rank, and every rank merges what it finds in them.

Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889. At step s rank r holds the keys and values
of rank r - s. Partial results (out, lse) over different keys are merged exactly: with L the log of the sum of both
denominators, out = exp(lse_a - L) out_a + exp(lse_b - L) out_b. A block that lies in the future of all queries has
lse = -inf, hence weight zero.
"""

from __future__ import annotations

from typing import Any

import autosp_ir as air

_TOKENS = 2


class RingAttention(air.Pass):
    """Send keys and values around the ring; merge the partial results of each step by `lse`.

    No rank ever holds more than one other rank's keys and values, and any number of heads fits.
    """

    name = "ring-attention"
    stage = "forward"
    requires = frozenset({"token-partitioned"})
    provides = frozenset({"attention-resolved"})
    conflicts = frozenset({"attention-resolved"})

    class Options(air.Pass.Options):
        """Options of `ring-attention`."""

        axis: str | None = None
        """Mesh axis; None takes the one that token-partition used."""

    def run(self, program: air.Program, ctx: air.PassContext) -> None:
        """Rewrite `program` in place.

        Raises:
            UnsupportedError: An attention has a bias, or a length that is not a number.
        """
        axis, size = ctx.sequence_axis(self.options.axis)
        rewriter = ctx.rewriter(program)
        for node in air.unresolved_attention(program, axis):
            _refuse_bias(node)
            with rewriter.before(node):
                out, lse = _Ring(node, rewriter, axis, size).run()
            air.replace_attention(rewriter, node, out, lse)
            ctx.remark("applied", out, f"keys and values go around {axis}, {size} ranks")
            ctx.count("attentions")
        rewriter.dead_code()


def _refuse_bias(node: air.Node) -> None:
    if node.arg("bias") is not None:
        raise air.UnsupportedError(
            f"%{node.name} has a bias over all keys, of which a rank of the ring holds some at a time",
            node=node,
            hint="use all-gather-kv or ulysses, or express the mask by causal, window and segment_ids",
        )


class _Ring:
    """The rewrite of one attention node."""

    def __init__(self, node: air.Node, rewriter: air.Rewriter, axis: str, size: int) -> None:
        self.node, self.rewriter, self.axis, self.size = node, rewriter, axis, size
        self.next_rank = [(rank + 1) % size for rank in range(size)]
        self.arguments = air.attention_arguments(node) | {"local_axis": axis}
        self.dtype = node.arg("q").tensor_type.dtype

    def run(self) -> tuple[air.Value, air.Value]:
        """The merged out and lse."""
        k, v = self.node.arg("k"), self.node.arg("v")
        out, lse = self._partial(k, v, 0)
        out = self._cast(out, lse.tensor_type.dtype)
        for step in range(1, self.size):
            k, v = self._sent(k), self._sent(v) if v is not k else None
            v = k if v is None else v
            out, lse = self._merged((out, lse), self._partial(k, v, step))
        return self._cast(out, self.dtype), lse

    def _op(self, name: str, *args: Any, **kwargs: Any) -> air.Value:
        return self.rewriter.create(name, args, kwargs, origin_from=self.node)

    def _sent(self, value: air.Value) -> air.Value:
        return self._op("autosp.permute", value, self.next_rank, self.axis, self.size)

    def _cast(self, value: air.Value, dtype: Any) -> air.Value:
        """Half precision is merged in the precision of lse."""
        return value if value.tensor_type.dtype == dtype else self._op("aten.to.dtype", value, dtype)

    def _partial(self, k: air.Value, v: air.Value, step: int) -> tuple[air.Value, air.Value]:
        """Attention to the keys that a rank holds at this step."""
        q = self.node.arg("q")
        positions = {"q_positions": self._positions(q, 0), "kv_positions": self._positions(k, step)}
        both = self._op("autosp.attention", q, k, v, **self.arguments, **positions)
        return self._op("operator.getitem", both, 0), self._op("operator.getitem", both, 1)

    def _positions(self, tokens: air.Value, shift: int) -> air.Value:
        length = tokens.tensor_type.shape[_TOKENS]
        if not isinstance(length, int):
            raise air.UnsupportedError(
                f"the ring needs a length that is a number, not {length}",
                node=self.node,
                hint="capture with dynamic=False, or use all-gather-kv",
            )
        return air.token_positions(
            self.rewriter, length * self.size, self.axis, self.size, shift=shift, origin_from=self.node
        )

    def _merged(
        self, first: tuple[air.Value, air.Value], second: tuple[air.Value, air.Value]
    ) -> tuple[air.Value, air.Value]:
        lse = self._op("aten.logaddexp", first[1], second[1])
        parts = []
        for out, own in (first, second):
            weight = self._op("aten.exp", self._op("aten.sub.Tensor", own, lse))
            parts.append(self._op("aten.mul.Tensor", self._op("aten.unsqueeze", weight, -1), out))
        return self._op("aten.add.Tensor", *parts), lse
