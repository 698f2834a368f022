"""Asks a layout rule about one operation and checks its answer with numbers.

A probe holds the operation's global arguments. For every combination of operand placements it builds the one-node
program of a rank, asks for the layout, and when one is given runs every rank and puts the result together.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import autosp_ir.comm.attention  # registers the operators
import autosp_ir.comm.ops  # noqa: F401
from autosp_ir.comm.layout import Outcome, infer_layout
from autosp_ir.errors import AutoSPError, VerifyError
from autosp_ir.ir.graph import Graph
from autosp_ir.ir.infer import call_target
from autosp_ir.ir.ops import op_by_name
from autosp_ir.ir.program import InputKind, InputSpec, Program, Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, Layout, Placement, Shard, TensorType, Type, type_of
from autosp_ir.sim.layout_truth import assemble, close, split

AXIS = "sp"
RANKS = 2
FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)


@dataclass
class Probe:
    """One operation with global arguments.

    Attributes:
        op: IR name.
        args: Global arguments; tensors are operands.
        kwargs: Global keyword arguments.
        sizes: Position of an argument that lists sizes of the result, to be cut with it.
        zeros: Positions of operands (counted among tensors) that are produced by `aten.zeros`.
        fixed: Operands (counted among tensors) that stay whole, for operations with too many combinations.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    sizes: int | None = None
    zeros: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        _visit((self.args, self.kwargs), found.append)
        return found


@dataclass
class Answer:
    """What a rule said about one combination."""

    placements: tuple[Placement, ...]
    outcome: Outcome
    hint: Placement | None


def placements_of(value: Tensor, ranks: int = RANKS) -> list[Placement]:
    """Every placement that a tensor can have over `ranks`."""
    found: list[Placement] = [INVARIANT]
    for dim, extent in enumerate(value.shape):
        for outer in (1, 2, 3, 4):
            if extent % (outer * ranks) == 0 and extent:
                found.append(Shard(dim, outer))
    if value.dtype != torch.bool:
        found.append(PARTIAL)
    return found


def ask(
    probe: Probe, placements: Sequence[Placement], expected: Any, hint: Placement | None = None
) -> tuple[Outcome, Any]:
    """The rule's answer and each rank's results.

    Raises:
        LayoutError: The rule refuses.
        VerifyError: The operation does not take the local shapes.
    """
    operands = [split(t, p, RANKS) for t, p in zip(probe.tensors, placements, strict=True)]
    locals_ = [_localised(probe, [o[rank] for o in operands], hint) for rank in range(RANKS)]
    program = Program(Graph(), stage=Stage.JOINT, mesh={AXIS: RANKS})
    program.fake_mode = FAKE_MODE
    values = iter(
        _operand(program, i, operand[0], placement, i in probe.zeros)
        for i, (operand, placement) in enumerate(zip(operands, placements, strict=True))
    )
    node = program.graph.create(probe.op, *_mapped(locals_[0], lambda _: next(values)))
    # Only what a rule accepts is run: kernels need not survive shapes that do not fit.
    node.result.type = _expected_type(probe, expected, hint)
    outcome = infer_layout(node, program, AXIS, hint=hint)
    program.infer(node)
    return outcome, [call_target(node, *local) for local in locals_]


