"""A joint program as numbers: where a saved set puts every operation, what it holds and how long it takes.

Writing a saved set into a program and counting its memory takes seconds for a deep model; here it takes milliseconds,
with the same result (`tests/passes/test_remat_model.py` compares the two).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from autosp_ir.analysis.aliasing import Aliasing
from autosp_ir.analysis.cost import Device, Link, compute_seconds, cost_of, link_seconds
from autosp_ir.ir.graph import Phase, Value
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import InputKind, OutputKind, Program
from autosp_ir.ir.types import ScalarType, TupleType
from autosp_ir.ir.verify import output_leaves
from autosp_passes._remat.rules import Semantics, is_view


@dataclass(frozen=True)
class Outcome:
    """A saved set, played through.

    Attributes:
        saved: Nodes whose results are saved, by number.
        peak: Bytes alive at once.
        extra: Seconds of what is computed a second time.
        again: Nodes that run in the backward although they need no tangent, by number.
        order: What runs: the node's number, and whether it is a second run.
        curve: Bytes alive while each entry of `order` runs.
        span: For each storage, by number, the entries of `order` that first and last touch it.
        copies: Original storage -> its storage in the backward, where it is computed there.
    """

    saved: frozenset[int]
    peak: int
    extra: float
    again: frozenset[int]
    order: tuple[tuple[int, bool], ...] = field(repr=False)
    curve: tuple[int, ...] = field(repr=False)
    span: dict[int, tuple[int, int]] = field(repr=False)
    copies: dict[int, int] = field(repr=False)


class StepModel:
    """Numbers of a joint program; nodes are numbered in program order.

    Args:
        program: A joint program without symbolic extents.
        semantics: What may be computed again.
        on: Prices compute.
        over: Prices collectives.
    """

    def __init__(self, program: Program, semantics: Semantics, on: Device, over: Link) -> None:
        self.nodes = [n for n in program.graph.nodes if n.op.kind != "output"]
        self.index = {n: i for i, n in enumerate(self.nodes)}
        count = len(self.nodes)
        self.operands = [tuple(dict.fromkeys(self.index[v.producer] for v in n.operands)) for n in self.nodes]
        costs = [cost_of(n, mesh=program.mesh) for n in self.nodes]
        self.seconds = [compute_seconds(c, on) + link_seconds(c, over) for c in costs]
        self.given = [n.op.kind in ("placeholder", "get_attr") for n in self.nodes]
        self.scalar = [bool(n.results) and isinstance(n.result.type, ScalarType) for n in self.nodes]
        self.tuples = [bool(n.results) and isinstance(n.result.type, TupleType) for n in self.nodes]
        self.view = [is_view(n) for n in self.nodes]
        self.may = [semantics.may_recompute(n) for n in self.nodes]
        self.never = [bool(n.results) and n.result in semantics.never_saved for n in self.nodes]
        self.source = [
            self.operands[i][0] if n.is_op("operator.getitem") and n.operands else i for i, n in enumerate(self.nodes)
        ]
        self.forward = [n.phase is Phase.FORWARD for n in self.nodes]
        self._removable = [
            bool(n.op.traits & {Trait.PURE, Trait.COLLECTIVE}) and not n.op.has(Trait.MUTATES) for n in self.nodes
        ]
        self.dependent = self._dependents(program)
        self.root = [self._root(i) for i in range(count)]
        self._storages()
        self._leaves(program)
        self.main = [i for i in range(count) if self.dependent[i] and not self.given[i]]

    def _dependents(self, program: Program) -> list[bool]:
        tangents = {s.name for s in program.signature.inputs if s.kind is InputKind.TANGENT}
        found: list[bool] = []
        for i, node in enumerate(self.nodes):
            found.append(node.name in tangents or any(found[o] for o in self.operands[i]))
        return found

    def _root(self, i: int) -> int:
        while self.view[i] and self.operands[i]:
            i = self.index[self.nodes[i].operands[0].producer]
        return i

    def _storages(self) -> None:
        aliasing = Aliasing()
        self.bytes: list[int] = []
        self.made: list[tuple[int, ...]] = []
        self.shared: list[tuple[int, ...]] = []
        for node in self.nodes:
            made = aliasing.step(node)
            self.bytes += [s.bytes if s.owned else 0 for s in made]
            own = tuple(s.id for s in made)
            self.made.append(own)
            self.shared.append(tuple(s.id for s in aliasing.storages(node.result) if s.id not in own))

    def _leaves(self, program: Program) -> None:
        leaves = output_leaves(program.graph)
        kinds = [s.kind for s in program.signature.outputs]
        named = [(k, self.index[v.producer]) for k, v in zip(kinds, leaves, strict=True) if isinstance(v, Value)]
        self.outputs = [i for _, i in named]
        self.gradients = [i for kind, i in named if kind is OutputKind.GRADIENT]

    def size(self, i: int) -> int:
        """Bytes of the storages that hold the result of node `i`."""
        return sum(self.bytes[s] for s in (*self.made[i], *self.shared[i]))

    def savable(self, i: int) -> bool:
        """Whether the result of node `i` is something to save: a tensor of its own that needs no tangent."""
        if self.given[i] or self.dependent[i] or self.view[i] or self.tuples[i] or self.scalar[i]:
            return False
        return not self.never[i] and bool(self.nodes[i].results)

    def numbers(self, values: Iterable[Value]) -> frozenset[int]:
        """The numbers of the bases of some values, as far as they can be saved."""
        roots = (self.root[self.index[v.producer]] for v in values)
        return frozenset(i for i in roots if self.savable(i))

    def everything(self) -> frozenset[int]:
        """Every forward value that can be saved."""
        return frozenset(i for i in range(len(self.nodes)) if self.forward[i] and self.savable(i))

    def play(self, saved: Collection[int]) -> Outcome:
        """What a saved set leads to."""
        return _Play(self, saved).run()


class _Play:
    """One run of `StepModel.play`."""

    def __init__(self, model: StepModel, saved: Collection[int]) -> None:
        self._model = model
        self._saved = set(saved)
        self._forward = list(model.forward)
        self._pull()
        self._deferred = [not (f or d) for f, d in zip(self._forward, model.dependent, strict=True)]
        self._again: set[int] = set()
        self._order: list[tuple[int, bool]] = []

    def _pull(self) -> None:
        """What is saved is computed in the forward."""
        stack = list(self._saved)
        while stack:
            i = stack.pop()
            if not self._forward[i]:
                self._forward[i] = True
                stack.extend(self._model.operands[i])

    def run(self) -> Outcome:
        model = self._model
        self._order = [(i, False) for i, f in enumerate(self._forward) if f and not model.given[i]]
        for i in model.main:
            self._supply(model.operands[i], deferred_only=False)
            self._order.append((i, False))
        self._supply(model.gradients, deferred_only=True)
        return self._measure(self._alive())

    def _supply(self, wanted: Iterable[int], deferred_only: bool) -> None:
        stack = [(i, False) for i in reversed(tuple(wanted))]
        while stack:
            i, ready = stack.pop()
            if i in self._again or (not self._deferred[i] and (deferred_only or self._stays(i))):
                continue
            if not ready:
                stack.append((i, True))
                stack.extend((o, False) for o in reversed(self._model.operands[i]))
                continue
            if self._deferred[i]:
                self._deferred[i] = False
                self._order.append((i, False))
            else:
                self._again.add(i)
                self._order.append((i, True))

    def _stays(self, i: int) -> bool:
        model = self._model
        if not self._forward[i] or model.given[i] or model.scalar[i] or i in self._saved:
            return True
        if model.view[i]:
            return False
        if not model.tuples[i] and not model.may[i]:
            self._saved.add(i)
            return True
        return False

    def _alive(self) -> list[tuple[int, bool]]:
        """What is left when dead code is gone."""
        model = self._model
        read = {(i, False) for i in model.outputs}
        kept: list[tuple[int, bool]] = []
        for i, copy in reversed(self._order):
            if (i, copy) not in read and model._removable[i]:
                continue
            kept.append((i, copy))
            later = copy or not self._forward[i]
            read.update((o, later and o in self._again) for o in model.operands[i])
        kept.reverse()
        return kept

    def _measure(self, order: list[tuple[int, bool]]) -> Outcome:
        model = self._model
        sizes = list(model.bytes)
        current: dict[int, int] = {}
        held: dict[tuple[int, bool], tuple[int, ...]] = {}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        given = {s for i, g in enumerate(model.given) if g for s in (*model.made[i], *model.shared[i])}
        for i, g in enumerate(model.given):
            if g:
                held[(i, False)] = model.made[i]
        for position, (i, copy) in enumerate(order):
            later = copy or not self._forward[i]
            if copy:
                for s in model.made[i]:
                    current[s] = len(sizes)
                    sizes.append(model.bytes[s])
            own = tuple(current[s] for s in model.made[i]) if copy else model.made[i]
            shared = model.shared[i]
            storages = (*own, *(current.get(s, s) for s in shared)) if later else (*own, *shared)
            held[(i, copy)] = storages
            for s in storages:
                first.setdefault(s, position)
                last[s] = position
            for o in model.operands[i]:
                for s in held.get((o, later and o in self._again), ()):
                    last[s] = position
        for i in model.outputs:
            for s in held.get((i, False), ()):
                last[s] = len(order)
        change = [0] * (len(order) + 2)
        for s, start in first.items():
            if s not in given:
                change[start] += sizes[s]
                change[last[s] + 1] -= sizes[s]
        curve: list[int] = []
        live = 0
        for position in range(len(order)):
            live += change[position]
            curve.append(live)
        extra = sum(model.seconds[i] for i, copy in order if copy)
        again = frozenset(i for i, copy in order if copy or not (self._forward[i] or model.dependent[i]))
        span = {s: (start, last[s]) for s, start in first.items()}
        saved = frozenset(self._saved)
        return Outcome(saved, max(curve, default=0), extra, again, tuple(order), tuple(curve), span, current)


__all__ = ["Outcome", "StepModel"]
