"""Ranks that meet and talk through the rendezvous store, which may outlive them.

A store keeps what was written to it when a process group is destroyed and made again under the same name. Ranks
therefore meet before they talk: each makes up a number, and the numbers of all of them name what they write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store


class Meeting:
    """How ranks come to know each other's numbers, and that these are of now.

    A rank puts its number where the others find it, and puts it again under each number that it finds. What stands
    under its own number was written by someone who has seen that, and so not before.

    Args:
        store: Where.
        name: Of the group, the same on all of its ranks.
        ranks: Who meets.
        rank: This rank.
        number: Made up by this rank, never used before.
    """

    def __init__(self, store: Store, name: str, ranks: Sequence[int], rank: int, number: str) -> None:
        self._store, self._name, self._rank, self._number = store, name, rank, number
        self._others = [r for r in ranks if r != rank]
        self._answered: dict[int, str] = {}
        self._said = False

    def numbers(self) -> dict[int, str] | None:
        """The numbers of all ranks; None while one of them has not come. To be asked again then."""
        if not self._said:
            self._store.set(f"hello/{self._name}/{self._rank}", self._number)
            self._said = True
        for other in self._others:
            place = f"hello/{self._name}/{other}"
            if self._store.check([place]):
                self._answer(other, self._store.get(place).decode())
        answers = [f"seen/{self._number}/{other}" for other in self._others]
        if answers and not self._store.check(answers):
            return None
        found = dict(zip(self._others, (self._store.get(a).decode() for a in answers), strict=True))
        for other, number in found.items():
            self._answer(other, number)
        return dict(sorted((found | {self._rank: self._number}).items()))

    def _answer(self, other: int, number: str) -> None:
        if self._answered.get(other) != number:
            self._store.set(f"seen/{number}/{self._rank}", self._number)
            self._answered[other] = number


class Talk:
    """One exchange, through the store.

    Args:
        store: Where.
        name: Of the exchange, the same on all ranks and never used before.
        ranks: Who takes part.
        rank: This rank.
        told: What this rank tells.
    """

    def __init__(self, store: Store, name: str, ranks: Sequence[int], rank: int, told: str) -> None:
        self._store, self._told, self._ranks = store, told, ranks
        self._count = f"{name}/{hashlib.sha256(told.encode()).hexdigest()[:32]}"
        self._places = [f"{name}/{r}" for r in ranks]
        self._own = f"{name}/{rank}"
        self._came = self._said = False

    @property
    def keys(self) -> list[str]:
        """The keys that this rank makes."""
        return [self._count, self._own]

    def all_came(self) -> bool:
        """Whether all ranks have come with the same text."""
        if self._came:
            return int(self._store.get(self._count)) == len(self._ranks)
        # A call that fails may have counted: this rank must never count twice.
        self._came = True
        return self._store.add(self._count, 1) == len(self._ranks)

    def texts(self) -> list[str] | None:
        """The texts of all ranks; None while one is missing."""
        if not self._said:
            self._store.set(self._own, self._told)
            self._said = True
        # Asked again and again: a read that waits and gives up makes torch write warnings.
        if not self._store.check(self._places):
            return None
        return [value.decode() for value in self._store.multi_get(self._places)]


__all__ = ["Meeting", "Talk"]
