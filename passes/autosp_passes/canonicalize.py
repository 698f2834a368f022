"""`canonicalize`: one spelling for what later passes look for.

Attention becomes `autosp.attention`, from SDPA in any call form and from separate products and softmax; keys and
values are read unexpanded; provable masks become attributes; losses of cut logits read shifted labels; dropout becomes
a state, a mask made from it, and a product. Every rewrite is exact. What cannot be rewritten exactly is left as it is,
with a remark.
"""

from __future__ import annotations

from typing import Literal

from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass, PassContext
from autosp_ir.rewrite.attention_masks import fold_attention_masks
from autosp_ir.rewrite.driver import apply_rules
from autosp_passes._canonicalize.dropout import order_draws, rewrite_dropouts
from autosp_passes._canonicalize.einsum import einsums
from autosp_passes._canonicalize.heads import fold_repeats
from autosp_passes._canonicalize.joins import written_slices
from autosp_passes._canonicalize.losses import rewrite_losses
from autosp_passes._canonicalize.matmul import rewrite_matmuls
from autosp_passes._canonicalize.products import folded_products
from autosp_passes._canonicalize.sdpa import rewrite_sdpa


class Canonicalize(Pass):
    """Bring attention, masks, losses and dropout into the one form that later passes expect."""

    name = "canonicalize"
    stage = "forward"
    provides = frozenset({"canonical"})
    conflicts = frozenset({"padded", "token-partitioned"})

    class Options(Pass.Options):
        """Options of `canonicalize`."""

        rng: Literal["per_rank", "global"] = "per_rank"
        """How dropout draws: each rank for its own tokens (`per_rank`), or the dense model's masks (`global`)."""

    options: Options

    def run(self, program: Program, ctx: PassContext) -> None:
        """Rewrite `program` in place."""
        rewriter = ctx.rewriter(program)
        rewriter.dead_code()
        rewrite_sdpa(program, rewriter, ctx)
        apply_rules([einsums, written_slices], program, ctx)
        rewrite_matmuls(program, rewriter, ctx)
        apply_rules([fold_repeats, folded_products], program, ctx)
        self._fold_masks(program, ctx)
        rewrite_losses(program, rewriter, ctx)
        rewrite_dropouts(program, rewriter, ctx, self.options.rng)
        rewriter.dead_code()
        order_draws(program, rewriter, self.options.rng)

    def _fold_masks(self, program: Program, ctx: PassContext) -> None:
        masks = fold_attention_masks(program, ctx.rewriter(program))
        ctx.count("masks-folded", len(masks.folded))
        for node in masks.kept:
            ctx.remark("missed", node, "the bias or mask is not provably causal or a window, so it stays an operand")
