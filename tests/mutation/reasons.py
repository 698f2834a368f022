"""Why a mutant that no test notices is no hole, by mutant; "equivalent" where it computes the same."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "autosp_ir.comm.rules.attention._bias_gradient: answer: return placement": "equivalent: what is no shard here is whole",  # noqa: E501
    "autosp_ir.comm.rules.attention._bias_gradient: check removed: whole(here) and own >= 0 and (bias.tensor_type.shape[own] != 1)": "equivalent: the check of the masks refuses the same bias first",  # noqa: E501
    "autosp_ir.comm.rules.base.RuleContext.placement: placement: WHOLE": "equivalent: rules ask for tensors only",
    "autosp_ir.comm.rules.base.stored_placement: placement: WHOLE": "equivalent: rules ask for tensors and tuples only",
    "autosp_ir.comm.rules.base.RuleContext.operand: check removed: not isinstance(value, Value)": "equivalent: the operation's own schema refuses first",  # noqa: E501
    "autosp_ir.comm.rules.collectives._require_even: check removed: isinstance(extent, int) and extent % int(ctx.arg('size'))": "equivalent: the operator's shape function refuses first",  # noqa: E501
    "autosp_ir.comm.rules.collectives._shard: call removed: _require_even(ctx, dim)": "equivalent: the operator's shape function refuses first",  # noqa: E501
    "autosp_ir.comm.rules.collectives._reduce_scatter: call removed: _require_even(ctx, dim)": "equivalent: the operator's shape function refuses first",  # noqa: E501
    "autosp_ir.comm.rules.collectives._all_to_all: call removed: _require_even(ctx, split)": "equivalent: the operator's shape function refuses first",  # noqa: E501
    "autosp_ir.comm.rules.indexing._index: dimension: Shard(0)": "equivalent: a fallback that nothing reaches",
    "autosp_ir.comm.rules.indexing._index_put: comparison: target.dim > indexed[-1]": "equivalent: an indexed dimension was excluded before",  # noqa: E501
    "autosp_ir.comm.rules.parts._unbind: comparison: d > removed": "equivalent: the removed dimension was refused before",  # noqa: E501
    "autosp_ir.comm.rules.loss._class_dim: comparison: scores.tensor_type.ndim > 1": "equivalent: one-dimensional scores that are cut are refused either way",  # noqa: E501
    "autosp_ir.comm.rules.views._size: placement: WHOLE": "equivalent: a number has no layout",
    "autosp_ir.comm.rules.loss._nll_backward: check removed: not whole(flow)": "equivalent: the kernel refuses the shape first",  # noqa: E501
    "autosp_ir.comm.rules.views._kept_dimension: answer: return Shard(-1)": "equivalent: either is admissible nowhere",
    "autosp_ir.comm.inference._element: placement: WHOLE": "equivalent: an element without a layout is no tensor",
    "autosp_ir.comm.rules.loss._tokens: and/or: target.tensor_type.ndim == scores.tensor_type.ndim and target.tensor_type.dtype.is_floating_point": "equivalent: the kernel refuses a target that is only one of both",  # noqa: E501
    "autosp_ir.comm.rules.loss._nll_backward: comparison: tokens.dim > by_class": "equivalent: a cut of the classes was refused before",  # noqa: E501
    "autosp_ir.comm.rules.matmul.matmul_labels: comparison: columns > 1 #1": "equivalent: a label behind the others that no operand has",  # noqa: E501
    "autosp_ir.comm.rules.pointwise._only_in: check removed: not isinstance(ctx.placement(value), Partial)": "equivalent: the partial sum is then another operand, which the next check refuses",  # noqa: E501
    "autosp_ir.comm.rules.base._shown: plus/minus: '(' + ', '.join(('-' if p is None else str(p) for p in outcome)) + ')'": "equivalent: the text of an error alone",  # noqa: E501
    "autosp_ir.comm.rules.base._shown: plus/minus: '(' + ', '.join(('-' if p is None else str(p) for p in outcome))": "equivalent: the text of an error alone",  # noqa: E501
}
