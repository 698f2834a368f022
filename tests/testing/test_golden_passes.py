"""The forward passes on one attention block, each against its golden file, in text, counts and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosp_ir.testing import check_pass

GOLDEN = Path(__file__).parents[1] / "golden"

# Collectives after each pass on the block: q, k, v and the output back; the mean of the loss; nothing before a cut.
LINE = [
    ("canonicalize", "captured", "canonical", {"attention": 1, "scaled_dot_product_attention": 0, "all_to_all": 0}),
    ("pad-tokens", "canonical", "padded", {"index_select": 1, "where.ScalarOther": 1}),
    ("token-partition", "canonical", "partitioned", {"shard": 1, "all_reduce": 1, "invariant_to_replicate": 4}),
    ("ulysses", "partitioned", "ulysses", {"all_to_all": 4, "all_gather": 0}),
    ("ulysses{fuse=qkv}", "partitioned", "ulysses_fused", {"all_to_all": 2, "all_gather": 0}),
]


@pytest.mark.parametrize(("pass_", "before", "after", "expect"), LINE, ids=[case[0] for case in LINE])
def test_pass_on_one_block(pass_: str, before: str, after: str, expect: dict[str, int]) -> None:
    world = 5 if pass_ == "pad-tokens" else 4
    check_pass(
        pass_, before=GOLDEN / f"block_{before}.ir", after=GOLDEN / f"block_{after}.ir", world=world, expect=expect
    )
