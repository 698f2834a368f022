"""Turning the masks of `autosp.attention` into attributes, where that is proved."""

from __future__ import annotations

from dataclasses import dataclass, field

from autosp_ir.analysis.index_values import index_values, used_facts
from autosp_ir.analysis.masks import MaskForm, form_of, split_mask
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.rewriter import Rewriter


@dataclass
class FoldedMasks:
    """What became of the masks.

    Attributes:
        folded: Attention nodes whose mask became attributes, with what it said; a bias beside it stays an operand.
        kept: Attention nodes whose mask stays an operand.
    """

    folded: dict[Node, MaskForm] = field(default_factory=dict)
    kept: list[Node] = field(default_factory=list)


def fold_attention_masks(program: Program, rewriter: Rewriter) -> FoldedMasks:
    """Replace provable masks of every `autosp.attention` by `causal` and `window`; a bias behind one stays an operand.

    The proof may rest on facts about the example batch; these move to `program.info["batch_facts"]`, which every
    later batch must satisfy.

    Args:
        program: A forward-stage program for one device; rewritten in place.
        rewriter: Of `program`.

    Returns:
        Which masks were folded and which were kept. The folded masks' computation is left to dead-code removal.
    """
    result = FoldedMasks()
    masked = [n for n in program.find("autosp.attention") if isinstance(n.arg("bias"), Value)]
    if not masked:
        return result
    values = index_values(program)
    rests_on: list[Value] = []
    for node in masked:
        split = split_mask(values, node.arg("bias"))
        form = None if split is None else _combined(form_of(split[0]), node)
        if form is None or split is None:
            result.kept.append(node)
            continue
        if not rewriter.allows(node, "masks-folded"):
            continue
        rests_on.append(node.arg("bias"))
        with rewriter.rewrite():
            rewriter.set_arg(node, "causal", form.causal)
            rewriter.set_arg(node, "window", form.window)
            rewriter.set_arg(node, "bias", split[1])
        result.folded[node] = form
    program.info["batch_facts"] = {**program.info.get("batch_facts", {}), **used_facts(values, rests_on)}
    return result


def _combined(form: MaskForm | None, node: Node) -> MaskForm | None:
    """The mask together with the attributes the node has already; None when they do not make one form."""
    if form is None or node.arg("q_offset") != 0 or node.arg("kv_offset") != 0:
        return None
    causal, window = bool(node.arg("causal")), node.arg("window")
    if window is not None and not (isinstance(window, int) and form.causal == causal):
        return None
    if causal and not form.causal and form.window is not None:
        return MaskForm(True, form.window)
    reach = [w for w in (window, form.window) if w is not None]
    return MaskForm(causal or form.causal, min(reach, default=None))


__all__ = ["FoldedMasks", "fold_attention_masks"]
