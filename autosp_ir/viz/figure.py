"""One module before and after a pass, one column wide, for a paper; frames and marks tell what colours would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autosp_ir.errors import AutoSPError, UnsupportedError
from autosp_ir.viz.figure_blocks import Box, belongs, boxes_of, statuses
from autosp_ir.viz.figure_drawing import MARKS, Arrow, Drawing, Label, Rect, save_drawing
from autosp_ir.viz.figure_layout import GAP_X, Place, layout
from autosp_ir.viz.matching import compare
from autosp_ir.viz.recording import Recording

COLUMN_INCHES = 3.3
"""Width of a column in the usual two-column templates."""

_FORMATS = (".svg", ".pdf", ".png")
_MOST_BOXES = 60
_TEXT, _SMALL, _LEADING = 6.4, 5.4, 6.6
_BETWEEN, _HEAD = 8.0, 13.0


def draw_figure(
    recording: Recording, *, pass_: str, module: str, path: str | Path, width: float = COLUMN_INCHES
) -> Path:
    """Draw one module before and after a pass.

    What the pass left alone is folded into few boxes. Added boxes have a bold frame and a plus, removed ones a dashed
    frame and a minus, retyped ones a tilde; grey boxes are unchanged.

    Args:
        recording: A recorded run.
        pass_: The pass; the last one of that name.
        module: Module path; submodules are included.
        path: A file ending in `.svg`, or in `.pdf` or `.png`, which need matplotlib.
        width: Inches.

    Returns:
        The path.

    Raises:
        AutoSPError: There is no such pass, no line in the module, or too much for one figure.
        UnsupportedError: The format is unknown, or needs an extra that is not installed.
    """
    target = Path(path)
    if target.suffix not in _FORMATS:
        raise UnsupportedError(
            f"a figure cannot be written as {target.suffix or target.name!r}",
            hint=f"end the path in {', '.join(_FORMATS)}",
        )
    stage = recording.stage_of(pass_)
    if stage == 0:
        raise AutoSPError("the input is no pass", hint="name a pass that ran after it")
    before, after = recording.program(stage - 1), recording.program(stage)
    if not any(belongs(n, module) for n in (*before, *after)):
        known = sorted({n.module for n in after if n.module})
        raise AutoSPError(
            f"no line belongs to the module {module!r}",
            hint=f"the modules are {', '.join(known[:12])}{' …' if len(known) > 12 else ''}",
        )
    made = recording.stages[stage]
    left, right = statuses(compare(before, after, made.matches if made.lines is not None else None))
    sides = [boxes_of(before, module, left), boxes_of(after, module, right)]
    _check_size(sides, module)
    return save_drawing(_draw(sides, f"{module}, before and after {pass_}", width * 72), target)


def _check_size(sides: Sequence[Sequence[Box]], module: str) -> None:
    most = max(len(boxes) for boxes in sides)
    if most > _MOST_BOXES:
        raise AutoSPError(
            f"{module!r} has {most} boxes, which do not fit a column", hint="name a smaller module inside it"
        )


def _draw(sides: Sequence[list[Box]], title: str, width: float) -> Drawing:
    """Both sides, next to each other."""
    column = (width - _BETWEEN) / 2
    drawing = Drawing(width, 0.0, title)
    for number, (boxes, head) in enumerate(zip(sides, ("before", "after"), strict=True)):
        left = number * (column + _BETWEEN)
        places = layout(boxes, left, _HEAD, column, _height)
        drawing.height = max(drawing.height, max((p.y + p.height for p in places), default=0.0) + 2)
        drawing.labels.append(Label(left + column / 2, 7.5, head, 7.0, bold=True))
        for place in places:
            _arrows(drawing, place)
        for place in places:
            if place.box is not None:
                _box(drawing, place, place.box)
    middle = width / 2
    drawing.rules.append((middle, 2.0, middle, drawing.height - 2))
    return drawing


def _height(box: Box) -> float:
    return _LEADING * (1 + len(box.notes)) + (1.0 if box.enters else 4.0)


def _arrows(drawing: Drawing, place: Place) -> None:
    """From what stands above; a waypoint is passed straight through, without a head."""
    for source in place.sources:
        bold = any(p.box is not None and p.box.status == "added" for p in (place, source))
        start = source.y + source.height
        drawing.arrows.append(Arrow(source.x, start, place.x, place.y, bold, head=place.box is not None))
    if place.box is None:
        drawing.arrows.append(Arrow(place.x, place.y, place.x, place.y + place.height, False, head=False))


def _box(drawing: Drawing, place: Place, box: Box) -> None:
    width = place.width - GAP_X
    if not box.enters:
        drawing.rects.append(Rect(place.x - width / 2, place.y, width, place.height, box.status))
    title = f"{MARKS[box.status]} {box.title}".strip()
    y = place.y + (0.0 if box.enters else 1.6)
    for row, text in enumerate((title, *box.notes)):
        size = _SMALL if row or box.enters else _TEXT
        bold = row == 0 and box.status in ("added", "removed")
        baseline = y + _LEADING * (row + 0.8)
        drawing.labels.append(Label(place.x, baseline, text, size, bold, width - 2.0, faint=row > 0))


__all__ = ["COLUMN_INCHES", "draw_figure"]
