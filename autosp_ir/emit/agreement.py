"""Do all ranks of a group begin the same step? A wrong answer would be silent, or a wait for ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autosp_ir.errors import RuntimeMismatchError

_PRIME = 1_000_003
_CHUNK = 1 << 22
_NAMED = 4
_REFUSED = "refused"

Told = dict[str, tuple[str, int | None]]
"""What a rank tells of its step, by name: a description that all must share, and a fingerprint of bytes, if taken."""


def describe(tensors: Mapping[str, Tensor], content: bool, prefix: str = "") -> Told:
    """Shapes and dtypes, and with `content` a fingerprint of the bytes, which waits for the device.

    Args:
        tensors: By name.
        content: Whether bytes count.
        prefix: Put in front of each name.
    """
    prints: Sequence[int | None] = [None] * len(tensors)
    if content and tensors:
        device = next(iter(tensors.values())).device
        prints = torch.stack([fingerprint(t).to(device) for t in tensors.values()]).tolist()
    return {
        prefix + name: (f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}", found)
        for (name, tensor), found in zip(tensors.items(), prints, strict=True)
    }


def refusal(error: BaseException) -> Told:
    """What a rank tells that does not begin the step."""
    reason = getattr(error, "reason", None) or str(error)
    return {_REFUSED: (f"{type(error).__name__}: {reason}", None)}


def encoded(told: Told) -> str:
    """As text for the others."""
    return json.dumps(told)


def check_agreement(axis: str, everyone: Sequence[str]) -> None:
    """Compare what the ranks of a group have told.

    Args:
        axis: The mesh axis, for the message.
        everyone: The ranks' texts, from `encoded`, in the order of the group.

    Raises:
        RuntimeMismatchError: On every rank, naming what differs and on which ranks, or who does not begin the step.
    """
    if len(set(everyone)) == 1 and _REFUSED not in json.loads(everyone[0]):
        return
    ranks: list[Told] = [json.loads(text) for text in everyone]
    refused = {r: told[_REFUSED][0] for r, told in enumerate(ranks) if _REFUSED in told}
    if refused:
        rank, reason = next(iter(refused.items()))
        raise RuntimeMismatchError(
            f"rank(s) {list(refused)} of axis {axis!r} did not begin the step; rank {rank}: {reason}",
            hint="see the error of that rank; every rank must pass the same full batch in the same state",
        )
    # Another batch or setting makes another program: the cause comes first.
    names = sorted({name for told in ranks for name in told}, key=lambda name: (name == PROGRAM, name))
    differing = [text for name in names if (text := _difference(name, ranks))]
    if not differing:
        return
    more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    told = "; ".join(differing[:_NAMED]) + more
    raise RuntimeMismatchError(
        f"the ranks of axis {axis!r} were given different batches or settings: {told} differ from rank 0",
        hint=_hint(axis, differing),
    )


def _difference(name: str, ranks: Sequence[Told]) -> str | None:
    """Which ranks differ from the first in something, and how if words can say it."""
    if name.startswith(PARAMETER) and not all(name in told for told in ranks):
        return None
    texts = [told[name][0] if name in told else "absent" for told in ranks]
    prints = [told[name][1] if name in told else None for told in ranks]
    others = [r for r, text in enumerate(texts) if text != texts[0]]
    if others:
        return f"{name} on rank(s) {others} ({texts[others[0]]}, not {texts[0]})"
    bytes_differ = [r for r, p in enumerate(prints) if p is not None and prints[0] is not None and p != prints[0]]
    return f"{name} on rank(s) {bytes_differ}" if bytes_differ else None


def _hint(axis: str, differing: Sequence[str]) -> str:
    if all(text.startswith(GENERATOR) for text in differing):
        return (
            "they would draw different dropout masks where they must draw the same: call torch.manual_seed(seed) with "
            f"one seed on every rank of a {axis!r} group, and draw nothing between steps on some ranks only"
        )
    if all(text.startswith(PROGRAM) for text in differing):
        return (
            f"every rank of one {axis!r} group must run the same programs in the same order, built with the same "
            "pipeline and settings"
        )
    if all(text.startswith(PARAMETER) for text in differing):
        return (
            "give every rank the same weights before its first step: seed before building, or load or broadcast them; "
            f'with grad_sync="external", gradients have to be averaged over the ranks of {axis!r} too'
        )
    return (
        f"every rank of one {axis!r} group must pass the same full batch in the same state; "
        "seed the sampler by data-parallel rank"
    )


PROGRAM = "the program"
"""Names the program itself; no input can be called so."""

GENERATOR = "the generator of "
"""In front of the devices of random generators."""

PARAMETER = "parameter "
"""In front of the names of parameters."""


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 that differs, but for accident, when bytes differ or change places; on the tensor's device."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % 4 or raw.storage_offset() % 4:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)])
    words = raw.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    # In pieces: the products take four times the memory of what they are made from.
    for start, piece in enumerate(words.split(_CHUNK)):
        places = torch.arange(start * _CHUNK + 1, start * _CHUNK + 1 + piece.numel(), device=raw.device) * _PRIME + 7
        # Overflow wraps, which is what a rolling hash wants; weights by position make order count.
        total += (piece.to(torch.int64) * places * places).sum()
    return total


__all__ = [
    "GENERATOR",
    "PARAMETER",
    "PROGRAM",
    "Told",
    "check_agreement",
    "describe",
    "encoded",
    "fingerprint",
    "refusal",
]
