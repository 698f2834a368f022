"""What the peak of a step consists of, predicted, beside what was measured: `python -m benchmarks.memory --help`.

Weights, gradients, saved values, work space and the working set of the workload of `benchmarks.gpu_step` on two ranks.
Nothing runs on a device: the model has fake weights. Measured peaks come from result files of `benchmarks.gpu_step`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import autosp_ir as air
from autosp_ir._torch_compat import new_fake_mode
from autosp_ir.analysis.cost import device, link
from autosp_ir.plan.predict import predict
from benchmarks.gpu.ours import resolved
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.workload import build, tokens

_GIB = 2**30
_RANKS = 2
PARTS = {
    "inputs": "weights and batch",
    "gradients": "gradients",
    "saved": "saved",
    "workspace": "attention's work space",
    "working": "working set",
}
MILLION = (
    "canonicalize,pad-tokens{multiple=16},token-partition,ulysses,head-chunk,tile{chunks=16},"
    "differentiate{decompose=true},remat,early-loss-gradient,grad-sync{bucket=auto},lower-comm,"
    "overlap{fused=true device=h200},offload{host=100GiB device=h200}"
)
_LEAN = ("@default", "@loss in chunks, saved values on the host", "@loss and MLPs in chunks, saved values on the host")
CASES = [*((length, name) for length in (65536, 131072) for name in _LEAN), (1048576, MILLION)]
# How the rows of the result files are called.
_MODES = {"@default": "ours", _LEAN[1]: "ours-loss", _LEAN[2]: "ours-host", MILLION: "ours-million"}


def main(
    results: Annotated[list[Path], typer.Argument(help="gpu_step.json of measured rows.")],
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the parts here.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    longest: Annotated[int, typer.Option("--longest", help="Leave longer cases out.")] = 1048576,
) -> None:
    """Print a table of the cases that were measured or can be predicted."""
    measured = {(r["seq"], r["mode"]): r["peak_gib"] for path in results for r in _rows(path)}
    rows = [row_of(*case) for case in CASES if case[0] <= longest]
    for row in rows:
        row["measured_gib"] = measured.get((row["tokens"], row["mode"]))
        parts = "  ".join(f"{PARTS[name]} {size:.2f}" for name, size in row["parts"].items())
        print(
            f"{row['tokens']:9,} {row['mode']:12} {row['peak_gib']:6.2f} GiB, measured {row['measured_gib']}: {parts}"
        )
    if out is not None:
        out.write_text(json.dumps({"ranks": _RANKS, "rows": rows}, indent=1) + "\n")
    if picture is not None:
        draw(rows, picture)


def row_of(length: int, pipeline: str) -> dict[str, Any]:
    """Predict one case.

    Args:
        length: Tokens.
        pipeline: Its text, or `@NAME` of the plan.
    """
    with new_fake_mode():
        model = build(Sizes(), torch.device("cpu"), None)
        ids = tokens(Sizes(), length, torch.device("cpu"))
    text = resolved(pipeline, length // _RANKS, "inductor") or ""
    result = air.PassManager(text).run(air.capture(model, {"input_ids": ids, "labels": ids}), mesh={"sp": _RANKS})
    found = predict(result.program, pipeline, text, device("h200"), link("nvlink4"), fused=True)
    return {
        "tokens": length,
        "mode": _MODES[pipeline],
        "pipeline": text,
        "peak_gib": found.peak_bytes / _GIB,
        "host_gib": found.host_bytes / _GIB,
        "parts": {name: found.at_peak[name] / _GIB for name in PARTS},
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Stacked bars, and a mark where the peak was measured.

    Args:
        rows: From `row_of`, with `measured_gib`.
        path: Where to write; the suffix chooses the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(rows) + 1.6), layout="constrained")
    left = [0.0] * len(rows)
    for number, (name, label) in enumerate(PARTS.items()):
        sizes = [row["parts"][name] for row in rows]
        axes.barh(range(len(rows)), sizes, left=left, color=str(0.2 + 0.16 * number), edgecolor="white", label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, row in enumerate(rows):
        if row["measured_gib"]:
            axes.plot([row["measured_gib"]] * 2, [place - 0.45, place + 0.45], color="#c23b3b", linewidth=2.5)
    axes.plot([], [], color="#c23b3b", linewidth=2.5, label="measured peak")
    axes.set_yticks(range(len(rows)), [f"{row['tokens']:,}  {row['mode']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("GiB on each of two H200")
    figure.legend(loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return [row for row in found if not row.get("error")]


if __name__ == "__main__":
    typer.run(main)
