"""The cheapest saved set within a peak: the solver's and every known rule's, judged by playing the step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from autosp_ir.errors import PassError
from autosp_ir.ir.program import Program
from autosp_passes._remat.candidates import checkpointed, mixed, rule_saved
from autosp_passes._remat.milp import BudgetSolver
from autosp_passes._remat.model import Outcome, StepModel
from autosp_passes._remat.repeats import find_repeats
from autosp_passes._remat.rules import Semantics

RULES = ("save-all", "min-cut", "autosp-sac")
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Attributes:
        name: The rule that won; `milp` for the solver.
        outcome: What it leads to.
        peak: The budget, bytes.
        candidates: Every complete candidate by name.
    """

    name: str
    outcome: Outcome
    peak: float
    candidates: Mapping[str, Outcome]


def parse_size(text: str | float) -> float:
    """Bytes of `40GiB`, `512MiB`, `1.5GB` or a plain number of bytes.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(text, int | float):
        return float(text)
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 40GiB, 512MiB or a number of bytes")
    return float(match[1]) * _UNITS[match[2].upper()]


class Portfolio:
    """Candidates of one program, for any number of budgets.

    Args:
        program: A joint program without symbolic extents.
        model: The same, as numbers.
        semantics: What may be computed again.
        rules: Rules beside the solver.
    """

    def __init__(
        self, program: Program, model: StepModel, semantics: Semantics, rules: tuple[str, ...] = RULES
    ) -> None:
        self._model = model
        self._repeats = find_repeats(model)
        self.rules: dict[str, Outcome] = {}
        for rule in rules:
            values = rule_saved(program, semantics, rule)
            numbers = model.everything() if values is None else model.numbers(values)
            self.rules[rule] = model.play(numbers)
        if self._repeats.layers > 1:
            self.rules["checkpoint"] = model.play(checkpointed(model, self._repeats))
        self.solver = BudgetSolver(model)

    def choose(self, peak: float, seconds: float = 4.0) -> Choice:
        """The cheapest candidate whose simulated peak is at most `peak` bytes.

        Raises:
            PassError: None is; the message names the least peak found.
        """
        candidates = dict(self.rules)
        solved = self.solver.solve(peak, seconds)
        if solved is not None:
            candidates["milp"] = solved
        if self._repeats.layers > 1:
            candidates.update(self._mixes(peak))
        fitting = {name: o for name, o in candidates.items() if o.peak <= peak}
        if not fitting:
            least = min((self.least(seconds), *candidates.values()), key=lambda o: (o.peak, o.extra))
            if least.peak > peak:
                raise PassError(
                    f"a peak of {peak / 2**20:,.1f} MiB is less than this program can do: the least found is "
                    f"{least.peak / 2**20:,.1f} MiB",
                    pass_name="remat",
                    hint=f"ask for peak={least.peak} or more, spread the tokens over more ranks, or cut wide work with "
                    "tile and head-chunk",
                )
            fitting = {"least": least}
        name = min(fitting, key=lambda n: (fitting[n].extra, fitting[n].peak))
        return Choice(name, fitting[name], peak, candidates)

    def least(self, seconds: float = 4.0) -> Outcome:
        """The candidate with the least peak, and of these the cheapest."""
        return min((*self.rules.values(), *self.solver.least(seconds)), key=lambda o: (o.peak, o.extra))

    def _mixes(self, peak: float) -> dict[str, Outcome]:
        """Some layers by a cheap rule and the rest by one with a smaller peak."""
        found: dict[str, Outcome] = {}
        ordered = sorted(self.rules.items(), key=lambda entry: entry[1].extra)
        for a, (cheap_name, cheap) in enumerate(ordered):
            for small_name, small in ordered[a + 1 :]:
                if cheap.peak <= peak or small.peak > peak:
                    continue
                for layers, outcome in mixed(self._model, self._repeats, cheap, small, peak):
                    found[f"{cheap_name} in {layers} layers, {small_name}"] = outcome
        return found


__all__ = ["RULES", "Choice", "Portfolio", "parse_size"]
