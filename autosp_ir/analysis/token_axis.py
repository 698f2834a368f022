"""Which dimension of every value runs over tokens, by factor propagation.

A token factor is written as the `Shard` that would cut it: `Shard(dim, outer)` says that dimension `dim` of the value
is `outer` blocks of tokens, so `[B*S, V]` carries `Shard(0, outer=B)`. Factors follow each operation's own layout
rule, asked one factor at a time on the unpartitioned program. An attention score matrix carries two of them.

The factors are a guide (where to cut, what to draw), never a proof: a program is right because its layouts are
checked, whatever this analysis says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autosp_ir.comm.layout import infer_layout
from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Node, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, Program
from autosp_ir.ir.types import (
    INVARIANT,
    REPLICATE,
    Dim,
    NoneType,
    ObjectType,
    Placement,
    ScalarType,
    Shard,
    TensorType,
)

TokenFactor = Shard
"""A token axis inside a value, as the shard that would cut it."""

_AXIS = "tokens"
# These move or drop whole tokens: the result still runs over tokens, although no shard survives them.
_ALONG_TOKENS = frozenset(
    {
        "aten.slice.Tensor",
        "aten.constant_pad_nd",
        "aten.pad",
        "aten.roll",
        "aten.flip",
        "aten.cumsum",
        "aten.narrow",
        "aten.conv1d",
        "aten.index_select",
        "aten.tril",
        "aten.triu",
    }
)


@dataclass
class TokenFactors:
    """The result of the analysis.

    Attributes:
        length: Number of tokens, None when no input has a token axis.
        factors: Token factors of each tensor value that has any.
    """

    length: Dim | None
    factors: dict[Value, tuple[TokenFactor, ...]] = field(default_factory=dict)

    def of(self, value: Value) -> tuple[TokenFactor, ...]:
        """The token factors of a value, empty when it has none."""
        return self.factors.get(value, ())

    def with_two_axes(self) -> list[Value]:
        """Values that run over tokens twice, such as attention scores and S×S masks."""
        return [v for v, f in self.factors.items() if len(f) > 1]


def token_factors(program: Program) -> TokenFactors:
    """Find the token factors of every value of an unpartitioned program.

    Args:
        program: A forward or joint program in global shapes. `info["seq_dims"]` names the token dimension of each
            user input.

    Returns:
        The factors, by value.
    """
    seq_dims: Mapping[str, int] = program.info.get("seq_dims", {})
    result = TokenFactors(token_count(program))
    if result.length is None:
        return result
    for spec in program.signature.inputs:
        if spec.kind is InputKind.USER_INPUT and spec.target in seq_dims:
            result.factors[program.graph.value(spec.name)] = (Shard(seq_dims[spec.target]),)
    for node in program.graph.nodes:
        if node.op.kind in ("placeholder", "get_attr", "output"):
            continue
        found = _transfer(node, program, result)
        if found:
            result.factors[node.result] = found
    return result


def token_count(program: Program) -> Dim | None:
    """The length of the first user input that has a token dimension, None when none has one."""
    seq_dims: Mapping[str, int] = program.info.get("seq_dims", {})
    for spec in program.signature.inputs:
        if spec.kind is InputKind.USER_INPUT and spec.target in seq_dims:
            shape: tuple[Dim, ...] = program.graph.value(spec.name).tensor_type.shape
            return shape[seq_dims[spec.target]]
    return None


def _transfer(node: Node, program: Program, known: TokenFactors) -> tuple[TokenFactor, ...]:
    tensors = [v for v in dict.fromkeys(node.operands) if not _is_scalar(v)]
    if not tensors:
        return _created(node, known.length)
    if node.is_op("operator.getitem"):
        return _element(node, known)
    carriers = [v for v in tensors if known.of(v)]
    if not carriers:
        return ()
    if node.op.has(Trait.POINTWISE):
        return _aligned(node, carriers, known)
    if node.op.name in _ALONG_TOKENS:
        return _same_rank(node, known.of(carriers[0]))
    return _by_rule(node, program, carriers, known)


def _is_scalar(value: Value) -> bool:
    return isinstance(value.type, ScalarType | NoneType | ObjectType)


def _created(node: Node, length: Dim | None) -> tuple[TokenFactor, ...]:
    kind = node.result.type
    if not isinstance(kind, TensorType) or length in (None, 1):
        return ()
    return tuple(Shard(d) for d, extent in enumerate(kind.shape) if extent == length)


def _element(node: Node, known: TokenFactors) -> tuple[TokenFactor, ...]:
    kind = node.result.type
    if not isinstance(kind, TensorType):
        return ()
    return tuple(f for f in known.of(node.operands[0]) if f.dim < kind.ndim)


def _aligned(node: Node, carriers: Iterable[Value], known: TokenFactors) -> tuple[TokenFactor, ...]:
    kind = node.result.type
    if not isinstance(kind, TensorType):
        return ()
    found: dict[TokenFactor, None] = {}
    for value in carriers:
        lift = kind.ndim - value.tensor_type.ndim
        for factor in known.of(value):
            if value.tensor_type.shape[factor.dim] == kind.shape[factor.dim + lift]:
                found[Shard(factor.dim + lift, factor.outer)] = None
    return tuple(found)


def _same_rank(node: Node, factors: tuple[TokenFactor, ...]) -> tuple[TokenFactor, ...]:
    kind = node.result.type
    if not isinstance(kind, TensorType):
        return ()
    return tuple(f for f in factors if f.dim < kind.ndim and kind.shape[f.dim] != 1)


def _by_rule(node: Node, program: Program, carriers: list[Value], known: TokenFactors) -> tuple[TokenFactor, ...]:
    found: dict[TokenFactor, None] = {}
    for value in carriers:
        for factor in known.of(value):
            alone = {value: factor}
            together = {v: known.of(v)[0] for v in carriers} | alone
            for placements in (together, alone):
                shard = _ask(node, program, placements)
                if shard is not None:
                    found[shard] = None
                    break
    return tuple(found) or _like_shaped(node, carriers, known)


def _like_shaped(node: Node, carriers: Iterable[Value], known: TokenFactors) -> tuple[TokenFactor, ...]:
    """An operation whose rule refuses still runs over tokens if its result has the shape of an operand that does."""
    kind = node.result.type
    for value in carriers:
        if isinstance(kind, TensorType) and isinstance(value.type, TensorType) and value.type.shape == kind.shape:
            return known.of(value)
    return ()


def _ask(node: Node, program: Program, placements: Mapping[Value, Placement]) -> TokenFactor | None:
    """The shard of the (first) result when the operands are placed so and all others are replicated."""
    result = what_if(node, program, placements)
    first = result[0] if isinstance(result, tuple) and result else result
    return first if isinstance(first, Shard) else None


def what_if(
    node: Node, program: Program, placements: Mapping[Value, Placement], *, others: Placement = REPLICATE
) -> Placement | tuple[Placement | None, ...] | None:
    """The placement a node's result would get, or None when its rule refuses.

    Args:
        node: A node of `program`, whose shapes are global.
        program: The unpartitioned program.
        placements: Placement of some operands along a hypothetical axis.
        others: Placement of the other operands.
    """
    complete = {v: placements.get(v, INVARIANT if _is_scalar(v) else others) for v in node.operands}
    try:
        return infer_layout(node, program, _AXIS, placements=complete)
    except AutoSPError:
        return None