def _expected_type(probe: Probe, expected: Any, hint: Placement | None) -> Type:
    kind = type_of(expected)
    if probe.sizes is None or not isinstance(hint, Shard) or not isinstance(kind, TensorType):
        return kind
    shape = [extent // RANKS if d == hint.dim else extent for d, extent in enumerate(expected.shape)]
    return TensorType(tuple(shape), kind.dtype)


def is_true(outcome: Outcome, results: Sequence[Any], expected: Any) -> bool:
    """Whether the ranks' results, put together as the outcome says, are the global result."""
    if isinstance(expected, tuple | list):
        parts = outcome if isinstance(outcome, tuple) else (outcome,) * len(expected)
        assert len(parts) == len(expected)
        return all(
            is_true(part, [r[i] for r in results], whole)
            for i, (part, whole) in enumerate(zip(parts, expected, strict=True))
            if isinstance(whole, Tensor) and part is not None
        )
    assert isinstance(outcome, Placement)
    try:
        return close(assemble(results, outcome), expected)
    except (AutoSPError, RuntimeError):
        return False


def truths(probe: Probe, limit: int = 400, seed: int = 0) -> Iterator[tuple[Answer, bool]]:
    """Every combination that the rule accepts, and whether its answer is numerically true."""
    torch.manual_seed(seed)
    expected = expected_of(probe)
    options: list[list[Placement]] = [
        [INVARIANT] if i in probe.fixed or i in probe.zeros else placements_of(t) for i, t in enumerate(probe.tensors)
    ]
    for placements in _combinations(options, limit, seed):
        for hint in _hints(probe, expected):
            try:
                outcome, results = ask(probe, placements, expected, hint)
            except (VerifyError, RuntimeError, IndexError):
                # Refused, or the kernel itself refuses sizes cut for this hint: loud either way.
                continue
            if hint is not None and outcome != hint:
                # The sizes were cut for the hint: another answer speaks of another whole model.
                continue
            yield Answer(placements, outcome, hint), is_true(outcome, results, expected)


def _combinations(options: list[list[Placement]], limit: int, seed: int) -> list[tuple[Placement, ...]]:
    """Every combination or, where there are too many, all that use one placement or whole, and a random sample."""
    total = math.prod(len(o) for o in options)
    if total <= limit:
        return list(itertools.product(*options))
    found: dict[tuple[Placement, ...], None] = {}
    for shared in dict.fromkeys(p for o in options for p in o):
        choices = [[p for p in (shared, INVARIANT) if p in o] for o in options]
        found.update(dict.fromkeys(itertools.product(*choices)))
    chance = random.Random(seed)
    found.update(dict.fromkeys(tuple(map(chance.choice, options)) for _ in range(limit)))
    return list(found)


def expected_of(probe: Probe) -> Any:
    """The operation's result on the global arguments."""
    program = Program(Graph(), stage=Stage.JOINT)
    node = program.graph.create(probe.op, ())
    return call_target(node, probe.args, probe.kwargs)


def _hints(probe: Probe, expected: Any) -> list[Placement | None]:
    if probe.sizes is None:
        return [None]
    return [p for p in placements_of(expected) if p != PARTIAL]


def _localised(probe: Probe, tensors: list[Tensor], hint: Placement | None) -> tuple[Any, Any]:
    remaining = iter(tensors)
    args, kwargs = _mapped((probe.args, probe.kwargs), lambda _: next(remaining))
    if probe.sizes is not None and isinstance(hint, Shard):
        sizes = list(args[probe.sizes])
        sizes[hint.dim] //= RANKS
        args = (*args[: probe.sizes], sizes, *args[probe.sizes + 1 :])
    return args, kwargs


def _operand(program: Program, index: int, value: Tensor, placement: Placement, zeros: bool) -> Any:
    kind = type_of(value)
    assert isinstance(kind, TensorType)
    kind = kind.with_layout(Layout({AXIS: placement}))
    if zeros:
        return program.graph.create("aten.zeros", (list(value.shape),), {"dtype": value.dtype}, type=kind).result
    node = program.graph.create("placeholder", ("x",), name=f"x{index}", type=kind)
    program.signature.inputs.append(InputSpec(node.name, InputKind.USER_INPUT, node.name, requires_grad=True))
    return node.result


def _visit(structure: Any, fn: Callable[[Tensor], Any]) -> None:
    _mapped(structure, fn)


def _mapped(structure: Any, fn: Callable[[Tensor], Any]) -> Any:
    if isinstance(structure, Tensor):
        return fn(structure)
    if isinstance(structure, tuple | list):
        return type(structure)(_mapped(s, fn) for s in structure)
    if isinstance(structure, dict):
        return {k: _mapped(v, fn) for k, v in structure.items()}
    return structure


def resolvable(name: str) -> bool:
    """Whether this torch has the operation."""
    try:
        op_by_name(name)
    except AutoSPError:
        return False
    return True


def runs(probe: Probe) -> bool:
    """Whether the operation takes the probe's arguments at all."""
    try:
        expected_of(probe)
    except RuntimeError:
        return False
    return True
