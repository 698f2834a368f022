"""A tensor as blocks of ranks `[ranks, …]`, the form in which torch's functional collectives exchange it."""

from __future__ import annotations

from typing import Any

import torch

from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.types import Layout, Placement, Shard
from autosp_ir.rewrite.rewriter import Rewriter


class RankBlocks:
    """Builds one collective around its blocks, at the rewriter's insertion point.

    Layouts of all mesh axes are carried along: a leading dimension of blocks moves every shard one dimension on.

    Args:
        node: The operator being lowered, for messages.
        rewriter: Where to create.
        value: The operand.
    """

    def __init__(self, node: Node, rewriter: Rewriter, value: Value) -> None:
        self._node = node
        self._rewriter = rewriter
        self._value = value

    def unsqueeze(self) -> RankBlocks:
        """[…] as one block [1, …]."""
        self._create("aten.unsqueeze", (self._value, 0), self._shifted(0, 1))
        return self

    def squeeze(self) -> Value:
        """The only block [1, …] as […]."""
        self._create("aten.squeeze.dim", (self._value, 0), self._shifted(0, -1))
        return self._value

    def split(self, dim: int, size: int) -> RankBlocks:
        """[…, size * n, …] as [size, …, n, …]: one block for each rank."""
        self._refuse_cut(dim)
        sizes = self._sizes()
        split = [*sizes[:dim], size, self._share(dim, size), *sizes[dim + 1 :]]
        self._create("aten.view", (self._value, split), self._shifted(dim + 1, 1))
        if dim:
            order = [dim, *(i for i in range(len(split)) if i != dim)]
            # Dimensions in front of the split one move behind the blocks; the others stay where they are.
            self._create("aten.permute", (self._value, order), self._shifted(0, 1, below=dim))
        return self

    def contiguous(self) -> RankBlocks:
        """The blocks one behind the other in memory, which the collectives require."""
        self._create("aten.clone", (self._value,), self._layout, memory_format=torch.contiguous_format)
        return self

    def sharded(self, dim: int) -> Shard:
        """The placement of blocks whose dimension `dim` is cut, counted without the dimension of blocks."""
        return Shard(dim + 1)

    def exchange(self, op: str, arguments: tuple[Any, ...], axis: str, after: Placement) -> None:
        """Start the collective and wait for it; `after` is the placement along `axis` of what arrives."""
        layout = self._layout.with_axis(axis, after)
        self._create(op, (self._value, *arguments), layout)
        self._create("_c10d_functional.wait_tensor", (self._value,), layout)

    def merge(self, dim: int) -> Value:
        """[ranks, …, n, …] as […, ranks * n, …]: blocks one behind the other along `dim`."""
        if dim:
            order = [*range(1, dim + 1), 0, *range(dim + 1, self._value.tensor_type.ndim)]
            self._create("aten.permute", (self._value, order), self._shifted(1, -1, below=dim + 1))
            self._create("aten.clone", (self._value,), self._layout, memory_format=torch.contiguous_format)
        self._refuse_cut(dim + 1)
        sizes = self._sizes()
        ranks, share = sizes[dim : dim + 2]
        whole = ranks * share if isinstance(share, int) else -1
        merged = [*sizes[:dim], whole, *sizes[dim + 2 :]]
        self._create("aten.view", (self._value, merged), self._shifted(dim + 1, -1))
        return self._value

    @property
    def _layout(self) -> Layout:
        return self._value.tensor_type.layout

    def _create(self, op: str, args: tuple[Any, ...], layout: Layout, **kwargs: Any) -> None:
        self._value = self._rewriter.create(op, args, kwargs, layout=layout)

    def _shifted(self, first: int, by: int, below: int | None = None) -> Layout:
        """The layout with shards of dimensions `first`, …, `below` - 1 moved by `by`."""

        def moved(placement: Placement) -> Placement:
            if not isinstance(placement, Shard) or placement.dim < first:
                return placement
            if below is not None and placement.dim >= below:
                return placement
            return Shard(placement.dim + by, placement.outer)

        return Layout({axis: moved(placement) for axis, placement in self._layout.items()})

    def _refuse_cut(self, dim: int) -> None:
        """A dimension that is split or merged must not be cut itself."""
        for axis, placement in self._layout.items():
            if isinstance(placement, Shard) and placement.dim == dim:
                raise UnsupportedError(
                    f"{self._node.op.name} moves dimension {dim}, which is cut along axis {axis!r} already",
                    node=self._node,
                    hint="cut different dimensions along different mesh axes",
                )

    def _share(self, dim: int, size: int) -> Any:
        extent = self._value.tensor_type.shape[dim]
        return extent // size if isinstance(extent, int) else -1

    def _sizes(self) -> list[Any]:
        """The extents as view arguments: numbers, or sizes read at run time."""
        return [
            extent if isinstance(extent, int) else self._rewriter.create("aten.sym_size.int", (self._value, dim))
            for dim, extent in enumerate(self._value.tensor_type.shape)
        ]
