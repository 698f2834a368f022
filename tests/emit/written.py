"""The code that Inductor writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor.codecache import PyCodeCache


@contextmanager
def written_code() -> Iterator[list[str]]:
    """What Inductor generates inside this `with`."""
    written: list[str] = []
    inner = PyCodeCache.write

    def write(source: str, *args: Any, **kwargs: Any) -> Any:
        written.append(source)
        return inner(source, *args, **kwargs)

    with mock.patch.object(PyCodeCache, "write", write), torch._inductor.config.patch(fx_graph_cache=False):
        yield written


__all__ = ["written_code"]
