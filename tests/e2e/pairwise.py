"""Covering arrays: few combinations of factors in which every pair of values of two factors occurs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
_Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Combinations that cover every pair, found greedily; the same ones on every call.

    Args:
        factors: The values of each factor.

    Returns:
        One value per factor each, in the order of `factors`.
    """
    open_pairs = {
        ((a, x), (b, y)): None
        for (a, xs), (b, ys) in itertools.combinations(factors.items(), 2)
        for x in xs
        for y in ys
    }
    cases: list[Case] = []
    while open_pairs:
        seed = next(iter(open_pairs))
        case: Case = dict(seed)
        for name, values in factors.items():
            if name not in case:
                # The value that covers the most open pairs; among equals the one used least so far.
                case[name] = max(values, key=lambda v: (_covers(case, name, v, open_pairs), -_used(cases, name, v)))
        case = {name: case[name] for name in factors}
        for pair in list(_pairs(case)):
            open_pairs.pop(pair, None)
        cases.append(case)
    return cases


def _pairs(case: Case) -> Iterator[_Pair]:
    yield from itertools.combinations(case.items(), 2)


def _covers(case: Case, name: str, value: Any, open_pairs: Mapping[_Pair, None]) -> int:
    mine = (name, value)
    return sum(((other, mine) in open_pairs) + ((mine, other) in open_pairs) for other in case.items())


def _used(cases: list[Case], name: str, value: Any) -> int:
    return sum(case[name] == value for case in cases)
