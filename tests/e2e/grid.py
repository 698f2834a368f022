"""The grid of heads, lengths, masks, accumulation and data groups: small models and their micro-batches.

One program serves every number of micro-batches and data groups, because only the data and `num_items_in_batch`
differ; so one capture is compared on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.batches import IGNORE_INDEX, tokens
from tests.models.transformers_zoo import llama, mistral

Batch = dict[str, Any]
KV_HEADS = {"multi-head": 4, "grouped": 2, "one-kv-head": 1}
LENGTHS = {"even": 16, "odd": 17}
RANKS = {"even": 2, "odd": 4}
"""Ranks by length: four ranks share two or one K/V heads, two ranks do not share the two."""

FAMILIES = {
    "labels": ("none", "prompt", "empty-shard"),
    "packed": ("packed",),
    "padded": ("left-pad", "right-pad"),
    "window": ("window",),
}
"""Masks that differ in values alone, so that one program serves them."""

CELLS = {"one": (0,), "accumulation": (0, 1), "data groups": (0, 2), "both": (0, 1, 2, 3)}
"""The micro-batches of a step: two per data group under accumulation, groups 0 and 1 hold 0, 1 and 2, 3."""

_WINDOW = 5


def model_of(heads: str, mask: str, length: int, seed: int = 0) -> nn.Module:
    """A decoder of one layer with four query heads."""
    settings: dict[str, Any] = {
        "heads": 4,
        "kv_heads": KV_HEADS[heads],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "length": length,
        "seed": seed,
    }
    if mask == "window":
        return mistral(sliding_window=_WINDOW, **settings)[0]
    return llama(**settings)[0]


def _no_mask(ids: Tensor, labels: Tensor, part: int) -> Batch:
    return {}


def _prompt(ids: Tensor, labels: Tensor, part: int) -> Batch:
    labels[:, : ids.shape[1] // 3 + 2 * part] = IGNORE_INDEX
    return {}


def _empty_shard(ids: Tensor, labels: Tensor, part: int) -> Batch:
    """No valid label in the first half of the tokens, or in the last: whole shards of two and of four ranks."""
    half = -(-ids.shape[1] // 2)
    labels[:, slice(0, half + 1) if part % 2 == 0 else slice(half, None)] = IGNORE_INDEX
    return {}


def _packed(ids: Tensor, labels: Tensor, part: int) -> Batch:
    """Two or three documents whose positions start anew; the first label of each has no context."""
    cuts = [5 + part, 11 + part][: 1 + part % 2]
    labels[:, cuts] = IGNORE_INDEX
    starts = torch.zeros(ids.shape[1], dtype=torch.int64)
    for cut in cuts:
        starts[cut:] = cut
    return {"position_ids": (torch.arange(ids.shape[1]) - starts).repeat(ids.shape[0], 1), "use_cache": False}


def _left_pad(ids: Tensor, labels: Tensor, part: int) -> Batch:
    return _padded(labels, slice(0, 3 + part))


def _right_pad(ids: Tensor, labels: Tensor, part: int) -> Batch:
    return _padded(labels, slice(-(3 + part), None))


def _padded(labels: Tensor, where: slice) -> Batch:
    labels[:, where] = IGNORE_INDEX
    attended = torch.ones_like(labels)
    attended[:, where] = 0
    return {"attention_mask": attended}


MASKS: dict[str, Callable[[Tensor, Tensor, int], Batch]] = {
    "none": _no_mask,
    "prompt": _prompt,
    "empty-shard": _empty_shard,
    "packed": _packed,
    "left-pad": _left_pad,
    "right-pad": _right_pad,
    "window": _no_mask,
}


def micro_batch(mask: str, length: int, part: int) -> Batch:
    """One micro-batch of two rows; each part has other data and another number of valid labels."""
    ids = tokens(2, length, seed=part)
    labels = ids.clone()
    labels[0, length // 2 : length // 2 + part] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, **MASKS[mask](ids, labels, part)}


def valid(batches: Sequence[Batch]) -> Tensor:
    """The number of predicted tokens, which transformers' `Trainer` passes as `num_items_in_batch`."""
    return torch.stack([(b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in batches]).sum()


def weighted(batches: Sequence[Batch]) -> list[Batch]:
    """Micro-batches whose losses add up to the mean over all of their tokens."""
    items = valid(batches)
    return [{**batch, "num_items_in_batch": items} for batch in batches]


def concatenated(batches: Sequence[Batch]) -> Batch:
    """All micro-batches as one batch."""
    return {
        name: torch.cat([b[name] for b in batches]) if isinstance(value, Tensor) and value.ndim else value
        for name, value in batches[0].items()
    }
