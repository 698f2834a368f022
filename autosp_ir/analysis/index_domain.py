"""Values that are known as functions of their index: the small algebra behind mask recognition.

Masks are built from positions: `arange(S)[:, None] >= arange(S)[None, :]`. Such a value is described exactly by how
it depends on its index, whatever the length: an affine number, a conjunction of linear inequalities, or a choice
between two numbers by such a conjunction. What does not fit is unknown, and nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy

from autosp_ir.ir.types import Dim

Number: TypeAlias = int | float | sympy.Expr


def sign(number: Number) -> int | None:
    """1 when certainly non-negative, -1 when certainly negative, None when unknown."""
    if isinstance(number, int | float):
        return 1 if number >= 0 else -1
    if number.is_nonnegative:
        return 1
    return -1 if number.is_negative else None


@dataclass(frozen=True)
class Affine:
    """A number `sum(coefficients[d] * index[d]) + constant`; dimensions of extent 1 have coefficient 0."""

    coefficients: tuple[int, ...]
    constant: Number = 0

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same at every index."""
        return not any(self.coefficients)

    def __sub__(self, other: Affine) -> Affine:
        return combine(self, other, lambda a, b: a - b)

    def __add__(self, other: Affine) -> Affine:
        return combine(self, other, lambda a, b: a + b)

    def scaled(self, factor: int) -> Affine:
        """The value times an integer."""
        return Affine(tuple(c * factor for c in self.coefficients), self.constant * factor)

    def substitute(self, indices: Sequence[Affine]) -> Affine:
        """The value at an index that is itself affine in new index variables."""
        rank = len(indices[0].coefficients) if indices else 0
        result = Affine((0,) * rank, self.constant)
        for coefficient, index in zip(self.coefficients, indices, strict=True):
            result = result + index.scaled(coefficient)
        return result

    def bounds(self, shape: Sequence[Dim]) -> tuple[Number, Number]:
        """Smallest and largest value over every index of `shape`."""
        low: Number = self.constant
        high: Number = self.constant
        for coefficient, extent in zip(self.coefficients, shape, strict=True):
            if coefficient > 0:
                high = high + coefficient * (extent - 1)
            elif coefficient < 0:
                low = low + coefficient * (extent - 1)
        return low, high


@dataclass(frozen=True)
class Condition:
    """A truth value: every one of `at_least_zero` is `>= 0`. No constraint is True; None is False."""

    at_least_zero: frozenset[Affine] | None

    @property
    def always(self) -> bool:
        """Whether it holds at every index."""
        return self.at_least_zero is not None and not self.at_least_zero

    @property
    def never(self) -> bool:
        """Whether it holds at no index."""
        return self.at_least_zero is None

    def both(self, other: Condition) -> Condition:
        """Conjunction."""
        if self.at_least_zero is None or other.at_least_zero is None:
            return NEVER
        return Condition(self.at_least_zero | other.at_least_zero)

    def either(self, other: Condition) -> Condition | None:
        """Disjunction, where it is a conjunction again."""
        for one, two in ((self, other), (other, self)):
            if one.always or two.never:
                return one
        if self.at_least_zero is None or other.at_least_zero is None:
            return NEVER
        if self.at_least_zero <= other.at_least_zero:
            return self
        return other if other.at_least_zero <= self.at_least_zero else None

    def negated(self) -> Condition | None:
        """Negation, where it is a conjunction again: of at most one inequality between integers."""
        if self.at_least_zero is None:
            return ALWAYS
        if not self.at_least_zero:
            return NEVER
        if len(self.at_least_zero) > 1:
            return None
        (only,) = self.at_least_zero
        return Condition(frozenset({Affine(tuple(-c for c in only.coefficients), -only.constant - 1)}))


@dataclass(frozen=True)
class Choice:
    """`then` where the condition holds, `otherwise` elsewhere."""

    condition: Condition
    then: Number
    otherwise: Number

    def map(self, fn: Callable[[Number], Number]) -> Choice:
        """Apply a function to both numbers."""
        return Choice(self.condition, fn(self.then), fn(self.otherwise))


ALWAYS = Condition(frozenset())
NEVER = Condition(None)
IndexValue = Affine | Condition | Choice
"""What is known of a value; None stands for nothing."""


def combine(a: Affine, b: Affine, fn: Callable[[Number, Number], Number]) -> Affine:
    """Add or subtract two affine values, aligned at the last dimension as broadcasting does."""
    rank = max(len(a.coefficients), len(b.coefficients))
    left, right = aligned(a, rank), aligned(b, rank)
    coefficients = tuple(int(fn(x, y)) for x, y in zip(left.coefficients, right.coefficients, strict=True))
    constant = fn(left.constant, right.constant)
    return Affine(coefficients, sympy.expand(constant) if isinstance(constant, sympy.Expr) else constant)


def aligned(value: Affine, rank: int) -> Affine:
    """The value broadcast to a higher rank."""
    return Affine((0,) * (rank - len(value.coefficients)) + value.coefficients, value.constant)


def all_hold(constraints: Iterable[Affine], shape: Sequence[Dim]) -> Condition:
    """The conjunction of `constraint >= 0` over a shape: what always holds is dropped, what never holds decides."""
    kept: set[Affine] = set()
    for constraint in constraints:
        low, high = aligned(constraint, len(shape)).bounds(shape)
        if sign(high) == -1:
            return NEVER
        if sign(low) != 1:
            kept.add(aligned(constraint, len(shape)))
    return Condition(frozenset(kept))


def rearranged(value: IndexValue, fn: Callable[[Affine], Affine]) -> IndexValue:
    """Apply a change of index variables to every affine part."""
    if isinstance(value, Affine):
        return fn(value)
    if isinstance(value, Choice):
        condition = rearranged(value.condition, fn)
        return Choice(condition, value.then, value.otherwise) if isinstance(condition, Condition) else value
    if value.at_least_zero is None:
        return value
    return Condition(frozenset(fn(c) for c in value.at_least_zero))


__all__ = [
    "ALWAYS",
    "NEVER",
    "Affine",
    "Choice",
    "Condition",
    "IndexValue",
    "Number",
    "aligned",
    "all_hold",
    "combine",
    "rearranged",
    "sign",
]
