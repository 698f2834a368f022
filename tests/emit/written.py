"""The code that Inductor writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.async_compile import AsyncCompile
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


@contextmanager
def without_kernels() -> Iterator[None]:
    """No kernel is compiled inside this `with`: what is written can be read, and must not be run."""
    with mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_: None):
        yield


def halves_of(model: nn.Module, batch: Mapping[str, Tensor], pipeline: str | None) -> tuple[str, str]:
    """The code of the forward and of the backward of a step, by the running ranks or by one alone.

    Args:
        model: It has attention, by which the halves are told apart.
        batch: Of one step.
        pipeline: Compiled with Inductor; None for the default one.
    """
    with written_code() as written, without_kernels():
        air.parallelize(model, dict(batch), backend="inductor", pipeline=pipeline)
    markers = ("autosp.attention.default(", "autosp.attention_backward.default(")
    forward, backward = (next(code for code in written if marker in code) for marker in markers)
    return forward, backward


__all__ = ["halves_of", "without_kernels", "written_code"]
