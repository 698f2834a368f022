"""Why a mutant that no test notices is no hole, by mutant; "equivalent" where it computes the same."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "autosp_ir.comm.rules.attention._bias_gradient: answer: return placement": "equivalent: what is no shard here is whole",  # noqa: E501
    "autosp_ir.comm.rules.base.RuleContext.placement: placement: WHOLE": "equivalent: rules ask for tensors only",
    "autosp_ir.comm.rules.base.stored_placement: placement: WHOLE": "equivalent: rules ask for tensors and tuples only",
    "autosp_ir.comm.rules.base.RuleContext.operand: check removed: not isinstance(value, Value)": "equivalent: the operation's own schema refuses first",  # noqa: E501
    "autosp_ir.comm.rules.indexing._index: dimension: Shard(0)": "equivalent: a fallback that nothing reaches",
    "autosp_ir.comm.rules.indexing._index_put: comparison: target.dim > indexed[-1]": "equivalent: an indexed dimension was excluded before",  # noqa: E501
    "autosp_ir.comm.rules.parts._unbind: comparison: d > removed": "equivalent: the removed dimension was refused before",  # noqa: E501
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
    "autosp_ir.comm.rules.base._shown: comparison: p is None": "equivalent: the text of an error alone",
    "autosp_ir.comm.rules.indexing._one_hot: comparison: int(ctx.arg('num_classes')) < 0": "equivalent: the kernel refuses to make no classes",  # noqa: E501
    "autosp_ir.comm.rules.indexing._index_shard: comparison: source.dim < indexed[0]": "equivalent: an indexed dimension was refused before",  # noqa: E501
    "autosp_ir.comm.rules.loss._tokens: comparison: logits.dim > by_class": "equivalent: a cut of the classes was refused before",  # noqa: E501
    "autosp_ir.comm.rules.loss._reduced: comparison: tokens.dim < by_class": "equivalent: a cut of the classes was refused before",  # noqa: E501
    "autosp_ir.comm.rules.matmul.matmul_labels: comparison: columns > 1": "equivalent: a label behind the others, for a dimension that the operand has not",  # noqa: E501
    "autosp_ir.comm.rules.parts._join: any/all: any((v.tensor_type.shape[moved.dim] == value.tensor_type.shape[moved.dim] for v, p in zip(values, pl": "equivalent: the kernel joins only what is equally long off the joined dimension",  # noqa: E501
    "autosp_ir.comm.rules.parts._join: comparison: p == moved": "equivalent: the kernel joins only what is equally long off the joined dimension",  # noqa: E501
    "autosp_ir.comm.rules.pointwise._partial: and/or: gradient is not None and 'backward' in name": "equivalent: of the elementwise operations those with a gradient operand are those called backward",  # noqa: E501
    "autosp_ir.comm.rules.reductions.kept: comparison: r < placement.dim": "equivalent: a cut dimension that is reduced was answered before, by both callers",  # noqa: E501
    "autosp_ir.comm.rules.views._flatten: comparison: placement.dim < first": "equivalent: the first merged dimension keeps its place and outer factor either way",  # noqa: E501
    "autosp_ir.comm.rules.views._squeeze: comparison: r < d": "equivalent: a removed dimension was refused before",
    "autosp_ir.comm.rules.views._select: comparison: d > removed": "equivalent: the removed dimension was refused before",  # noqa: E501
    "autosp_ir.comm.inference._strict: any/all: all((isinstance(p, Invariant) for p in flat(ctx.stored(value))))": "equivalent: only reads of elements take a tuple, and they were placed before",  # noqa: E501
    "autosp_ir.comm.inference._Hints.of: any/all: any((not whole(p) for p in flat(stored)))": "equivalent: differs for tuples only, and rules follow hints for single tensors only",  # noqa: E501
    "autosp_ir.ir.verify.check_signature: comparison: s.kind is InputKind.TANGENT": "equivalent: turned around it forms the same two groups",  # noqa: E501
    "autosp_ir.comm.inference._check_numbers: any/all: all((isinstance(p, Shard) for p in placements))": "equivalent: no operation of several results takes sizes, so the next check refuses the same",  # noqa: E501
}
