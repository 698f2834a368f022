"""Where the boxes of a figure stand: in layers, just above their readers; long arrows have lanes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from autosp_ir.viz.figure_blocks import Box

GAP_X, GAP_Y = 3.0, 9.0
_LANE = 5.0
_SWEEPS = 4


@dataclass
class Place:
    """A box in the figure, or a waypoint of an arrow that passes a layer.

    Args:
        box: The box; None for a waypoint.
        layer: Its layer.
        sources: What it is drawn below.
        readers: What is drawn below it.
        x: Its middle.
        y: Its top.
        width: Its width.
        height: Its height.
    """

    box: Box | None
    layer: int
    sources: list[Place] = field(default_factory=list)
    readers: list[Place] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0


def layout(
    boxes: Sequence[Box], left: float, top: float, width: float, height_of: Callable[[Box], float]
) -> list[Place]:
    """Place boxes in a column.

    Args:
        boxes: Sources first.
        left: Left edge of the column.
        top: Its top.
        width: Its width.
        height_of: Height of a box.
    """
    layers = _layers(boxes)
    for _ in range(_SWEEPS):
        _sort(layers[1:], lambda p: p.sources, layers)
        _sort(layers[-2::-1], lambda p: p.readers, layers)
    _size(layers, width)
    y = top
    for layer in layers:
        height = max((height_of(p.box) for p in layer if p.box is not None), default=0.0)
        for place in layer:
            place.height = height_of(place.box) if place.box is not None else height
            place.y = y + height - place.height
        y += height + GAP_Y
    for layer in layers:
        _spread(layer, [_mean((s.x for s in p.sources), left + width / 2) for p in layer], left, width)
    for layer in layers[-2::-1]:
        _spread(layer, [_mean((r.x for r in p.readers), p.x) for p in layer], left, width)
    return [place for layer in layers for place in layer]


def _layers(boxes: Sequence[Box]) -> list[list[Place]]:
    """Every box in the last layer that is above all its readers; arrows over several layers get waypoints."""
    below: dict[int, int] = {}
    for box in reversed(boxes):
        below.setdefault(id(box), 0)
        for source in box.sources:
            below[id(source)] = max(below.get(id(source), 0), below[id(box)] + 1)
    depth = max(below.values(), default=0)
    places = {id(b): Place(b, depth - below[id(b)]) for b in boxes}
    layers: list[list[Place]] = [[] for _ in range(depth + 1)]
    for place in places.values():
        layers[place.layer].append(place)
    for box in boxes:
        lane: dict[int, Place] = {}
        start = places[id(box)]
        for reader in (places[id(b)] for b in boxes if any(s is box for s in b.sources)):
            above = start
            for level in range(start.layer + 1, reader.layer):
                if level not in lane:
                    lane[level] = Place(None, level)
                    layers[level].append(lane[level])
                    _join(above, lane[level])
                above = lane[level]
            _join(above, reader)
    return layers


def _join(above: Place, below: Place) -> None:
    above.readers.append(below)
    below.sources.append(above)


def _sort(
    some: Sequence[list[Place]], neighbours: Callable[[Place], Sequence[Place]], layers: Sequence[list[Place]]
) -> None:
    """Order each layer by where its neighbours stand."""
    for layer in some:
        at = {id(p): n / max(1, len(row)) for row in layers for n, p in enumerate(row)}
        layer.sort(key=lambda p: _mean((at[id(n)] for n in neighbours(p)), at[id(p)]))


def _size(layers: Sequence[list[Place]], width: float) -> None:
    rooms = []
    for layer in layers:
        lanes = sum(p.box is None for p in layer)
        rooms.append((width - _LANE * lanes, len(layer) - lanes))
    slot = min((room / count for room, count in rooms if count), default=width)
    for layer, (room, count) in zip(layers, rooms, strict=True):
        for place in layer:
            wide = min(room, slot * 2) if count == 1 else slot
            place.width = _LANE if place.box is None else wide


def _spread(layer: Sequence[Place], wanted: Sequence[float], left: float, width: float) -> None:
    """Put a layer's places near where they want to be, in order and inside the column."""
    edge = left
    for place, x in zip(layer, wanted, strict=True):
        place.x = max(x, edge + place.width / 2)
        edge = place.x + place.width / 2
    limit = left + width
    for place in reversed(layer):
        place.x = min(place.x, limit - place.width / 2)
        limit = place.x - place.width / 2


def _mean(numbers: Iterable[float], default: float) -> float:
    found = list(numbers)
    return sum(found) / len(found) if found else default


__all__ = ["GAP_X", "GAP_Y", "Place", "layout"]
