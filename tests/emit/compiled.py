"""Functions that run on every rank of the Inductor tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch

import autosp_ir as air
from autosp_ir import _torch_compat
from autosp_ir.emit import head_starts, inductor
from autosp_ir.emit.parallelize import default_pipeline
from autosp_ir.emit.pins import pinning_pass
from tests.emit.steps import Measured, largest_error, measure
from tests.emit.written import halves_of
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


OVERLAPPED = "overlap{device=cpu link=network-400g memory=4.0}"
REARRANGED = "overlap{device=h100 link=pcie memory=4.0}"
"""An order of these programs that Inductor does not come upon by itself."""
PIPELINE = "canonicalize,pad-tokens,token-partition,ulysses,differentiate{decompose=true},remat,grad-sync,lower-comm,"


IN_GROUPS = PIPELINE.replace("ulysses,", "ulysses,head-chunk{chunks=2},")
KINDS = {
    "all_to_all_single.default(": "start",
    "all_to_all_single": "start",
    "wait_tensor.default(": "wait",
    "wait_tensor": "wait",
    "extern_kernels.mm(": "product",
    "aten.mm": "product",
    "autosp.attention.default(": "attention",
    "autosp.attention": "attention",
}


@contextmanager
def counted(given: list[torch.device]) -> Iterator[None]:
    """Note the device of every head start."""
    with torch.library._scoped_library("autosp", "IMPL") as library:

        def note(x: torch.Tensor) -> torch.Tensor:
            given.append(x.device)
            return x.view(x.shape)

        library.impl("head_start", note, "CompositeExplicitAutograd", allow_override=True)
        yield


def arranged(name: str) -> list[str]:
    """Exchanges, waits, products and attention of the forward, in the order that `overlap` gave them."""
    model, batch = build(name, length=32)
    program = air.PassManager(IN_GROUPS + REARRANGED).run(air.capture(model, batch), mesh={"sp": 2}).program
    named = [n.op.name.removeprefix("_c10d_functional.") for n in program.graph.nodes if n.phase is air.Phase.FORWARD]
    return [KINDS[each] for each in named if each in KINDS]


def forward_order(rank: int, world: int, name: str, pinned: bool) -> list[str]:
    """The same order in Inductor's code; without pins Inductor is free to move what was arranged."""
    lines = _forward_code(name, pinned).splitlines()
    return [kind for line in lines for mark, kind in KINDS.items() if mark.endswith("(") and mark in line]


def _forward_code(name: str, pinned: bool) -> str:
    with mock.patch.object(inductor, "pinning_pass", pinning_pass if pinned else lambda *_: None):
        return _bodies(name, IN_GROUPS + REARRANGED)[0]


def head_starts_in_code(rank: int, world: int, name: str) -> tuple[list[str], list[str]]:
    """The marks of `KINDS`, and `head start`, of both halves, if every collective on a CPU is worth one."""
    marks = KINDS | {"autosp.head_start.default(": "head start", "attention_backward.default(": "attention"}
    with mock.patch.multiple(head_starts, _FILLED=("cpu",), _WORTH_IT=0):
        bodies = _bodies(name, IN_GROUPS + OVERLAPPED)
    forward, backward = (
        [kind for line in body.splitlines() for mark, kind in marks.items() if mark.endswith("(") and mark in line]
        for body in bodies
    )
    return forward, backward


def head_started_errors(rank: int, world: int, name: str, backend: Literal["aot_eager", "inductor"]) -> Any:
    """Errors of a step with head starts, and how often a rank gave one."""
    model, batch = build(name, length=33, num_hidden_layers=1)
    given: list[torch.device] = []
    with mock.patch.multiple(head_starts, _FILLED=("cpu",), _WORTH_IT=0), counted(given):
        step = air.parallelize(model, batch, backend=backend, pipeline=IN_GROUPS + OVERLAPPED)
        errors = _errors(measure(model, step, batch), measure(model, model, batch))
    return errors, len(given)


def backward_code(rank: int, world: int, name: str) -> str:
    """The body of the code that Inductor generated for the backward."""
    alone = default_pipeline(backend="inductor").replace("bucket=auto", "bucket=0.0")
    return _bodies(name, alone)[1]


def overlapped_gradients(rank: int, world: int, name: str) -> bool:
    """Whether an overlapped step gives bit for bit what the program's own order gives, buckets being equal."""
    model, batch = build(name, length=33)
    plain = PIPELINE.replace("{decompose=true}", "").replace("grad-sync", "grad-sync{bucket=0.01}")
    own = measure(model, air.parallelize(model, batch, pipeline=plain[:-1], backend="aot_eager"), batch)
    own_stream = OVERLAPPED.replace("}", " gradients=own exchanges=own}")
    found = measure(model, air.parallelize(model, batch, pipeline=plain + own_stream, backend="aot_eager"), batch)
    return own[0] == found[0] and all(torch.equal(own[1][n], found[1][n]) for n in own[1])


def _bodies(name: str, pipeline: str | None) -> tuple[str, str]:
    """The calls in the code of both halves."""
    model, batch = build(name, length=32)
    forward, backward = (
        code[code.index("def call(") :].partition("return (")[0] for code in halves_of(model, batch, pipeline)
    )
    return forward, backward
