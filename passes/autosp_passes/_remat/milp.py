"""The least recomputation within a peak, as a mixed-integer program.

A binary for each value says whether it is saved, a number in [0, 1] for each operation whether it runs again; what the
backward needs is saved or computed again, from what is saved or computed again. How much is alive where depends on the
order of the backward, which depends on the choice. Rows for peaks are therefore added where the simulated step goes
over: each states what was alive there, and what would be if the choice were another, as far as that is certain.
Repeated layers share their variables within groups of 1, 1, 2, 4, … layers, so that any number of them can differ.
"""

from __future__ import annotations

import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from autosp_passes._remat.model import Outcome, StepModel
from autosp_passes._remat.rows import PEAKS_PER_ROUND, Rows, shared_decisions, sparse, worst_positions

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]

_ROUNDS = 60
_TOLERANCE = 1e-6
_GAP = 1e-2
_WIDE_GAP = 5e-2
_INFEASIBLE = 2


class BudgetSolver:
    """Solves one program for any number of peaks.

    Args:
        model: The program.
    """

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._classes = shared_decisions(model)
        self._places = {i: p for p, i in enumerate(model.main)}
        self._reads()
        self._potential()
        self._variables()
        self._needs = Rows()
        self._add_needs()
        self._certain()

    def least(self, seconds: float = 4.0) -> list[Outcome]:
        """Outcomes with ever lower peaks; the last rounds are near the least possible one."""
        return self._rounds(None, seconds)

    def solve(self, peak: float, seconds: float = 4.0) -> Outcome | None:
        """The cheapest saved set found whose simulated peak is at most `peak` bytes; None if there is none.

        Args:
            peak: Bytes.
            seconds: After which it gives up.
        """
        fitting = [o for o in self._rounds(peak, seconds) if o.peak <= peak]
        return min(fitting, key=lambda o: (o.extra, o.peak), default=None)

    # Variables and rows of need ---------------------------------------------------------------------------------

    def _reads(self) -> None:
        """For each root that can be saved: the positions of its direct reads in the backward, and in the forward."""
        model = self._model
        self._direct: dict[int, list[int]] = {}
        self._last_forward: dict[int, int] = {}
        for i in range(len(model.nodes)):
            for operand in model.operands[i]:
                root = model.root[operand]
                if model.dependent[root] or model.given[root]:
                    continue
                if i in self._places:
                    self._direct.setdefault(root, []).append(self._places[i])
                elif model.forward[i]:
                    self._last_forward[root] = i

    def _potential(self) -> None:
        """For each root: up to where a saved one may be read, by the backward itself or by what it computes again."""
        model = self._model
        runs: dict[int, int] = {}
        self._until: dict[int, int] = {}
        for i in reversed(range(len(model.nodes))):
            if model.given[i] or model.dependent[i] or model.view[i]:
                continue
            reads = self._direct.get(i, [])
            self._until[i] = max(self._until.get(i, -1), *reads, -1)
            # It runs again no later than the backward reads it, or else when what reads it runs again.
            at = max(min(reads, default=self._until[i]), runs.get(i, -1))
            source = model.source[i]
            if source != i:
                runs[source] = max(runs.get(source, -1), at)
                continue
            if model.may[i] or not model.forward[i]:
                for operand in model.operands[i]:
                    root = model.root[operand]
                    self._until[root] = max(self._until.get(root, -1), at)

    def _variables(self) -> None:
        model = self._model
        names: dict[tuple[str, object], int] = {}
        self._save: dict[int, int] = {}
        self._rerun: dict[int, int] = {}
        for i in range(len(model.nodes)):
            if model.given[i] or model.dependent[i] or model.view[i] or model.scalar[i]:
                continue
            if model.savable(i):
                self._save[i] = names.setdefault(("save", self._classes.get(i, i)), len(names))
            source = model.source[i]
            if model.may[i] or not model.forward[i]:
                self._rerun[i] = names.setdefault(("run", self._classes.get(source, source)), len(names))
        count = len(names)
        self._cost = np.zeros(count + 1)
        self._binary = np.zeros(count + 1, dtype=np.int64)
        self._lower, self._upper = np.zeros(count + 1), np.ones(count + 1)
        total = sum(model.seconds) or 1.0
        for i, variable in self._rerun.items():
            if model.source[i] == i and model.forward[i]:
                self._cost[variable] += model.seconds[i] / total
        largest = max((model.size(i) for i in self._save), default=0) or 1
        for i, variable in self._save.items():
            self._binary[variable] = 1
            # Of equals, the smaller set.
            self._cost[variable] += 1e-9 * model.size(i) / largest
        self._bound = count
        self._upper[count] = np.inf

    def _add_needs(self) -> None:
        for root in self._direct:
            self._need(root, None)
        for i, variable in self._rerun.items():
            if self._model.source[i] != i:
                continue
            for operand in self._model.operands[i]:
                self._need(self._model.root[operand], variable)

    def _need(self, root: int, by: int | None) -> None:
        """`by`, or always where it is None, implies that the root is saved or computed again."""
        model = self._model
        if model.given[root] or model.dependent[root] or model.scalar[root]:
            return
        variables = {v for v in (self._save.get(root), self._rerun.get(root)) if v is not None}
        if by in variables:
            return
        entries = dict.fromkeys(variables, -1.0)
        if by is None:
            self._needs.add(entries, -1.0)
        else:
            self._needs.add({**entries, by: 1.0}, 0.0)

    def _certain(self) -> None:
        """What is alive at each position of the backward whatever the order of what is computed again.

        One row for each position: bytes for each variable, and bytes that no choice changes.
        """
        model = self._model
        positions = len(model.main)
        change = np.zeros((positions + 1, len(self._cost)))
        for i, variable in self._save.items():
            last = max(self._direct.get(i) or [self._until.get(i, -1)])
            change[0, variable] += model.size(i)
            change[last + 1, variable] -= model.size(i)
        for i, variable in self._rerun.items():
            reads = self._direct.get(i)
            if reads and not model.tuples[i]:
                change[min(reads), variable] += model.size(i)
                change[max(reads) + 1, variable] -= model.size(i)
        self._coefficients = np.cumsum(change, axis=0)[:positions] / self._unit
        fixed = np.zeros(positions + 1)
        played = model.play(model.everything())
        place = {i: p for p, i in enumerate(model.main)}
        at = np.cumsum([0] + [i in place for i, _ in played.order])
        maker = {s: i for i, made in enumerate(model.made) for s in made}
        outputs = {s for i in model.outputs for s in (*model.made[i], *model.shared[i])}
        for s, (first, last) in played.span.items():
            if s in maker and (model.dependent[maker[s]] or s in outputs) and not model.given[maker[s]]:
                fixed[at[first]] += model.bytes[s]
                if last < len(played.order):
                    fixed[at[last] + 1] -= model.bytes[s]
        self._fixed = np.cumsum(fixed)[:positions] / self._unit

    def _start(self, peak: float | None, end: float) -> Rows:
        """Rows of certain memory that the relaxed program needs."""
        rows = Rows()
        for _ in range(_ROUNDS):
            solution = self._optimise(rows, peak, end - time.monotonic(), relaxed=True)
            if solution is None or not self._add_certain(rows, solution, peak):
                break
        return rows

    def _add_certain(self, rows: Rows, solution: Vector, peak: float | None) -> bool:
        """Add the certain rows that a solution breaks most; whether there were any."""
        limit = solution[self._bound] if peak is None else peak / self._unit
        excess = self._coefficients @ solution + self._fixed - limit
        step = max(len(excess) // 64, 1)
        worst = [a + int(excess[a : a + step].argmax()) for a in range(0, len(excess), step)]
        worst = sorted((p for p in worst if excess[p] > _TOLERANCE * limit), key=lambda p: -excess[p])
        before = len(rows.limits)
        for p in worst[:PEAKS_PER_ROUND]:
            row = {int(v): float(self._coefficients[p, v]) for v in np.flatnonzero(self._coefficients[p])}
            if peak is None:
                row[self._bound] = -1.0
            rows.add(row, -float(self._fixed[p]) + (0.0 if peak is None else peak / self._unit))
        return len(rows.limits) > before

    # Rounds -----------------------------------------------------------------------------------------------------

    def _rounds(self, peak: float | None, seconds: float) -> list[Outcome]:
        """Solve, play, add the rows of what goes over, and again."""
        end = time.monotonic() + seconds
        peaks = self._start(peak, end)
        found: list[Outcome] = []
        for _ in range(_ROUNDS):
            left = end - time.monotonic()
            if left <= 0:
                break
            solution = self._optimise(peaks, peak, left)
            if solution is None:
                break
            if self._add_certain(peaks, solution, peak):
                continue
            saved = [i for i, v in self._save.items() if solution[v] > 0.5]
            outcome = self._model.play(saved)
            found.append(outcome)
            limit = solution[self._bound] * self._unit if peak is None else peak
            if outcome.peak <= limit * (1 + (_GAP if peak is None else 0.0)):
                break
            before = len(peaks.limits)
            for position in worst_positions(outcome, limit):
                self._add_peak(peaks, outcome, position, solution, peak)
            if len(peaks.limits) == before:
                break
        return found

    @property
    def _unit(self) -> float:
        return float(sum(self._model.bytes)) or 1.0

    def _optimise(self, peaks: Rows, peak: float | None, seconds: float, relaxed: bool = False) -> Vector | None:
        entries = [*self._needs.entries, *peaks.entries]
        limits = np.array([*self._needs.limits, *peaks.limits])
        cost = self._cost.copy()
        if peak is None:
            cost *= 1e-4
            cost[self._bound] = 1.0
        # HiGHS sometimes gives up near the optimum; a wider gap then still ends.
        for gap in (_GAP, _WIDE_GAP):
            result = milp(
                cost,
                integrality=None if relaxed else self._binary,
                bounds=Bounds(self._lower, self._upper),
                constraints=LinearConstraint(sparse(entries, len(cost)), ub=limits) if entries else None,
                options={"time_limit": max(seconds / 2, 0.01), "mip_rel_gap": gap},
            )
            if result.x is not None or result.status == _INFEASIBLE:
                break
        return result.x if result.x is not None else None

    def _add_peak(
        self,
        peaks: Rows,
        outcome: Outcome,
        position: int,
        solution: Vector,
        peak: float | None,
    ) -> None:
        """One row: what is alive at a position of a played step, in terms of the choice."""
        model = self._model
        node, copy = outcome.order[position]
        in_forward = not copy and model.forward[node]
        place = self._main_position(outcome, position)
        alive = {s for s, (first, last) in outcome.span.items() if first <= position <= last}
        entries: dict[int, float] = {}
        counted = 0.0
        for i, variable in self._save.items():
            size = model.size(i)
            if not size:
                continue
            if in_forward:
                would = i <= node and self._last_forward.get(i, i) < node
            elif i in outcome.saved:
                would = any(s in alive for s in (*model.made[i], *model.shared[i]))
            else:
                would = self._until.get(i, -1) >= place
            if would:
                entries[variable] = entries.get(variable, 0.0) + size
                counted += size * solution[variable]
        if not in_forward:
            counted += self._copies(outcome, alive, place, solution, entries)
        constant = outcome.curve[position] - counted
        row = {v: c / self._unit for v, c in entries.items()}
        if peak is None:
            row[self._bound] = -1.0
            peaks.add(row, -constant / self._unit)
        else:
            peaks.add(row, (peak - constant) / self._unit)

    def _copies(
        self,
        outcome: Outcome,
        alive: set[int],
        place: int,
        solution: Vector,
        entries: dict[int, float],
    ) -> float:
        """Add what is computed in the backward; returns how much of it the choice already has."""
        model = self._model
        counted = 0.0
        for i, variable in self._rerun.items():
            if model.tuples[i]:
                continue
            made = (*model.made[i], *model.shared[i])
            size = model.size(i)
            if model.source[i] in outcome.again:
                moved = [outcome.copies.get(s, s) for s in made]
                would = i not in outcome.saved and any(s in alive for s in moved)
            else:
                reads = self._direct.get(i, [])
                would = bool(reads) and reads[0] <= place <= reads[-1]
            if would and size:
                entries[variable] = entries.get(variable, 0.0) + size
                counted += size * solution[variable]
        return counted

    def _main_position(self, outcome: Outcome, position: int) -> int:
        """How far the backward proper is at a position."""
        for i, copy in outcome.order[position:]:
            if not copy and i in self._places:
                return self._places[i]
        return len(self._places)


__all__ = ["BudgetSolver"]
