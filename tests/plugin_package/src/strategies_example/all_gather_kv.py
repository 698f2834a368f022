"""`all-gather-kv`: every rank attends with its own queries to the keys and values of all ranks."""

import autosp_ir as air

_TOKENS = 2


class AllGatherKV(air.Pass):
    """Gather keys and values over the ranks; queries stay where they are.

    Any number of heads fits. The gather's backward is a reduce-scatter, so each rank is left with the gradients of its
    own keys and values.
    """

    name = "all-gather-kv"
    stage = "forward"
    requires = frozenset({"token-partitioned"})
    provides = frozenset({"attention-resolved"})
    conflicts = frozenset({"attention-resolved"})

    class Options(air.Pass.Options):
        """Options of `all-gather-kv`."""

        axis: str | None = None
        """Mesh axis; None takes the one that token-partition used."""

    def run(self, program: air.Program, ctx: air.PassContext) -> None:
        """Rewrite `program` in place."""
        axis, size = ctx.sequence_axis(self.options.axis)
        rewriter = ctx.rewriter(program)
        for node in air.unresolved_attention(program, axis):
            arguments = air.attention_arguments(node)
            with rewriter.before(node):
                q, gathered = node.arg("q"), {}
                for value in dict.fromkeys((node.arg("k"), node.arg("v"))):
                    gathered[value] = rewriter.create("autosp.all_gather", (value, _TOKENS, axis, size, "replicate"))
                k, v = gathered[node.arg("k")], gathered[node.arg("v")]
                length = k.tensor_type.shape[_TOKENS]
                if not isinstance(length, int):
                    length = rewriter.create("aten.sym_size.int", (k, _TOKENS))
                arguments["q_positions"] = air.token_positions(rewriter, length, axis, size)
                bias = node.arg("bias")
                if bias is not None and bias.tensor_type.ndim > 1 and bias.tensor_type.shape[-2] != 1:
                    bias = rewriter.create("autosp.shard", (bias, bias.tensor_type.ndim - 2, axis, size))
                elif bias is not None and bias.tensor_type.dtype.is_floating_point:
                    bias = rewriter.create("autosp.invariant_to_replicate", (bias, axis, size))
                both = rewriter.create("autosp.attention", (q, k, v, bias), arguments)
                out, lse = (rewriter.create("operator.getitem", (both, index)) for index in (0, 1))
            air.replace_attention(rewriter, node, out, lse)
            ctx.remark("applied", out, f"keys and values gathered over {axis}, {size} ranks")
            ctx.count("attentions")
        rewriter.dead_code()
