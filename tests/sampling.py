"""Samples of grids: what runs every time, and what runs where long tests do."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int, which: int | Collection[int] = 0) -> list[Any]:
    """The cases, all but some of them marked long.

    Args:
        cases: Arguments of a test, as `pytest.mark.parametrize` takes them.
        every: The cases are counted off in groups of so many.
        which: Of each group, those that run every time.
    """
    found = []
    chosen = {which} if isinstance(which, int) else set(which)
    for place, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = () if place % every in chosen else (pytest.mark.long,)
        found.append(pytest.param(*values, marks=marks))
    return found


__all__ = ["sampled"]
