"""Several gloo ranks: every rank meets the same error, and none hangs."""

from __future__ import annotations

import pytest

from tests.gloo import run_ranks
from tests.refusals import bodies

pytestmark = pytest.mark.gloo


def check(met: bodies.Met, error: str, *words: str) -> None:
    """Check the class and message that a rank met."""
    name, message = met
    assert name == error, met
    assert not [word for word in (*words, "What you can do: ") if word not in message], message


@pytest.mark.parametrize("what", ["content", "order"])
def test_batches_that_differ_between_ranks(what: str) -> None:
    for first, second in run_ranks(bodies.different_batches, 2, what):
        check(first, "RuntimeMismatchError", "different batches", "labels on rank(s) [1]", "same full batch")
        assert "input_ids" not in first[1]
        # The refused step has not spoilt the next one.
        assert second == ("", "")


@pytest.mark.parametrize("what", ["torch.autocast", "module.training"])
def test_a_rank_that_would_run_another_program(what: str) -> None:
    for found in run_ranks(bodies.different_settings, 2, what):
        check(found, "RuntimeMismatchError", f"settings: {what} on rank(s) [1]", "in the same state")


def test_a_world_of_another_size() -> None:
    for without_mesh, on_mesh in run_ranks(bodies.world_of_another_size, 2):
        check(without_mesh, "RuntimeMismatchError", "'sp': 3", "2 are running")
        check(on_mesh, "RuntimeMismatchError", "3 ranks on 'sp'", "has 2")


def test_a_mesh_without_the_sequence_axis() -> None:
    for named, bare, emitted in run_ranks(bodies.mesh_without_the_axis, 2):
        check(named, "RuntimeMismatchError", "['dp']", "'sp'", "mesh_dim_names")
        check(bare, "RuntimeMismatchError", "without names", "'sp'")
        check(emitted, "RuntimeMismatchError", "['dp']", "'sp'")
