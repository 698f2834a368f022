"""Do all ranks of a group hold the same batch? Checked before the first step: a wrong answer would be silent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from autosp_ir.errors import RuntimeMismatchError

_PRIME = 1_000_003


def check_same_batch(
    inputs: Mapping[str, Tensor], group: dist.ProcessGroup, axis: str, settings: Mapping[str, str] | None = None
) -> None:
    """Compare a fingerprint of the batch between the ranks of a group.

    Args:
        inputs: The batch's tensors by name.
        group: The ranks that must agree.
        axis: The mesh axis, for the message.
        settings: What else decides which program runs, by name: under `torch.autocast` on one rank alone, ranks would
            run different programs.

    Raises:
        RuntimeMismatchError: On every rank, naming the inputs and ranks that differ.
    """
    if not inputs:
        return
    device = next(iter(inputs.values())).device
    texts = {n: torch.tensor(list(text.encode()), dtype=torch.uint8) for n, text in (settings or {}).items()}
    differing = _differing({**texts, **inputs}, group, device)
    if not differing:
        return
    told = "; ".join(f"{name} on rank(s) {ranks}" for name, ranks in differing.items())
    raise RuntimeMismatchError(
        f"the ranks of axis {axis!r} were given different batches or settings: {told} differ from rank 0",
        hint=f"every rank of one {axis!r} group must pass the same full batch in the same state; "
        "seed the sampler by data-parallel rank",
    )


def check_same_random_state(states: Mapping[str, Tensor], group: dist.ProcessGroup, axis: str) -> None:
    """Compare the states of random generators between the ranks of a group.

    Args:
        states: The state of each generator that ranks must share, by device.
        group: The ranks that must agree.
        axis: The mesh axis, for the message.

    Raises:
        RuntimeMismatchError: On every rank, naming the generators and ranks that differ.
    """
    on_cuda = any(name.startswith("cuda") for name in states)
    differing = _differing(states, group, torch.device("cuda" if on_cuda else "cpu"))
    if not differing:
        return
    told = "; ".join(f"the generator of {name} on rank(s) {ranks}" for name, ranks in differing.items())
    raise RuntimeMismatchError(
        f"the ranks of axis {axis!r} would draw different dropout masks where they must draw the same: {told} "
        "differ from rank 0",
        hint=f"call torch.manual_seed(seed) with one seed on every rank of a {axis!r} group, and draw nothing between "
        "steps on some ranks only",
    )


def _differing(compared: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device) -> dict[str, list[int]]:
    """The names of what differs from rank 0, and on which ranks."""
    names = sorted(compared)
    mine = torch.stack([fingerprint(compared[n]).to(device) for n in names])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return {
        name: ranks
        for i, name in enumerate(names)
        if (ranks := [r for r, prints in enumerate(everyone) if not torch.equal(prints[i], everyone[0][i])])
    }


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 pair `(shape, content)` that differs, but for accident, when shape, dtype or bytes differ."""
    described = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
    shape = 0
    for byte in described:
        shape = (shape * _PRIME + byte) % (1 << 61)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
    # Overflow wraps, which is what a rolling hash wants; weights by position make order count.
    weights = torch.arange(1, raw.numel() + 1, device=raw.device, dtype=torch.int64) * _PRIME + 7
    content = (raw * weights * weights).sum()
    return torch.stack([torch.tensor(shape, device=raw.device), content])
