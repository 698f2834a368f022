"""The built-in passes, found through the same entry point as anyone else's."""

from autosp_passes.canonicalize import Canonicalize
from autosp_passes.differentiate import Differentiate
from autosp_passes.early_loss_gradient import EarlyLossGradient
from autosp_passes.grad_sync import GradSync
from autosp_passes.head_chunk import HeadChunk
from autosp_passes.lower_comm import LowerComm
from autosp_passes.offload import Offload
from autosp_passes.overlap import Overlap
from autosp_passes.pad_tokens import PadTokens
from autosp_passes.remat import Remat
from autosp_passes.tile import Tile
from autosp_passes.token_partition import TokenPartition
from autosp_passes.ulysses import Ulysses

__all__ = [
    "Canonicalize",
    "Differentiate",
    "EarlyLossGradient",
    "GradSync",
    "HeadChunk",
    "LowerComm",
    "Offload",
    "Overlap",
    "PadTokens",
    "Remat",
    "Tile",
    "TokenPartition",
    "Ulysses",
]
