"""Which operations token-partition cut, which read gathered tokens, and which it left whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from autosp_ir.comm.rules import base
from autosp_ir.doctor.findings import FamilyCount, Gather
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, Program
from autosp_ir.ir.types import Partial, Placement, Shard, Type, tensors_of
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.instrument import Instrument
from autosp_ir.pipeline.trace import PassRecord

_PARTITION = "token-partition"
_RULES = base.__name__.rpartition(".")[0]
# Between a gather and the operation that wanted it stand only views, copies, and slices that take padding off.
_ADAPTERS = ("aten.reshape", "autosp.invariant_to_replicate")
_UNPADDING = "aten.slice.Tensor"
_PADDING_PASS = "pad-tokens"


def family_of(node: Node) -> str:
    """The family whose layout rule an operation has: the name of the file that holds the rule."""
    rule = node.op.layout_rule
    if rule is None:
        return "pointwise" if node.op.has(Trait.POINTWISE) else "without a rule"
    module = str(rule.__module__)
    return module.rpartition(".")[2] if module.startswith(_RULES) else "rules of others"


@dataclass
class Placements(Instrument):
    """Watches `token-partition`.

    Attributes:
        families: How operations that depend on the batch run, by family.
        gathers: Operations that read gathered tokens, in order.
        gathered_bytes: Bytes of the gathered tensors, each once.
        spread: Part of the intermediate results' bytes that is spread over ranks; None before the pass.
    """

    families: list[FamilyCount] = field(default_factory=list)
    gathers: list[Gather] = field(default_factory=list)
    gathered_bytes: int = 0
    spread: float | None = None
    _bytes_before: dict[str, int] = field(default_factory=dict)

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Note the bytes of every floating-point result that the batch decides on, while every shape is global."""
        if pass_.name != _PARTITION:
            return
        decided: set[Value] = set(_user_inputs(program))
        for node in _operations(program):
            if decided.isdisjoint(node.operands):
                continue
            decided.update(node.results)
            if any(k.dtype.is_floating_point and k.ndim for k in tensors_of(node.result.type)):
                self._bytes_before[node.name] = 0 if _is_free(node) else _bytes(node.result)

    def after_pass(self, pass_: Pass, program: Program, record: PassRecord) -> None:
        """Read the layouts that the pass gave."""
        if pass_.name != _PARTITION:
            return
        axis = str(program.info["sp_axis"])
        reads = _gathered_reads(program)
        self.gathered_bytes = sum(_bytes(n.result) for n in program.find("autosp.all_gather") if _read_inside(n))
        self.gathers = [
            Gather(node.name, node.op.name, family_of(node), sum(map(_bytes, values)), node.origin.source)
            for node, values in reads.items()
        ]
        self._count(program, axis, reads)

    def _count(self, program: Program, axis: str, reads: dict[Node, list[Value]]) -> None:
        counts: dict[str, FamilyCount] = {}
        spread = 0
        for node in _operations(program):
            if node.name not in self._bytes_before and node not in reads:
                continue
            cut = any(isinstance(p, Shard | Partial) for p in _placements(node.result.type, axis))
            spread += self._bytes_before.get(node.name, 0) if cut else 0
            kind = "gathered" if node in reads else "cut" if cut else "whole"
            name = family_of(node)
            count = counts.setdefault(name, FamilyCount(name))
            gathered = sum(map(_bytes, reads.get(node, ())))
            counts[name] = replace(count, **{kind: getattr(count, kind) + 1, "bytes": count.bytes + gathered})
        total = sum(self._bytes_before.values())
        self.families = sorted(counts.values(), key=lambda c: c.family)
        self.spread = spread / total if total else None


def _user_inputs(program: Program) -> list[Value]:
    """The values of the batch's tensors."""
    return [program.graph.value(s.name) for s in program.signature.inputs if s.kind is InputKind.USER_INPUT]


def _is_free(node: Node) -> bool:
    return node.op.has(Trait.VIEW) or node.is_op("operator.getitem")


def _operations(program: Program) -> Iterator[Node]:
    for node in program.graph.nodes:
        if node.op.kind not in ("placeholder", "get_attr", "output"):
            yield node


def _gathered_reads(program: Program) -> dict[Node, list[Value]]:
    """The operations that read gathered tensors, with those tensors; what is returned must be whole anyway."""
    reads: dict[Node, list[Value]] = {}
    for gather in program.find("autosp.all_gather"):
        for reader in _readers(gather):
            reads.setdefault(reader, []).append(gather.result)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return dict(sorted(reads.items(), key=lambda item: order[item[0]]))


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.op.kind == "output":
            continue
        unpads = user.is_op(_UNPADDING) and _PADDING_PASS in user.origin.passes
        if unpads or user.is_op(*_ADAPTERS):
            yield from _readers(user)
        else:
            yield user


def _read_inside(gather: Node) -> bool:
    return next(_readers(gather), None) is not None


def _placements(kind: Type, axis: str) -> list[Placement]:
    return [tensor.layout[axis] for tensor in tensors_of(kind)]


def _bytes(value: Value) -> int:
    total = 0
    for tensor in tensors_of(value.type):
        extents = [extent for extent in tensor.shape if isinstance(extent, int)]
        count = tensor.dtype.itemsize
        for extent in extents:
            count *= extent
        total += count
    return total


__all__ = ["Placements", "family_of"]
