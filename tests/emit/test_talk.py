"""Exchanges through a store: counted where all tell the same, read where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist

from autosp_ir.emit.talk import Meeting, Talk

RANKS = (0, 3, 4)


def _store() -> Any:
    distributed: Any = dist  # whose stub lacks the store
    return distributed.HashStore()


def _talks(told: Sequence[str], store: Any = None) -> list[Talk]:
    store = store or _store()
    return [Talk(store, "line/7", RANKS, rank, text) for rank, text in zip(RANKS, told, strict=True)]


def test_the_last_to_come_with_the_same_text_learns_it_in_one_call_and_the_others_when_they_ask() -> None:
    first, second, last = _talks(["same"] * 3)
    assert not first.all_came() and not second.all_came() and not first.all_came(), "asking is not coming"
    assert last.all_came() and first.all_came() and second.all_came()


@pytest.mark.parametrize("odd", range(3))
def test_ranks_that_tell_something_else_are_never_counted_in(odd: int) -> None:
    told = ["same"] * 3
    told[odd] = "other"
    talks = _talks(told)
    assert not any(talk.all_came() for _ in range(3) for talk in talks)
    assert [talk.texts() for talk in talks][:2] == [None, None], "one is missing"
    assert [talk.texts() for talk in talks] == [told] * 3


def test_who_publishes_out_of_impatience_learns_of_a_late_rank_that_does_not() -> None:
    early, earlier, late = _talks(["same"] * 3)
    for talk in (early, earlier):
        assert not talk.all_came()
        assert talk.texts() is None
    assert late.all_came(), "it need not publish"
    assert early.all_came() and earlier.all_came()


def test_exchanges_do_not_mix() -> None:
    store = _store()
    assert [t.all_came() for t in _talks(["same"] * 3, store)] == [False, False, True]
    again = [Talk(store, "line/8", RANKS, rank, "same") for rank in RANKS]
    assert [t.all_came() for t in again] == [False, False, True]


def test_a_call_that_fails_after_it_counted_is_not_made_again() -> None:
    class Failing:
        """A store whose first answer is lost."""

        def __init__(self) -> None:
            self.count, self.calls = 0, 0

        def add(self, _: str, amount: int) -> int:
            self.count += amount
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("Socket Timeout")
            return self.count

        def get(self, _: str) -> bytes:
            return str(self.count).encode()

    store: Any = Failing()
    first, second, _ = _talks(["same"] * 3, store)
    with pytest.raises(RuntimeError, match="Timeout"):
        first.all_came()
    assert not first.all_came() and not second.all_came()
    assert store.count == 2, "two ranks have come, and the third has not"


def _meetings(store: Any, world: str, ranks: Sequence[int] = RANKS) -> list[Meeting]:
    return [Meeting(store, "0", ranks, rank, f"{world}{rank}") for rank in ranks]


def _met(meetings: Sequence[Meeting]) -> list[dict[int, str]]:
    """Ask everyone in turn until all have met."""
    for _ in range(4):
        found = [meeting.numbers() for meeting in meetings]
        if all(found):
            return [numbers for numbers in found if numbers is not None]
    raise AssertionError("they do not meet")


def test_ranks_that_meet_know_the_same_numbers() -> None:
    assert _met(_meetings(_store(), "a")) == [{0: "a0", 3: "a3", 4: "a4"}] * 3
    assert Meeting(_store(), "0", [7], 7, "alone").numbers() == {7: "alone"}


@pytest.mark.parametrize("late", range(3))
def test_nobody_meets_those_of_an_earlier_group(late: int) -> None:
    """The store still holds what they wrote under the same names."""
    store = _store()
    _met(_meetings(store, "a"))
    again = _meetings(store, "b")
    early = [m for i, m in enumerate(again) if i != late]
    for _ in range(5):
        assert [m.numbers() for m in early] == [None, None], "the last has not come, and its old number is no answer"
    assert _met(again) == [{0: "b0", 3: "b3", 4: "b4"}] * 3


def test_who_met_and_left_had_answered_everyone() -> None:
    """The last to meet asks nobody who is still asking."""
    first, second = _meetings(_store(), "a", (0, 1))
    assert first.numbers() is None
    assert second.numbers() is None
    assert first.numbers() is not None, "and is not asked again"
    assert second.numbers() is not None


def test_groups_of_one_name_over_other_ranks_do_not_meet() -> None:
    store = _store()
    ours, theirs = _meetings(store, "a", (0, 1)), _meetings(store, "a", (4, 5))
    assert ours[0].numbers() is None and theirs[0].numbers() is None and theirs[1].numbers() is None
    assert ours[0].numbers() is None
    assert _met(ours) == [{0: "a0", 1: "a1"}] * 2 and _met(theirs) == [{4: "a4", 5: "a5"}] * 2
