"""The ladder of pipelines: each takes less memory than the one above it, and more time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autosp_ir.errors import PipelineError
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.registry import format_pipeline, get_pass

# A chunk of this many tokens keeps matrix products as fast as the whole, and what its gradient adds to sums small.
_CHUNK_TOKENS = 8192
_MOST_CHUNKS = 32


@dataclass(frozen=True)
class Rung:
    """One pipeline.

    Args:
        name: What is special about it.
        passes: Its passes.
    """

    name: str
    passes: tuple[Pass, ...]

    @property
    def pipeline(self) -> str:
        """Its text."""
        return format_pipeline(list(self.passes))


def rungs(passes: Sequence[Pass], tokens: int) -> list[Rung]:
    """The ladder above a pipeline.

    Args:
        passes: A pipeline with `pad-tokens`, `differentiate` and `remat`, such as the default one of a backend.
        tokens: Tokens on one rank.

    Raises:
        PipelineError: One of those passes is missing.
    """
    names = [p.name for p in passes]
    missing = [n for n in ("pad-tokens", "differentiate", "remat") if n not in names]
    if missing:
        raise PipelineError(
            f"the pipeline has no {', '.join(missing)}, so that there is no frugal form of it",
            hint="use a backend other than eager, or leave the choice of passes out",
        )
    chunks = max(2, min(_MOST_CHUNKS, math.ceil(tokens / _CHUNK_TOKENS)))
    padded = [_with(p, multiple=chunks) if p.name == "pad-tokens" else p for p in passes]
    lean = [_with(p, aggressive=True) if p.name == "remat" else p for p in padded]
    early = _behind(lean, "remat", _made("early-loss-gradient"))
    loss = _before(early, "differentiate", _made("tile", regions="loss", chunks=chunks))
    every = _before(early, "differentiate", _made("tile", chunks=chunks))
    heads = _before(early, "differentiate", _made("head-chunk"), _made("tile", chunks=chunks))
    return [
        Rung("default", tuple(passes)),
        Rung("loss in chunks", tuple(loss)),
        Rung("loss and MLPs in chunks", tuple(every)),
        Rung("loss, MLPs and heads in chunks", tuple(heads)),
    ]


def _made(name: str, **options: Any) -> Pass:
    return get_pass(name)(**options)


def _with(pass_: Pass, **options: Any) -> Pass:
    return type(pass_)(**(pass_.options.model_dump() | options))


def _before(passes: Sequence[Pass], name: str, *new: Pass) -> list[Pass]:
    at = next(i for i, p in enumerate(passes) if p.name == name)
    return [*passes[:at], *new, *passes[at:]]


def _behind(passes: Sequence[Pass], name: str, *new: Pass) -> list[Pass]:
    at = next(i for i, p in enumerate(passes) if p.name == name) + 1
    return [*passes[:at], *new, *passes[at:]]


__all__ = ["Rung", "rungs"]
