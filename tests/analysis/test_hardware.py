"""Entries of the tables for the machine there is."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch

from autosp_ir.analysis.cost import DEVICES, LINKS
from autosp_ir.analysis.hardware import this_device, this_link


@pytest.mark.parametrize(
    ("name", "device", "link"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", "nvlink4"),
        ("NVIDIA H200", "h200", "nvlink4"),
        ("NVIDIA A100-SXM4-40GB", "a100", "nvlink3"),
    ],
)
def test_gpus_are_found_in_the_tables(name: str, device: str, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_name", return_value=name),
    ):
        assert this_device() == device in DEVICES
    assert this_link(device) == link in LINKS


def test_an_unknown_gpu_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_name", return_value="Abacus 1"),
        caplog.at_level(logging.WARNING, "autosp_ir.analysis"),
    ):
        assert this_device() == "h100"
    assert "abacus 1" in caplog.text


@pytest.mark.parametrize(("device", "link"), [("h200", "pcie5"), ("h100", "pcie5"), ("a100", "pcie")])
def test_without_peer_access_traffic_goes_through_the_host(
    device: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert this_link(device) == link in LINKS
