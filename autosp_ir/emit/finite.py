"""Which rank made a value that is not finite, and where: a reduced loss is NaN on every rank and tells neither.

Looked for on request, and only when an output or gradient is found not to be finite: then the step is run once more,
operation by operation, and each rank looks for the first value of its own making that is not finite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autosp_ir.comm.host_memory import RELOAD, on_host, starts_copy
from autosp_ir.emit.fx_export import executable
from autosp_ir.emit.team import Team
from autosp_ir.errors import NonFiniteError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, Program

Bad = Callable[[Tensor], Tensor]
"""From a floating tensor to a mask of the elements that are looked for."""

Named = Sequence[tuple[str, Any]]


class FiniteCheck:
    """Checks what a program gives.

    Args:
        team: The ranks that run it; all of them check, whether they find something or not.
    """

    def __init__(self, team: Team) -> None:
        self._team = team

    def check(self, part: str, named: Named, search: Callable[[Bad], str | None]) -> None:
        """Check the results of a part of a step.

        Args:
            part: "forward" or "backward".
            named: Results with what to call them; only floating tensors are looked at.
            search: Runs the part again and says which operation first gave such a value here; None for none.

        Raises:
            NonFiniteError: On every rank, when a result of any rank is not finite.
        """
        mine = _not_finite(named)
        results = [json.loads(text) for text in self._team.tell(json.dumps(mine))]
        if not any(results):
            return
        with torch.no_grad(), self._team.running(f"search of the {part}"):
            found = search(_looked_for(value for name, value in named if name in mine))
        places = self._team.tell(found or "")
        ranks = self._team.ranks
        told = [f"rank {rank}: {place}" for rank, place in zip(ranks, places, strict=True) if place]
        first = next(names for names in results if names)
        more = f" and {len(first) - 1} more" if len(first) > 1 else ""
        where = [rank for rank, names in zip(ranks, results, strict=True) if names]
        raise NonFiniteError(
            f"{first[0]}{more} is not finite in the {part} on rank(s) {where}; "
            + ("first of all " + "; ".join(told) if told else "a second run gave finite values on every rank"),
            hint="look at that operation's inputs on that rank" if told else "suspect the hardware of one rank",
        )


def search(program: Program, arguments: Sequence[Any], bad: Bad) -> tuple[str | None, Any]:
    """Run a program and find the first value of this rank's own making with such elements.

    Args:
        program: Bound to the process groups.
        arguments: One per placeholder.
        bad: What to look for.

    Returns:
        The operation, parameter or input in words, None if there is none; and the program's results.
    """
    finder = _Finder(program, bad)
    results = finder.run(*arguments)
    return finder.found, results


class _Finder(fx.Interpreter):
    def __init__(self, program: Program, bad: Bad) -> None:
        module = executable(program)
        super().__init__(module)
        self._nodes = dict(zip(module.graph.nodes, program.graph.nodes, strict=True))
        self._inputs = {spec.name: spec for spec in program.signature.inputs}
        self._bad = bad
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        node = self._nodes[n]
        if self.found is None and n.op != "output" and not _is_copied(node) and self._has(value):
            # What arrives from another rank is not of this one's making.
            arrived = node.op.has(Trait.COLLECTIVE) or "c10d" in node.op.name
            operands = [o for o in n.all_input_nodes if not _is_copied(self._nodes[o])]
            if not arrived and not any(self._has(self.env[o]) for o in operands):
                self.found = self._words(node)
        return value

    def _has(self, value: Any) -> bool:
        if isinstance(value, tuple | list):
            return any(self._has(item) for item in value)
        return isinstance(value, Tensor) and value.is_floating_point() and bool(self._bad(value).any())

    def _words(self, node: Node) -> str:
        spec = self._inputs.get(node.name)
        if spec is not None and spec.kind is not InputKind.SAVED:
            return f"{spec.kind} {spec.target}"
        where = " ".join(part for part in (node.origin.source, node.origin.module) if part)
        return f"%{node.name} = {node.op.name}" + (f" ({where})" if where else "")


def _is_copied(node: Node) -> bool:
    """Whether a value is a copy that may still run, or lies in host memory, which it may not have reached yet."""
    return starts_copy(node) or on_host(node) or any(u.is_op(RELOAD) for u in node.users)


def _not_finite(named: Named) -> list[str]:
    """Names of the tensors that are not finite; waits for the device once."""
    floating = [(n, v) for n, v in named if isinstance(v, Tensor) and v.is_floating_point()]
    if not floating:
        return []
    finite = torch.stack([v.detach().isfinite().all() for _, v in floating]).tolist()
    return [name for (name, _), whole in zip(floating, finite, strict=True) if not whole]


def _looked_for(values: Iterable[Tensor]) -> Bad:
    """NaN if there is one; else infinities of the sign found, since masks hold the others on purpose."""
    found = list(values)
    if not found or any(bool(v.isnan().any()) for v in found):
        return torch.isnan
    return torch.isposinf if any(bool(v.isposinf().any()) for v in found) else torch.isneginf


__all__ = ["FiniteCheck", "search"]
