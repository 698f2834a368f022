"""The zoo by name, for parametrised tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from tests.models.plain import plain_decoder
from tests.models.transformers_zoo import gpt2, llama, mistral, qwen3

Factory = Callable[..., tuple[nn.Module, dict[str, Tensor]]]

ZOO: dict[str, Factory] = {
    "llama-mha": partial(llama, kv_heads=8),
    "llama-gqa": partial(llama, kv_heads=2),
    "llama-mqa": partial(llama, kv_heads=1),
    "llama-tied": partial(llama, kv_heads=2, tied=True),
    "qwen3": qwen3,
    "mistral": mistral,
    "gpt2": gpt2,
    "plain": plain_decoder,
}
"""Every model that must train exactly; each takes batch_size, length, dtype, seed, ignored, ignored_from."""


def build(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a zoo model and its batch by name.

    Args:
        name: A key of `ZOO`.
        settings: batch_size, length, dtype, seed, ignored, ignored_from, and what the model's factory takes.

    Returns:
        The model in training mode, and keyword arguments for its forward.
    """
    return ZOO[name](**settings)
