"""Samples of grids: what runs every time, and what runs where long tests do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int, first: int = 0) -> list[Any]:
    """The cases, all but some of them marked long.

    Args:
        cases: Arguments of a test, as `pytest.mark.parametrize` takes them.
        every: Of how many cases one runs every time.
        first: The first one that does.
    """
    found = []
    for place, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = () if place % every == first else (pytest.mark.long,)
        found.append(pytest.param(*values, marks=marks))
    return found


__all__ = ["sampled"]
