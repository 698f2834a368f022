"""What an emitted program draws, and from which generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from autosp_ir.comm.random_masks import GLOBAL
from autosp_ir.ir.program import Program

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def shared_generators(program: Program) -> list[torch.device]:
    """The devices whose generators must stand alike on all ranks, for a program of any stage.

    Dense masks are drawn from the generator of their device. Masks of one's own start from any number; but one that
    ranks hold whole is made from a number that all ranks must have drawn, from the CPU's generator.
    """
    found: dict[torch.device, None] = {}
    for node in program.graph.nodes:
        if node.is_op("autosp.random_state") and node.arg("rng") == GLOBAL:
            found[torch.device(node.arg("device"))] = None
        elif node.is_op("autosp.keep_mask") and node.arg("rng") != GLOBAL and node.arg("index") is None:
            found[torch.device("cpu")] = None
    return sorted(found, key=str)


def dropout_probabilities(modules: Iterable[nn.Module]) -> tuple[float, ...]:
    """What the dropout modules of a model are set to: a program holds them as numbers."""
    return tuple(m.p for m in modules if isinstance(m, _DROPOUTS))


__all__ = ["dropout_probabilities", "shared_generators"]
