"""Something goes wrong on one rank: every other rank says which and what within thirty seconds, and none hangs."""

from __future__ import annotations

import pytest

from tests.emit import faulty
from tests.emit.faulty import Case, Ending

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(300)]

CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "dies": (Case(2, 1, "dies"), ("rank 1 has not been heard of", "has died")),
    "dies-between": (Case(2, 1, "dies_between"), ("rank 1 has not been heard of", "has died")),
    "store-dies": (Case(2, 0, "dies"), ("rank 0, which holds the rendezvous store",)),
    "dies-under-ddp": (Case(4, 3, "dies"), ("rank 3 has not been heard of",)),
    "is-stopped": (Case(2, 1, "is_stopped"), ("rank 1 has not been heard of", "stopped")),
    "sleeps": (Case(2, 1, "sleeps"), ("rank 1 has stalled", "after the backward of step 2", "in sleeps")),
    "sleeps-between": (Case(2, 0, "sleeps_between"), ("rank 0 has stalled", "after the forward of step 3")),
    "raises": (Case(2, 1, "raises"), ("rank 1 failed", "ValueError: the loader found no file")),
    "leaves": (Case(2, 1, "leaves"), ("rank 1 has left",)),
    "no-backward": (Case(2, 1, "no_backward"), ("same steps forward and backward",)),
    "no-memory-forward": (Case(2, 1, "no_memory_forward"), ("rank 1 failed in the forward of step 3", "OutOfMemory")),
    "no-memory-backward": (Case(2, 0, "no_memory_backward"), ("rank 0 failed in the backward of", "OutOfMemory")),
    "another-length": (Case(2, 1, "another_length"), ("rank(s) [1]", "did not begin the step", "[1, 12]")),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ending]]:
    return faulty.run_cases({n: case for n, (case, _) in CASES.items()}, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", CASES)
def test_every_other_rank_names_rank_and_cause(name: str, endings: dict[str, list[Ending]]) -> None:
    case, words = CASES[name]
    for rank, ending in enumerate(endings[name]):
        if rank == case.victim:
            continue
        assert ending.code not in (0, None), ending
        assert ending.seconds <= faulty.LIMIT, ending
        assert not [word for word in words if word not in ending.wrote], ending
