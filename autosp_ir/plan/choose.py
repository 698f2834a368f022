"""Predictions for every pipeline of the ladder, and the first that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from autosp_ir.analysis.cost import device as device_named
from autosp_ir.analysis.cost import link as link_named
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.program import Program
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.manager import PassManager, PassResult
from autosp_ir.plan.predict import Prediction, predict
from autosp_ir.plan.rungs import rungs

Show = Callable[[str], None]


def plan(
    program: Program,
    mesh: Mapping[str, int],
    passes: Sequence[Pass],
    *,
    axis: str = "sp",
    device: str = "h100",
    link: str = "nvlink4",
    fused: bool = True,
    strict: bool = False,
    host: float = 0.0,
    progress: Show | None = None,
) -> Iterator[tuple[Prediction, PassResult]]:
    """Predict every pipeline of the ladder above `passes`, one at a time: most memory and least time first.

    Args:
        program: A captured program, with a number for its length.
        mesh: Axis sizes.
        passes: The pipeline to start from.
        axis: The mesh axis that shares the sequence.
        device: What computes: h100, h200, a100 or cpu.
        link: What connects the ranks: nvlink4, nvlink3, pcie5, pcie or network-400g.
        fused: Whether a compiler fuses the program, as Inductor does.
        strict: Refuse instead of gathering tokens.
        host: Bytes of host memory that a rank may pin; 0 leaves out the pipelines that use it.
        progress: Told the name of each pipeline before it runs.

    Raises:
        UnsupportedError: The tables do not know the device or link, or the length is a symbol.
    """
    on, over = device_named(device), link_named(link)
    for rung in rungs(passes, tokens_of(program) // mesh.get(axis, 1), device=device, host=host):
        if progress is not None:
            progress(rung.name)
        result = PassManager(list(rung.passes)).run(program, mesh=dict(mesh), strict=strict)
        yield predict(result.program, rung.name, rung.pipeline, on, over, fused), result


def fitting(
    predictions: Iterator[tuple[Prediction, PassResult]], budget: float, *, or_least: bool = False
) -> tuple[Prediction, PassResult]:
    """The first pipeline whose predicted peak is within a budget.

    Args:
        predictions: From `plan`.
        budget: Bytes.
        or_least: Take the one of least peak if none is.

    Raises:
        UnsupportedError: None is, and `or_least` is not given; it names the least peak.
    """
    best: tuple[Prediction, PassResult] | None = None
    for prediction, result in predictions:
        if prediction.peak_bytes <= budget:
            return prediction, result
        if best is None or prediction.peak_bytes < best[0].peak_bytes:
            best = prediction, result
    if best is None:
        raise UnsupportedError("there is no pipeline to choose from", hint="give plan() a pipeline")
    if or_least:
        return best
    least = best[0]
    raise UnsupportedError(
        f"no pipeline keeps a step within {budget / 2**30:.2f} GiB: the least is {least.peak_bytes / 2**30:.2f} GiB "
        f"({least.name}), of which {least.input_bytes / 2**30:.2f} GiB are weights and inputs",
        hint="use more ranks, a shorter sequence, or remat{policy=budget peak=…} in a pipeline of your own",
    )


def tokens_of(program: Program) -> int:
    """The length of a captured sequence, from the inputs that hold it.

    Raises:
        UnsupportedError: It is a symbol.
    """
    dims = dict(program.info.get("seq_dims") or {})
    for spec in program.signature.inputs:
        dim = dims.get(spec.target, dims.get(spec.name))
        if dim is None:
            continue
        extent = program.graph.value(spec.name).tensor_type.shape[dim]
        if isinstance(extent, int):
            return extent
    raise UnsupportedError(
        "the length of the sequence is not a number, so that nothing can be predicted",
        hint="capture with dynamic=False, and with seq_dims if they cannot be inferred",
    )


__all__ = ["fitting", "plan", "tokens_of"]
