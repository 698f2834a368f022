"""Chunks of what one rank holds: `torch.ops.autosp.chunk` and its inverse `torch.ops.autosp.unchunk`.

Both are local: every rank cuts its own part of a value, whatever that part is, so a shard along the chunked dimension
stays one. Over the ranks the tokens of a chunk are therefore not contiguous: chunk c holds the c-th piece of every
rank's tokens. Only work that does not care about the order of tokens may run between the two, which is what `tile`
puts there. The backward of one is the other, so gradients of chunks meet in one concatenation instead of a sum of
padded tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autosp_ir.errors import LayoutError
from autosp_ir.ir.ops import Trait, extend_op

SCHEMAS = (
    "chunk(Tensor x, int dim, int chunks) -> Tensor[]",
    "unchunk(Tensor[] parts, int dim) -> Tensor",
)

LIBRARY = torch.library.Library("autosp", "FRAGMENT")
for _schema in SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def views(x: Tensor, dim: int, chunks: int) -> tuple[Tensor, ...]:
    """The chunks as views of `x`.

    Args:
        x: Any tensor.
        dim: The dimension to cut.
        chunks: How many equal parts.

    Raises:
        LayoutError: The dimension does not exist, or is not divided by `chunks`.
    """
    if not -x.ndim <= dim < x.ndim:
        raise LayoutError(
            f"dimension {dim} is out of range for a tensor of {x.ndim} dimension(s)", hint="name a dimension it has"
        )
    extent = x.shape[dim]
    if chunks < 1 or (isinstance(extent, int) and extent % chunks):
        raise LayoutError(
            f"dimension {dim} of length {extent} cannot be cut into {chunks} equal chunks",
            hint="use a number of chunks that divides the length on one rank",
        )
    parts: tuple[Tensor, ...] = x.split(extent // chunks, dim)
    return parts


def _chunk(x: Tensor, dim: int, chunks: int) -> list[Tensor]:
    # A custom operator may not return its input. Emission replaces it by aten.chunk, which makes views.
    return [part.clone(memory_format=torch.contiguous_format) for part in views(x, dim, chunks)]


def _unchunk(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim)


def _keep_dimension(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dim = inputs[1]
    ctx.count = len(inputs[0]) if isinstance(inputs[0], list | tuple) else None


def _chunk_grad(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, None, None]:
    return torch.ops.autosp.unchunk(grads, ctx.dim), None, None


def _unchunk_grad(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    return torch.ops.autosp.chunk(grad, ctx.dim, ctx.count), None


torch.library.register_fake("autosp::chunk", _chunk, lib=LIBRARY)
torch.library.register_fake("autosp::unchunk", _unchunk, lib=LIBRARY)
LIBRARY.impl("chunk", _chunk, "CompositeExplicitAutograd")
LIBRARY.impl("unchunk", _unchunk, "CompositeExplicitAutograd")
torch.library.register_autograd("autosp::chunk", _chunk_grad, setup_context=_keep_dimension, lib=LIBRARY)
torch.library.register_autograd("autosp::unchunk", _unchunk_grad, setup_context=_keep_dimension, lib=LIBRARY)
extend_op(torch.ops.autosp.chunk.default, traits=frozenset({Trait.PURE, Trait.VIEW}), evaluate=views)
