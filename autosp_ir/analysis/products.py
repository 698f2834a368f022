"""Values that are matrix products, seen through transposes."""

from __future__ import annotations

from typing import NamedTuple

from autosp_ir.ir.graph import Node, Value


class Product(NamedTuple):
    """A matrix product, maybe transposed afterwards."""

    node: Node
    transposed: bool


def product_of(value: Value) -> Product | None:
    """The product that a value is, if nothing else reads it on the way."""
    transposed = False
    while len(value.users) == 1:
        node = value.producer
        if node.is_op("aten.mm"):
            return Product(node, transposed)
        if not node.is_op("aten.t") and not (node.is_op("aten.permute") and list(node.args[1]) == [1, 0]):
            return None
        transposed = not transposed
        value = node.operands[0]
    return None


__all__ = ["Product", "product_of"]
