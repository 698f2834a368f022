"""Random pipelines that keep the order which the passes ask for."""

from __future__ import annotations

import random

import autosp_ir as air

_OFFLOAD = "offload{device=cpu host_link=nvlink-c2c smallest=0}"
SIZES = (1, 2, 3, 4, 8)
"""Ranks of the sequence axis."""


def draw_ranks(rng: random.Random) -> int:
    """A size of the sequence axis."""
    return rng.choices(SIZES, (2, 4, 2, 4, 2))[0]


def draw_pipeline(rng: random.Random, ranks: int, *, tokens: bool = True) -> str:
    """A pipeline that starts with `canonicalize` and ends at any stage.

    Args:
        rng: Draws.
        ranks: Size of the sequence axis.
        tokens: Whether the program knows its token dimension, so that it can be padded, cut and tiled.
    """
    front = ["canonicalize", *(_cutting(rng, ranks) if tokens else [])]
    resolved = ranks == 1 or any(p.startswith("ulysses") for p in front) or not tokens
    # Attention over cut tokens can be compared at the forward stage alone.
    if not resolved or rng.random() < 0.1:
        return ",".join(front)
    return ",".join([*front, *_joint(rng)])


def _cutting(rng: random.Random, ranks: int) -> list[str]:
    tile, head = rng.random() < 0.4, rng.random() < 0.3
    chunks = rng.choice(["auto", "auto", 2, 4]) if tile else "auto"
    multiple = 2 * chunks if isinstance(chunks, int) else rng.choice([1, 1, 2, 3])
    passes = [f"pad-tokens{{multiple={multiple}}}" if multiple > 1 else "pad-tokens"]
    if ranks > 1 or rng.random() < 0.5:
        passes.append("token-partition")
        if rng.random() < 0.95:
            passes.append(rng.choice(["ulysses", "ulysses{fuse=qkv}"]))
    elif rng.random() < 0.5 and multiple == 1:
        passes.clear()
    loops = []
    if head:
        loops.append(f"head-chunk{{chunks={rng.choice(['auto', 'auto', 2])} fuse={rng.choice(['none', 'qkv'])}}}")
    if tile:
        regions, wide = rng.choice(["all", "all", "loss", "mlp"]), rng.choice([0.5, 1.0, 1.4, 2.0])
        loop_from = rng.choice(["", " loop_from=2"])
        loops.append(f"tile{{regions={regions} chunks={chunks} wide={wide}{loop_from}}}")
    if rng.random() < 0.7:
        rng.shuffle(loops)
        return [*passes, *loops]
    for loop in loops:
        passes.insert(rng.randint(0, len(passes)), loop)
    return passes


def _joint(rng: random.Random) -> list[str]:
    middle = []
    if rng.random() < 0.8:
        policy = rng.choice(policies())
        budget = f" fraction={rng.choice([0.3, 0.6])}" if policy == "budget" else ""
        middle.append(f"remat{{policy={policy}{budget}}}")
    if rng.random() < 0.8:
        inside = [f"grad-sync{{embeddings={how} bucket={rng.choice([0.0, 0.01])}}}" for how in ("auto", "gather")]
        middle.append(rng.choice([*inside, "grad-sync{mode=external}"]))
    if rng.random() < 0.2:
        rng.shuffle(middle)
    passes = [f"differentiate{{decompose={rng.choice(['true', 'false'])}}}", *middle]
    if rng.random() < 0.8:
        passes.append("lower-comm")
        if rng.random() < 0.5:
            device, stream = rng.choice(["cpu", "h100"]), rng.choice(["shared", "own"])
            passes.append(f"overlap{{device={device} memory=2.0 gradients={stream} exchanges={stream}}}")
    if any(p.startswith("remat") for p in passes) and rng.random() < 0.4:
        behind = next(i for i, p in enumerate(passes) if p.startswith("remat")) + 1
        passes.insert(rng.randint(behind, len(passes)), _OFFLOAD)
    return passes


def policies() -> list[str]:
    """The policies of `remat`."""
    found: list[str] = air.get_pass("remat").Options.model_json_schema()["properties"]["policy"]["enum"]
    return found
