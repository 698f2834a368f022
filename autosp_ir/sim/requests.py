"""What a simulated rank asks of its group: one collective, described so that ranks can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autosp_ir.errors import SimulationError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.streams import mesh_axis
from autosp_ir.sim.collectives import COLLECTIVES

_SHORT_NAMES = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
_NOT_COMPARED = ("axis", "group_name")


@dataclass(frozen=True)
class Request:
    """One collective as one rank issues it.

    Args:
        node: The node that issues it.
        axis: The mesh axis.
        operand: The tensor this rank contributes.
        attributes: The operation's other arguments, by schema name.
    """

    node: Node
    axis: str
    operand: Tensor
    attributes: Mapping[str, Any]

    @property
    def op(self) -> str:
        """The short name, the same for an `autosp::` operator and for what it lowers to."""
        name = self.node.op.name.rpartition(".")[2]
        return _SHORT_NAMES.get(name, name)

    @property
    def starts(self) -> bool:
        """Whether the result must pass `wait_tensor` before it is read."""
        return self.node.op.name.startswith("_c10d_functional.")

    @property
    def identity(self) -> tuple[Any, ...]:
        """What must be equal on every rank of the group; a real run would hang or corrupt data otherwise."""
        compared = ((k, str(v)) for k, v in sorted(self.attributes.items()) if k not in _NOT_COMPARED)
        return (self.op, self.axis, tuple(compared), tuple(self.operand.shape), self.operand.dtype)

    @property
    def payload(self) -> int:
        """Bytes this rank hands to the collective."""
        return self.operand.numel() * self.operand.element_size()

    def evaluate(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The results of all ranks of the group, in order, from their contributions.

        Raises:
            SimulationError: The operands do not fit the collective.
        """
        try:
            return COLLECTIVES[self.node.op.name](list(operands), **self.attributes)
        except SimulationError as error:
            raise SimulationError(error.reason, node=self.node, hint=error.hint) from error

    def __str__(self) -> str:
        dtype = str(self.operand.dtype).removeprefix("torch.")
        attributes = "".join(f", {k}={v}" for k, v in self.attributes.items() if k not in (*_NOT_COMPARED, "size"))
        return f"{self.op}({dtype}{list(self.operand.shape)}{attributes}) over {self.axis!r} at %{self.node.name}"


def request_of(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Request:
    """Describe the collective that `node` issues with concrete arguments.

    Raises:
        SimulationError: The simulator does not know this collective.
    """
    schema = node.op.schema
    if schema is None or node.op.name not in COLLECTIVES:
        raise SimulationError(
            f"the simulator does not know the collective {node.op.name}",
            node=node,
            hint=f"use one of {sorted(COLLECTIVES)}",
        )
    named: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named.update(zip((a.name for a in schema.arguments), args, strict=False))
    named.update(kwargs)
    operand = named.pop(schema.arguments[0].name)
    return Request(node, mesh_axis(str(named.get("axis", named.get("group_name")))), operand, named)
