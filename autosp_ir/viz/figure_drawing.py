"""A drawing of boxes, arrows and text, written as SVG by hand or as PDF and PNG through matplotlib."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from autosp_ir.errors import UnsupportedError
from autosp_ir.viz.figure_blocks import Status

# Fill, frame, frame width, dash; told apart by frame and mark alone when the colours are gone.
_STYLES: dict[Status, tuple[str, str, float, tuple[float, float] | None]] = {
    "same": ("#f5f5f5", "#9a9a9a", 0.5, None),
    "changed": ("#fdf0c4", "#6f5200", 0.8, None),
    "removed": ("#fbdcd8", "#8f1d14", 0.9, (2.2, 1.4)),
    "added": ("#d5efdb", "#0d5523", 1.4, None),
}
MARKS: dict[Status, str] = {"same": "", "changed": "~", "removed": "−", "added": "+"}
"""What stands in front of a title."""

_CHARACTER = 0.56
"""Average width of a sans-serif character, in ems; wide enough for DejaVu Sans."""


@dataclass
class Rect:
    """A box; its status gives frame, fill and mark."""

    x: float
    y: float
    width: float
    height: float
    status: Status


@dataclass
class Arrow:
    """From the bottom of one box to the top of another; without a head it goes on."""

    x0: float
    y0: float
    x1: float
    y1: float
    bold: bool
    head: bool = True

    @property
    def end(self) -> float:
        """Where the line ends and the head begins."""
        return self.y1 - 2.5 if self.head else self.y1


@dataclass
class Label:
    """Centred text; `y` is its baseline. Text wider than `room` is set smaller, then cut."""

    x: float
    y: float
    text: str
    size: float
    bold: bool = False
    room: float = 1e9
    faint: bool = False

    def fitted(self) -> tuple[str, float]:
        """The text and size that fit."""
        width = len(self.text) * self.size * _CHARACTER
        size = max(self.size * min(1.0, self.room / width), self.size * 0.72) if self.text else self.size
        most = max(3, int(self.room / (size * _CHARACTER)))
        return (self.text if len(self.text) <= most else f"{self.text[: most - 1]}…"), size


@dataclass
class Drawing:
    """Everything to draw, in points from the top left."""

    width: float
    height: float
    title: str
    rects: list[Rect] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    rules: list[tuple[float, float, float, float]] = field(default_factory=list)


def save_drawing(drawing: Drawing, path: Path) -> Path:
    """Write the drawing in the format that the path ends in.

    Raises:
        UnsupportedError: It is not SVG, and matplotlib is not installed.
    """
    if path.suffix == ".svg":
        path.write_text(to_svg(drawing), encoding="utf-8")
    elif importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            f"matplotlib is not installed, so no {path.suffix} can be written",
            hint="pip install 'autosp-ir[viz]', or end the path in .svg, which needs nothing",
        )
    else:
        _save_with_matplotlib(drawing, path)
    return path


def to_svg(drawing: Drawing) -> str:
    """The drawing as SVG."""
    return "\n".join(_svg_lines(drawing)) + "\n"


def _svg_lines(drawing: Drawing) -> Iterator[str]:
    size = f'width="{drawing.width / 72:.3f}in" height="{drawing.height / 72:.3f}in"'
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {drawing.width:.1f} {drawing.height:.1f}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">'
    )
    yield f"<title>{html.escape(drawing.title)}</title>"
    yield f'<rect width="{drawing.width:.1f}" height="{drawing.height:.1f}" fill="white"/>'
    for x0, y0, x1, y1 in drawing.rules:
        yield f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#bbbbbb" stroke-width="0.5"/>'
    for arrow in drawing.arrows:
        stroke = f'stroke="#333333" stroke-width="{1.0 if arrow.bold else 0.55}"'
        x0, y0, x1, y1 = arrow.x0, arrow.y0, arrow.x1, arrow.end
        middle = (y0 + y1) / 2
        curve = f"M{x0:.1f} {y0:.1f}C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
        yield f'<path d="{curve}" fill="none" {stroke}/>'
        if arrow.head:
            yield f'<path d="M{x1 - 1.6:.1f} {y1:.1f}h3.2l-1.6 2.5z" fill="#333333"/>'
    for rect in drawing.rects:
        fill, frame, width, dash = _STYLES[rect.status]
        dashes = f' stroke-dasharray="{dash[0]} {dash[1]}"' if dash else ""
        place = f'x="{rect.x:.1f}" y="{rect.y:.1f}" width="{rect.width:.1f}" height="{rect.height:.1f}"'
        yield f'<rect {place} rx="2" fill="{fill}" stroke="{frame}" stroke-width="{width}"{dashes}/>'
    for label in drawing.labels:
        text, points = label.fitted()
        weight = ' font-weight="bold"' if label.bold else ""
        fill = ' fill="#333333"' if label.faint else ""
        place = f'x="{label.x:.1f}" y="{label.y:.1f}" font-size="{points:.2f}"'
        yield f"<text {place}{weight}{fill}>{html.escape(text)}</text>"
    yield "</svg>"


def _save_with_matplotlib(drawing: Drawing, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Curve

    figure = Figure(figsize=(drawing.width / 72, drawing.height / 72))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    for x0, y0, x1, y1 in drawing.rules:
        axes.plot([x0, x1], [y0, y1], color="#bbbbbb", linewidth=0.5)
    for arrow in drawing.arrows:
        end = arrow.end
        middle = (arrow.y0 + end) / 2
        points = [(arrow.x0, arrow.y0), (arrow.x0, middle), (arrow.x1, middle), (arrow.x1, end)]
        curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        axes.add_patch(PathPatch(curve, fill=False, edgecolor="#333333", linewidth=1.0 if arrow.bold else 0.55))
        if not arrow.head:
            continue
        tip = [(arrow.x1 - 1.6, end), (arrow.x1 + 1.6, end), (arrow.x1, arrow.y1)]
        axes.add_patch(Polygon(tip, closed=True, facecolor="#333333", linewidth=0))
    for rect in drawing.rects:
        fill, frame, width, dash = _STYLES[rect.status]
        style = (0, dash) if dash else "solid"
        shape = FancyBboxPatch(
            (rect.x, rect.y),
            rect.width,
            rect.height,
            boxstyle="round,pad=0,rounding_size=2",
            facecolor=fill,
            edgecolor=frame,
            linewidth=width,
            linestyle=style,
        )
        axes.add_patch(shape)
    for label in drawing.labels:
        text, points_size = label.fitted()
        weight = "bold" if label.bold else "normal"
        colour = "#333333" if label.faint else "black"
        # `$` would start a formula.
        shown = text.replace("$", r"\$")
        axes.text(label.x, label.y, shown, fontsize=points_size, fontweight=weight, color=colour, ha="center")
    # Text stays text in a PDF, and the file is the same in every run.
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
    figure.savefig(path, dpi=300, metadata=metadata)


__all__ = ["Arrow", "Drawing", "Label", "Rect", "save_drawing", "to_svg"]
