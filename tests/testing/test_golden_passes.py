"""Every built-in pass on one attention block: golden text, counts, equal numbers, and what a second run does."""

from __future__ import annotations

from pathlib import Path

import pytest

import autosp_ir as air
from autosp_ir.ir.text import parse, structurally_equal
from autosp_ir.testing import check_pass

GOLDEN = Path(__file__).parents[1] / "golden"

# Collectives after each pass on the block: q, k, v and the output back; the mean of the loss; nothing before a cut.
LINE = [
    ("canonicalize", "captured", "canonical", {"attention": 1, "scaled_dot_product_attention": 0, "all_to_all": 0}),
    ("pad-tokens", "canonical", "padded", {"index_select": 1, "where.ScalarOther": 1}),
    ("token-partition", "canonical", "partitioned", {"shard": 1, "all_reduce": 1, "invariant_to_replicate": 4}),
    ("ulysses", "partitioned", "ulysses", {"all_to_all": 4, "all_gather": 0}),
    ("ulysses{fuse=qkv}", "partitioned", "ulysses_fused", {"all_to_all": 2, "all_gather": 0}),
    ("head-chunk", "canonical", "head_chunked", {"attention": 4, "chunk": 5, "unchunk": 3}),
    ("tile{chunks=4}", "wide", "wide_tiled", {"chunk": 3, "unchunk": 1}),
    ("differentiate", "ulysses", "joint", {"attention_backward": 1, "all_to_all": 8}),
    ("remat", "joint", "rematerialized", {"all_to_all": 8}),
    ("early-loss-gradient", "wide_rematerialized", "wide_early", {"unchunk": 2, "chunk": 5}),
    ("grad-sync", "rematerialized", "synced", {"all_reduce": 5}),
    ("lower-comm", "synced", "lowered", {"all_to_all_single": 8, "all_reduce": 5, "wait_tensor": 13}),
    ("overlap", "lowered", "overlapped", {"all_to_all_single": 8, "wait_tensor": 13}),
    ("offload{device=cpu smallest=0}", "lowered", "offloaded", {"offload": 1, "reload": 1, "wait_copy": 2}),
]
# Ranks, where they are not four.
_WORLD = {"pad-tokens": 5, "head-chunk": 1, "tile": 1, "early-loss-gradient": 1}
# What a second run of a pass in one pipeline is: the same program, or a refusal before anything runs.
_REPEATABLE = {"canonicalize"}


@pytest.mark.parametrize(("pass_", "before", "after", "expect"), LINE, ids=[case[0] for case in LINE])
def test_pass_on_one_block(pass_: str, before: str, after: str, expect: dict[str, int]) -> None:
    world = _WORLD.get(pass_.partition("{")[0], 4)
    check_pass(
        pass_, before=GOLDEN / f"block_{before}.ir", after=GOLDEN / f"block_{after}.ir", world=world, expect=expect
    )


@pytest.mark.parametrize(("pass_", "before"), [case[:2] for case in LINE], ids=[case[0] for case in LINE])
def test_running_a_pass_twice_changes_nothing_more(pass_: str, before: str) -> None:
    program = parse((GOLDEN / f"block_{before}.ir").read_text())
    mesh = {"sp": _WORLD.get(pass_.partition("{")[0], 4)}
    twice = air.PassManager(f"{pass_},{pass_}")
    if pass_ not in _REPEATABLE:
        with pytest.raises(air.PipelineError, match=pass_.partition("{")[0]):
            twice.run(program, mesh=mesh)
        return
    once = air.PassManager(pass_).run(program, mesh=mesh).program
    assert structurally_equal(once, twice.run(program, mesh=mesh).program) is None


def test_every_built_in_pass_is_here() -> None:
    names = {case[0].partition("{")[0] for case in LINE}
    built_in = {name for name, entry in air.registered_passes().items() if entry.__module__.startswith("autosp_passes")}
    assert built_in == names
