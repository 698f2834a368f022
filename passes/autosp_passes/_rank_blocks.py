"""A tensor as blocks of ranks `[ranks, …]`, the form in which torch's functional collectives exchange it."""

from __future__ import annotations

from collections.abc import Callable
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
        node: The operator being lowered: what is made inherits its phase and source line.
        rewriter: Where to create.
        value: The operand.
    """

    def __init__(self, node: Node, rewriter: Rewriter, value: Value) -> None:
        self._node = node
        self._rewriter = rewriter
        self._value = value

    def unsqueeze(self) -> RankBlocks:
        """[…] as one block [1, …]."""
        self._create("aten.unsqueeze", (self._value, 0), self._moved(lambda d: d + 1))
        return self

    def split(self, dim: int, size: int) -> RankBlocks:
        """[…, size * n, …] as [size, …, n, …]: one block for each rank."""
        self._refuse_cut(dim)
        sizes = self._sizes()
        split = [*sizes[:dim], size, self._share(dim, size), *sizes[dim + 1 :]]
        self._create("aten.view", (self._value, split), self._moved(lambda d: d if d < dim else d + 1))
        if dim:
            self._permute([dim, *(i for i in range(len(split)) if i != dim)])
        return self

    def lead(self, dim: int) -> RankBlocks:
        """[ranks, …, n, …] as [ranks, n, …]: dimension `dim` of the blocks is their outermost."""
        self._permute([0, dim, *(i for i in range(1, self._value.tensor_type.ndim) if i != dim)])
        return self

    def follow(self, dim: int) -> RankBlocks:
        """What `lead` did, undone."""
        self._permute([0, *range(2, dim + 1), 1, *range(dim + 1, self._value.tensor_type.ndim)])
        return self

    def contiguous(self) -> RankBlocks:
        """The blocks one behind the other in memory, which the collectives require."""
        self._create("aten.clone", (self._value,), self._layout, memory_format=torch.contiguous_format)
        return self

    def start(self, op: str, arguments: tuple[Any, ...], axis: str, after: Placement) -> None:
        """Start the collective; `after` is the placement along `axis` of what will arrive."""
        self._create(op, (self._value, *arguments), self._layout.with_axis(axis, after))

    def wait(self) -> None:
        """Wait for what was started; the insertion point may have moved on since."""
        self._create("_c10d_functional.wait_tensor", (self._value,), self._layout)

    def value(self) -> Value:
        """The tensor as it is."""
        return self._value

    def merge(self, dim: int) -> Value:
        """[ranks, …, n, …] as […, ranks * n, …]: blocks one behind the other along `dim`."""
        if dim:
            blocks = self._value.tensor_type.shape[0]
            self._permute([*range(1, dim + 1), 0, *range(dim + 1, self._value.tensor_type.ndim)])
            if blocks != 1:
                self.contiguous()
        return self._merged(dim)

    def merge_led(self, dim: int) -> Value:
        """[ranks, n, …] as […, ranks * n, …], where n led the blocks: nothing moves in memory."""
        self._merged(0)
        self._permute([*range(1, dim + 1), 0, *range(dim + 1, self._value.tensor_type.ndim)])
        return self._value

    def _merged(self, dim: int) -> Value:
        self._refuse_cut(dim + 1)
        sizes = self._sizes()
        ranks, share = sizes[dim : dim + 2]
        whole = ranks * share if isinstance(share, int) else -1
        merged = [*sizes[:dim], whole, *sizes[dim + 2 :]]
        self._create("aten.view", (self._value, merged), self._moved(lambda d: d if d <= dim else d - 1))
        return self._value

    @property
    def _layout(self) -> Layout:
        return self._value.tensor_type.layout

    def _create(self, op: str, args: tuple[Any, ...], layout: Layout, **kwargs: Any) -> None:
        self._value = self._rewriter.create(op, args, kwargs, layout=layout, origin_from=self._node)

    def _permute(self, order: list[int]) -> None:
        self._create("aten.permute", (self._value, order), self._moved(order.index))

    def _moved(self, to: Callable[[int], int]) -> Layout:
        """The layout with the shard of each dimension d at dimension `to(d)`."""
        placements = self._layout.items()
        return Layout({a: Shard(to(p.dim), p.outer) if isinstance(p, Shard) else p for a, p in placements})

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
            extent
            if isinstance(extent, int)
            else self._rewriter.create("aten.sym_size.int", (self._value, dim), origin_from=self._node)
            for dim, extent in enumerate(self._value.tensor_type.shape)
        ]
