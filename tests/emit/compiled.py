"""Functions that run on every rank of the Inductor tests."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._inductor.codecache import PyCodeCache

import autosp_ir as air
from autosp_ir import _torch_compat
from autosp_ir.emit import inductor
from tests.emit.steps import Measured, largest_error, loss_of, measure
from tests.models import build


class Compiled(NamedTuple):
    """What one rank measured.

    Args:
        errors: Relative loss error and largest gradient error of each batch.
        compiled: How many graphs had been compiled after each batch.
    """

    errors: list[tuple[float, float]]
    compiled: list[int]


def two_batches(rank: int, world: int, name: str) -> Compiled:
    """Train one layer on two batches of one shape."""
    with mock.patch.object(inductor, "compile_with_inductor", wraps=_torch_compat.compile_with_inductor) as compiler:
        model, batch = build(name, length=33, num_hidden_layers=1)
        step = air.parallelize(model, batch, backend="inductor")
        found = Compiled([], [])
        for seed in range(2):
            torch.manual_seed(seed)
            other = {k: v if seed == 0 else v.roll(seed, 0).flip(-1) if v.ndim > 1 else v for k, v in batch.items()}
            found.errors.append(_errors(measure(model, step, other), measure(model, model, other)))
            found.compiled.append(compiler.call_count)
    return found


def _errors(found: Measured, expected: Measured) -> tuple[float, float]:
    return abs(found[0] - expected[0]) / abs(expected[0]), largest_error(found[1], expected[1])


def backward_code(rank: int, world: int, name: str) -> str:
    """The body of the code that Inductor generated for the backward."""
    written: list[str] = []
    inner = PyCodeCache.write

    def write(source: str, *args: Any, **kwargs: Any) -> Any:
        written.append(source)
        return inner(source, *args, **kwargs)

    model, batch = build(name, length=32)
    with mock.patch.object(PyCodeCache, "write", write), torch._inductor.config.patch(fx_graph_cache=False):
        step = air.parallelize(model, batch, backend="inductor")
        loss_of(step(**batch)).backward()
    code = next(c for c in written if "attention_backward" in c)
    return code[code.index("def call(") :].partition("return (")[0]
