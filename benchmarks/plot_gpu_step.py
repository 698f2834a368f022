"""Pictures and tables of GPU results: `python -m benchmarks.plot_gpu_step gpu_step.json -o step.svg --markdown`.

The picture needs matplotlib (the extra `viz`), the tables need nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.modes import is_ours
from benchmarks.gpu.summary import Cell, cells, load, markdown

MARKERS = "osD^v<>PX*hd"
DASHES = ("-", "--", "-.", ":")


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw microseconds per token and peak memory against length, all modes, readable in greyscale.

    Args:
        document: Results from `load`.
        path: Where to write; the suffix chooses the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = [cell for cell in cells(document["rows"]) if not cell.error]
    modes = list(dict.fromkeys(cell.mode for cell in found))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, mode in enumerate(modes):
        mine = sorted((cell for cell in found if cell.mode == mode), key=lambda cell: cell.seq)
        style = _style(mode, number)
        _line(left, mine, lambda cell: cell.step_s / cell.seq * 1e6, style, mode)
        _line(right, mine, lambda cell: cell.peak_gib, style, mode)
    lengths = sorted({cell.seq for cell in found})
    for axes, title in ((left, "time per token [µs]"), (right, "peak memory [GiB]")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{seq:,}" for seq in lengths], minor=False)
        axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel("tokens")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
    machine = document["machine"]
    devices = machine.get("devices", [])
    caption = f"{len(devices)} × {devices[0]}" if devices else "unknown machine"
    figure.suptitle(f"One training step, {caption}, torch {machine.get('torch', '?')}", fontsize="medium")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _style(mode: str, number: int) -> dict[str, Any]:
    """Ours in black and thick; peers in greys that also differ by marker and dashes."""
    shape = {"marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)], "markersize": 5}
    if is_ours(mode):
        return shape | {"color": "black", "linewidth": 2.2, "zorder": 3}
    return shape | {"color": str(0.25 + 0.45 * (number % 3) / 2), "linewidth": 1.2, "markerfacecolor": "white"}


def _line(axes: Any, points: Sequence[Cell], value: Callable[[Cell], float], style: dict[str, Any], label: str) -> None:
    axes.plot([cell.seq for cell in points], [value(cell) for cell in points], label=label, **style)


def main() -> None:
    """Read results, draw and print what is asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.plot_gpu_step", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="gpu_step.json of one or more runs")
    parser.add_argument("-o", "--output", type=Path, default=None, help="picture to write, such as step.svg")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    given = parser.parse_args()
    document = load(given.results)
    if given.markdown:
        print(markdown(document), end="")
    if given.output is not None:
        draw(document, given.output)


if __name__ == "__main__":
    main()
