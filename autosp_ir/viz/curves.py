"""Memory over one step as a picture: one curve for each pipeline, and the memory there is."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 420, 70, 20, 40
_COLOURS = ("#c23b3b", "#d9822b", "#3b6ea8", "#3f8f5f", "#7a5195", "#444444")
_POINTS = 1500
_GIB = 2**30


def memory_svg(curves: Mapping[str, Sequence[int]], memory: float | None = None) -> str:
    """Draw bytes alive while each operation of a step runs.

    Programs have different numbers of operations, so every curve goes from the first to the last of its own.

    Args:
        curves: Bytes in program order, by name; empty ones are left out.
        memory: Bytes that a device has, drawn as a line.
    """
    drawn = {name: curve for name, curve in curves.items() if curve}
    top = max([memory or 0, *(max(curve) for curve in drawn.values()), 1]) * 1.05
    parts = _frame(top)
    for index, (name, curve) in enumerate(drawn.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = " ".join(f"{_x(share):.1f},{_y(size, top):.1f}" for share, size in _thinned(curve))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f"{html.escape(name)}: {max(curve) / _GIB:.2f} GiB"
        y = _TOP + _HEIGHT + _BOTTOM + 18 * (index + 1)
        parts.append(f'<rect x="{_LEFT}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 20}" y="{y}">{label}</text>')
    if memory is not None:
        there = _y(memory, top)
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{there:.1f}" y2="{there:.1f}" stroke="black" '
                     'stroke-dasharray="6 4"/>')  # fmt: skip
        parts.append(f'<text x="{_LEFT + 6}" y="{there - 5:.1f}">{memory / _GIB:g} GiB</text>')
    height = _TOP + _HEIGHT + _BOTTOM + 18 * (len(drawn) + 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _frame(top: float) -> list[str]:
    bottom = _TOP + _HEIGHT
    parts = [
        f'<line x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}" stroke="black"/>',
        f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{bottom}" y2="{bottom}" stroke="black"/>',
        f'<text x="{_LEFT + _WIDTH / 2}" y="{bottom + 28}" text-anchor="middle">operations of one step</text>',
    ]
    for step in range(5):
        size = top * step / 4
        at = _y(size, top)
        parts.append(f'<line x1="{_LEFT - 4}" x2="{_LEFT}" y1="{at:.1f}" y2="{at:.1f}" stroke="black"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{size / _GIB:.3g} GiB</text>')
    return parts


def _thinned(curve: Sequence[int]) -> list[tuple[float, int]]:
    """Points of a curve, as shares of its length; of neighbours that share a point the highest."""
    step = max(1, -(-len(curve) // _POINTS))
    last = max(len(curve) - 1, 1)
    return [(at / last, max(curve[at : at + step])) for at in range(0, len(curve), step)]


def _x(share: float) -> float:
    return _LEFT + share * _WIDTH


def _y(size: float, top: float) -> float:
    return _TOP + _HEIGHT * (1 - size / top)


__all__ = ["memory_svg"]
