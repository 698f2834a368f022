"""Dimensions of the workload, as options of a command line. Standard library only: the launcher reads this."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the model and limits of the run.

    Args:
        layers: Decoder layers.
        hidden: Model width.
        inter: MLP width.
        heads: Query heads.
        kv: Key/value heads.
        vocab: Vocabulary.
        dtype: Parameter dtype name.
        cap_gib: Allocator cap per GPU; 0 for none.
        steps: Timed steps.
        warmup: Steps before timing.
        stand_in: Ranks that one process stands in for, in modes of several; 0 to start as many.
    """

    layers: int = 4
    hidden: int = 4096
    inter: int = 14336
    heads: int = 32
    kv: int = 8
    vocab: int = 128256
    dtype: str = "bfloat16"
    cap_gib: float = 80.0
    steps: int = 10
    warmup: int = 3
    stand_in: int = 0

    def arguments(self) -> list[str]:
        """Command line that `sizes_of` reads back."""
        return [text for f in fields(self) for text in (_option(f.name), str(getattr(self, f.name)))]


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of `Sizes`."""
    for field in fields(Sizes):
        default = field.default
        parser.add_argument(_option(field.name), type=type(default), default=default, help="default: %(default)s")


def sizes_of(given: argparse.Namespace) -> Sizes:
    """The `Sizes` among parsed arguments."""
    return Sizes(**{field.name: getattr(given, field.name) for field in fields(Sizes)})


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
