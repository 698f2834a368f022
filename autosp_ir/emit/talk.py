"""One exchange of short texts between ranks, through the rendezvous store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store


class Talk:
    """One exchange, through the store.

    Args:
        store: Where.
        name: Of the exchange, the same on all ranks.
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
        # A call that fails may have counted: this rank must never count twice.
        counts, self._came = not self._came, True
        return self._store.add(self._count, int(counts)) == len(self._ranks)

    def texts(self) -> list[str] | None:
        """The texts of all ranks; None while one is missing."""
        if not self._said:
            self._store.set(self._own, self._told)
            self._said = True
        # Asked again and again: a read that waits and gives up makes torch write warnings.
        if not self._store.check(self._places):
            return None
        return [value.decode() for value in self._store.multi_get(self._places)]


__all__ = ["Talk"]
