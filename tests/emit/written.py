"""The code that Inductor writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache

import autosp_ir as air


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


def code_of(model: nn.Module, batch: Mapping[str, Tensor], pipeline: str, half: str) -> str:
    """The code of one half of a step on one rank.

    Args:
        model: Trained for one step.
        batch: Of that step.
        pipeline: Compiled with Inductor.
        half: `forward` or `backward`; the model has attention, by which the halves are told apart.
    """
    with written_code() as written:
        step = air.parallelize(model, dict(batch), backend="inductor", pipeline=pipeline)
        step(**batch).loss.backward()
    marker = {"forward": "autosp.attention.default(", "backward": "autosp.attention_backward.default("}[half]
    return next(code for code in written if marker in code)


__all__ = ["code_of", "written_code"]
