"""Layers that repeat: which nodes of a forward stand at the same place of equal layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autosp_passes._remat.model import StepModel

_LEAST_PERIOD = 4


@dataclass(frozen=True)
class Repeats:
    """Equal layers of a model.

    Attributes:
        layers: How many; 1 when nothing repeats.
        place: Node number -> (layer, place in the layer), for nodes of layers.
    """

    layers: int
    place: dict[int, tuple[int, int]]


def find_repeats(model: StepModel) -> Repeats:
    """The longest run of equal layers among the nodes that need no tangent.

    Layers are equal when their operations, types and constants are, in the same order. What is shared between them is a
    decision; whether a decision is allowed is checked for each layer, so a false match costs quality and nothing else.
    """
    chosen = [i for i in range(len(model.nodes)) if not model.dependent[i] and not model.given[i]]
    keys: dict[str, int] = {}
    signature = np.array([keys.setdefault(_signature(model, i), len(keys)) for i in chosen], dtype=np.int64)
    period, start, length = _longest_run(signature)
    layers = length // period + 1 if period else 1
    if layers < 2:
        return Repeats(1, {})
    place = {}
    for offset in range(layers * period):
        place[chosen[start + offset]] = divmod(offset, period)
    return Repeats(layers, place)


def _signature(model: StepModel, i: int) -> str:
    node = model.nodes[i]
    constants = [a for a in node.args if isinstance(a, int | float | str | bool | list | tuple)]
    return f"{node.op.name} {node.phase} {node.result.type if node.results else None} {_numbers(constants)}"


def _numbers(args: Sequence[object]) -> str:
    return repr([a for a in args if not isinstance(a, list | tuple)])


def _longest_run(signature: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[int, int, int]:
    """The period whose shift matches over the longest run, where that run starts, and its length."""
    best = (0, 0, 0)
    for period in range(_LEAST_PERIOD, len(signature) // 2 + 1):
        if len(signature) - period <= best[2]:
            break
        equal = np.concatenate(([False], signature[:-period] == signature[period:], [False]))
        edges = np.flatnonzero(np.diff(equal.astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if len(lengths) and lengths.max() >= period and lengths.max() > best[2]:
            at = int(lengths.argmax())
            best = (period, int(starts[at]), int(lengths[at]))
    return best


__all__ = ["Repeats", "find_repeats"]
