"""Dropout as values: `torch.ops.autosp.random_state` and `torch.ops.autosp.keep_mask`.

A dropout is a state of the generator, a mask that is a pure function of it, and a product. The state is drawn once,
in the forward; a mask may be made again from it, and is the same. So nothing is drawn a second time, whatever a pass
recomputes.

| operator | gives |
|---|---|
| `random_state(after, shape, p, rng)` | the state from which a mask of `shape` is drawn; moves torch's generator on |
| `keep_mask(state, shape, p, rng, index)` | bool `shape`: whether an element is kept, with probability `1 - p` |

`rng="global"`: the state is that of torch's own generator and the mask is the one that torch's dropout draws from it,
so it is the dense model's. A mask of a shard is a slice of it. `rng="per_rank"`: the state is one number from torch's
CPU generator. A mask without `index` is the same on every rank that drew that number; with the rank's `index` on
`axis` it is this rank's own, and stands for the shard `Shard(dim, outer)` of a mask that nobody holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autosp_ir._torch_compat import native_dropout_mask
from autosp_ir.comm.ops import LIBRARY
from autosp_ir.errors import UnsupportedError

GLOBAL, PER_RANK = "global", "per_rank"
RNG_MODES = (PER_RANK, GLOBAL)

# Bytes in which torch's generators keep their state.
_STATE_BYTES = {"cpu": 5056, "cuda": 16}
_WORD = (1 << 64) - 1

SCHEMAS = (
    'random_state(Tensor? after, SymInt[] shape, float p, str rng="global", *, Device device, ScalarType dtype, '
    "bool unread=False) -> Tensor",
    'keep_mask(Tensor state, SymInt[] shape, float p, str rng="global", *, Device device, ScalarType dtype, '
    "Tensor? index=None, str? axis=None, int dim=0, SymInt outer=1) -> Tensor",
)
_TAGS = ((torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded), (torch.Tag.pt2_compliant_tag,))
for _schema, _tags in zip(SCHEMAS, _TAGS, strict=True):
    LIBRARY.define(_schema, tags=_tags)


def check_rng(rng: str) -> None:
    """Refuse a mode of drawing that does not exist.

    Raises:
        UnsupportedError: It is neither `per_rank` nor `global`.
    """
    if rng not in RNG_MODES:
        raise UnsupportedError(f"there is no rng={rng!r}", hint=f"choose one of {', '.join(RNG_MODES)}")


def _state_shape(
    after: Tensor | None, shape: Sequence[int], p: float, rng: str = GLOBAL, *, device: torch.device, **_: Any
) -> Tensor:
    check_rng(rng)
    if rng == PER_RANK:
        return torch.empty((1,), dtype=torch.int64, device="cpu")
    return torch.empty((_state_bytes(device),), dtype=torch.uint8, device="cpu")


def _state_bytes(device: torch.device) -> int:
    found = _STATE_BYTES.get(device.type)
    if found is None:
        raise UnsupportedError(
            f"the masks of dropout on {device.type} cannot be reproduced", hint='use rng="per_rank", or a CPU or CUDA'
        )
    return found


def _random_state(
    after: Tensor | None,
    shape: Sequence[int],
    p: float,
    rng: str = GLOBAL,
    *,
    device: torch.device,
    dtype: torch.dtype,
    unread: bool = False,
) -> Tensor:
    check_rng(rng)
    if rng == PER_RANK:
        return torch.empty((1,), dtype=torch.int64).random_()
    _state_bytes(device)
    state = generator_state(device)
    # How far a draw moves the generator is the kernel's affair, so the draw itself moves it.
    _draw(shape, p, device, dtype)
    return state


def generator_state(device: torch.device) -> Tensor:
    """The state of torch's own generator of a device: uint8, on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _draw(shape: Sequence[int], p: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The mask that torch's dropout draws from torch's own generator."""
    if device.type == "cuda":
        return native_dropout_mask(torch.ones(shape, dtype=dtype, device=device), p)
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - p)


def _mask_shape(
    state: Tensor, shape: Sequence[int], p: float, rng: str = GLOBAL, *, device: torch.device, **_: Any
) -> Tensor:
    check_rng(rng)
    return torch.empty(shape, dtype=torch.bool, device=device)


def _keep_mask(
    state: Tensor,
    shape: Sequence[int],
    p: float,
    rng: str = GLOBAL,
    *,
    device: torch.device,
    dtype: torch.dtype,
    index: Tensor | None = None,
    axis: str | None = None,
    dim: int = 0,
    outer: int = 1,
) -> Tensor:
    check_rng(rng)
    if rng == GLOBAL:
        if index is not None:
            raise UnsupportedError(
                "a mask that the dense model draws has no part of a rank's own",
                hint="cut the whole mask with autosp.shard",
            )
        return _drawn_again(state, shape, p, device, dtype)
    generator = torch.Generator(device)
    generator.manual_seed(_mixed(int(state.item()), 0 if index is None else 1 + int(index.item())))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - p, generator=generator)


def _drawn_again(state: Tensor, shape: Sequence[int], p: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cuda":
        generator = torch.Generator()
        generator.set_state(state)
        return torch.empty(shape, dtype=torch.bool).bernoulli_(1.0 - p, generator=generator)
    # torch's CUDA dropout takes no generator, so its own is set back for the draw.
    current = torch.cuda.get_rng_state(device)
    torch.cuda.set_rng_state(state, device)
    try:
        return _draw(shape, p, device, dtype)
    finally:
        torch.cuda.set_rng_state(current, device)


def _mixed(seed: int, stream: int) -> int:
    """A seed for one of many streams that start from `seed`: the mixing function of SplitMix64."""
    x = (seed + stream * 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


torch.library.register_fake("autosp::random_state", _state_shape, lib=LIBRARY)
torch.library.register_fake("autosp::keep_mask", _mask_shape, lib=LIBRARY)
LIBRARY.impl("random_state", _random_state, "CompositeExplicitAutograd")
LIBRARY.impl("keep_mask", _keep_mask, "CompositeExplicitAutograd")

__all__ = ["GLOBAL", "PER_RANK", "RNG_MODES", "check_rng", "generator_state"]
