"""`aten._grouped_mm`, the product of a mixture of experts, in every dtype: torch's kernel takes bfloat16 alone.

Comparisons with the dense model run in float64, so types are inferred and values computed here for what torch rejects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import extend_op, op_by_name
from autosp_ir.ir.types import Dim, TensorType

_NAME = "aten._grouped_mm"
_OWN_DTYPE = torch.bfloat16


def grouped_product(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One matrix product per group.

    Args:
        left: `[groups, M, K]`, or `[M, K]` with its rows in groups, or its columns where `right` has two dimensions.
        right: `[groups, K, N]`, or `[K, N]` with its columns in groups, or its rows where `left` has two dimensions.
        offs: Where each group ends, int32 `[groups]`; None when both have a dimension of groups.
        bias: Not supported, as by torch.
        out_dtype: Of the result; that of `left` when None.

    Returns:
        `[M, N]` when one operand holds its groups in a row, else `[groups, M, N]`. What lies behind the last group
        is 0.

    Raises:
        UnsupportedError: There is a bias.
    """
    if bias is not None:
        raise UnsupportedError(f"{_NAME} has a bias", hint="add the bias to the result, which is what torch supports")
    if left.dtype == _OWN_DTYPE:
        result: Tensor = torch.ops.aten._grouped_mm(left, right, offs, None, out_dtype)
        return result
    if offs is None:
        return (left @ right).to(out_dtype or left.dtype)
    parts = _parts(left, right, offs)
    if left.ndim == right.ndim:
        return torch.stack([a @ b for a, b in parts]).to(out_dtype or left.dtype)
    rows_in_groups = left.ndim == 2
    whole = left.new_zeros(left.shape[-2], right.shape[-1], dtype=out_dtype or left.dtype)
    joined = torch.cat([a @ b for a, b in parts], 0 if rows_in_groups else 1)
    whole[: joined.shape[0], : joined.shape[1]] = joined
    return whole


def _parts(left: Tensor, right: Tensor, offs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The operands of each group's product."""
    ends = [int(end) for end in offs]
    parts = []
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if left.ndim == right.ndim:
            parts.append((left[:, start:end], right[start:end]))
        elif left.ndim == 2:
            parts.append((left[start:end], right[group]))
        else:
            parts.append((left[group], right[:, start:end]))
    return parts


def _infer(node: Node) -> TensorType:
    left, right, offs = node.operands[0].tensor_type, node.operands[1].tensor_type, node.arg("offs")
    matrix: tuple[Dim, ...] = (left.shape[-2], right.shape[-1])
    shape = matrix
    if left.ndim == 3 and right.ndim == 3:
        shape = (left.shape[0], *matrix)
    elif left.ndim == 2 and right.ndim == 2 and isinstance(offs, Value):
        shape = (offs.tensor_type.shape[0], *matrix)
    return TensorType(shape, node.arg("out_dtype") or left.dtype, left.device)


extend_op(op_by_name(_NAME).target, infer=_infer, evaluate=grouped_product)

__all__ = ["grouped_product"]
