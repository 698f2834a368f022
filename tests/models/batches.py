"""Token batches for the zoo."""

from __future__ import annotations

import torch

VOCAB = 97
"""Vocabulary of every zoo model; prime, so that no other extent equals it."""

IGNORE_INDEX = -100


def tokens(batch_size: int, length: int, seed: int) -> torch.Tensor:
    """Random token ids, int64 `[batch_size, length]`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, VOCAB, (batch_size, length), generator=generator)


def labels_of(ids: torch.Tensor, ignored: int = 0, ignored_from: int | None = None) -> torch.Tensor:
    """Labels equal to `ids` with some positions ignored.

    Args:
        ids: Token ids `[B, S]`.
        ignored: Number of scattered positions per row to ignore (every third one first).
        ignored_from: Ignore every position from here on, so that the last shards hold no valid label.

    Returns:
        Labels `[B, S]`, a tensor of its own.
    """
    labels = ids.clone()
    scattered = [*range(1, ids.shape[1], 3), *range(0, ids.shape[1], 3), *range(2, ids.shape[1], 3)][:ignored]
    labels[:, scattered] = IGNORE_INDEX
    if ignored_from is not None:
        labels[:, ignored_from:] = IGNORE_INDEX
    return labels
