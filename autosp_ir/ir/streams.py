"""Names of communication streams: a mesh axis, or a further stream over the same ranks.

A collective runs in the stream that it names. Those of one stream run one after the other, those of different streams
beside each other: `sp` and `sp:gradients` connect the same ranks through two process groups.
"""

from __future__ import annotations

SEPARATOR = ":"


def stream(axis: str, purpose: str) -> str:
    """The name of a further stream over the ranks of a mesh axis."""
    return f"{axis}{SEPARATOR}{purpose}"


def mesh_axis(name: str) -> str:
    """The mesh axis whose ranks a stream connects."""
    return name.split(SEPARATOR, 1)[0]


__all__ = ["SEPARATOR", "mesh_axis", "stream"]
