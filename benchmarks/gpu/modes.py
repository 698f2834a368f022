"""The modes by name. Nothing heavy is imported here: the launcher reads the names."""

from __future__ import annotations

import importlib

MAKERS = {
    "ours": ("benchmarks.gpu.ours", "ours"),
    "ours-aot-eager": ("benchmarks.gpu.ours", "ours"),
    "single": ("benchmarks.gpu.peers", "single"),
    "single-ac": ("benchmarks.gpu.peers", "single"),
    "ulysses-eager": ("benchmarks.gpu.peers", "ulysses"),
    "ulysses-compile": ("benchmarks.gpu.peers", "ulysses"),
    "ulysses-compile-loss": ("benchmarks.gpu.peers", "ulysses"),
    "ulysses-compile-loss-ac": ("benchmarks.gpu.peers", "ulysses"),
    "ring": ("benchmarks.gpu.peers", "ring"),
    "autosp": ("benchmarks.gpu.deepspeed_modes", "autosp"),
    "autosp-causal": ("benchmarks.gpu.deepspeed_modes", "autosp"),
    "alst": ("benchmarks.gpu.deepspeed_modes", "alst"),
}
"""Mode -> module and function `(Sizes, device, Choice) -> Mode`. DeepSpeed and autosp_ir both define operators called
`autosp::`, so one process imports one of them."""


def is_ours(mode: str) -> bool:
    """Whether a mode, or a variant named after it, runs this library."""
    return mode.split("-")[0] == "ours"


def ranks_of(mode: str, gpus: int) -> int:
    """How many processes a mode is started with."""
    return 1 if mode.split("-")[0] == "single" else gpus


def maker_of(mode: str) -> object:
    """The function that makes a mode; a variant of ours, such as `ours-remat`, is made as `ours`."""
    module, function = MAKERS["ours"] if is_ours(mode) else MAKERS[mode]
    made: object = getattr(importlib.import_module(module), function)
    return made
