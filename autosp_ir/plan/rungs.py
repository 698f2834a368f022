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


def rungs(passes: Sequence[Pass], tokens: int, *, device: str = "h100", host: float = 0.0) -> list[Rung]:
    """The ladder above a pipeline.

    Where activations may wait in host memory, only what is cheap is computed again: the copies hide under compute, and
    what is recomputed does not.

    Args:
        passes: A pipeline with `pad-tokens`, `differentiate` and `remat`, such as the default one of a backend.
        tokens: Tokens on one rank.
        device: What computes, for the estimate of what hides.
        host: Bytes of host memory that a rank may pin.

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
    loss, every = _made("tile", regions="loss", chunks=chunks), _made("tile", chunks=chunks)
    offload = _made("offload", device=device, host=int(host))
    shapes = {
        "loss in chunks": [loss],
        "loss and MLPs in chunks": [every],
        "loss, MLPs and heads in chunks": [_made("head-chunk"), every],
    }
    found = [Rung("default", tuple(passes))]
    for name, cuts in shapes.items():
        # A pipeline that cuts heads for time cuts them for memory here.
        own = {c.name for c in cuts}
        kept = [p for p in padded if p.name not in own]
        cut = _behind(_before(kept, "differentiate", *cuts), "remat", _made("early-loss-gradient"))
        lean = [_with(p, aggressive=True) if p.name == "remat" else p for p in cut]
        if host:
            # Memory that an order takes beside saved values is memory that they leave free once they are gone.
            tight = [_with(p, memory=1.0) if p.name == "overlap" else p for p in cut]
            found.append(Rung(f"{name}, saved values on the host", (*tight, offload)))
        found.append(Rung(name, tuple(lean)))
    return found


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
