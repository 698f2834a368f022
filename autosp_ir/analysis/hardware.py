"""Which entries of the cost model's tables stand for the machine that a step runs on."""

from __future__ import annotations

import logging
import os

import torch

from autosp_ir.analysis.cost import DEVICES

_logger = logging.getLogger("autosp_ir.analysis")
_USUAL = "h100"


def this_device() -> str:
    """The key in `DEVICES` of this rank's GPU.

    Without a GPU, and for one that the table does not have, that of an H100: a program is planned for the GPUs that it
    is meant for. An unknown GPU is logged.
    """
    if not torch.cuda.is_available():
        return _USUAL
    name = torch.cuda.get_device_name().lower()
    known = next((key for key in DEVICES if key in name), None)
    if known is None:
        _logger.warning("the cost model does not know %s, and plans for an %s", name, _USUAL.upper())
    return known or _USUAL


def this_link(device: str) -> str:
    """The key in `LINKS` of what connects the GPUs of one host.

    Args:
        device: From `this_device`.
    """
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "pcie" if device == "a100" else "pcie5"
    return "nvlink3" if device == "a100" else "nvlink4"


__all__ = ["this_device", "this_link"]
