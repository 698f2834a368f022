"""`pad-tokens`: any length on any number of ranks, by rows that change nothing.

The padding rows repeat the last token, so they stay finite wherever real tokens do. Nothing a user sees depends on
them: causal attention never looks ahead, other attention keeps them in a segment of their own, losses ignore them,
sums over tokens mask them, outputs are cut back, and an operation that mixes tokens in any other way reads the true
length.
"""

from __future__ import annotations

from pydantic import PositiveInt

from autosp_ir.ir.program import Program
from autosp_ir.ir.types import Dim
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_passes._means import split_means
from autosp_passes._pad_walk import PadWalk, padded_length
from autosp_passes._token_walk import check_mesh_axis, user_inputs


class PadTokens(Pass):
    """Pad the token axis to a multiple of a mesh axis, without changing any result."""

    name = "pad-tokens"
    stage = "forward"
    requires = frozenset({"canonical"})
    provides = frozenset({"padded"})
    conflicts = frozenset({"padded", "token-partitioned", "tiled"})

    class Options(Pass.Options):
        """Options of `pad-tokens`."""

        axis: str = "sp"
        """Mesh axis whose size the length becomes a multiple of."""
        multiple: PositiveInt = 1
        """What the tokens of one rank become a multiple of, so that `tile` can cut them."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place; a length that needs no padding is left alone.

        Raises:
            PassError: The mesh has no such axis.
        """
        size, multiple = check_mesh_axis(ctx, self.options.axis, self.name), self.options.multiple
        length = _length(program)
        if length is None or size * multiple == 1:
            return
        if isinstance(length, int) and length == padded_length(length, size, multiple):
            return
        split_means(program, ctx.rewriter(program))
        PadWalk(program, ctx, self.options.axis, size, multiple).run()
        ctx.count("padded", 1)


def _length(program: Program) -> Dim | None:
    for name, value in user_inputs(program).items():
        dim = program.info.get("seq_dims", {}).get(name)
        if dim is not None:
            return value.tensor_type.shape[dim]
    return None
