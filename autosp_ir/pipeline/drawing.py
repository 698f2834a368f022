"""How the passes of a pipeline draw random numbers."""

from __future__ import annotations

from collections.abc import Iterable

from autosp_ir.comm.random_masks import check_rng
from autosp_ir.pipeline.base import Pass

_OPTION = "rng"


def drawing(passes: Iterable[Pass], rng: str) -> list[Pass]:
    """A pipeline with one way of drawing, where a pass names none of its own.

    Args:
        passes: The passes; they are not changed.
        rng: `per_rank` or `global`.

    Raises:
        UnsupportedError: There is no such way.
    """
    check_rng(rng)
    return [
        type(p)(**(p.options.model_dump() | {_OPTION: rng}))
        if _OPTION in type(p.options).model_fields and _OPTION not in p.options.model_fields_set
        else p
        for p in passes
    ]


__all__ = ["drawing"]
