"""Rates of this machine beside those that the cost model assumes: `python -m benchmarks.calibrate --help`.

    torchrun --nproc-per-node=2 -m benchmarks.calibrate --device h100 --link nvlink4 --json calibration.json

On several ranks the link is measured too. Every figure is the median of several runs of one large operation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autosp_ir  # noqa: F401  registers autosp::attention
from autosp_ir.analysis.cost import DEVICES, HOST_LINKS, LINKS, Device, Link
from autosp_ir.analysis.cost import device as device_named
from autosp_ir.analysis.cost import host_link as host_link_named
from autosp_ir.analysis.cost import link as link_named

_RUNS = 7
_GIB = 2**30


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--link", default="nvlink4", choices=sorted(LINKS))
    parser.add_argument("--host-link", default="pcie5", choices=sorted(HOST_LINKS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the operations' extents; small for a CPU")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    on, over, host = device_named(given.device), link_named(given.link), host_link_named(given.host_link)
    rows = [*_device(where, on, given.scale), *_host(where, host, given.scale)]
    if ranks > 1:
        rows += _link(where, over, ranks, given.scale)
    if ranks == 1 or dist.get_rank() == 0:
        for row in rows:
            print(f"{row['what']:34} {row['measured']:12.4g} {row['unit']:8} assumed {row['assumed']:12.4g}  "
                  f"x{row['measured'] / row['assumed']:.2f}")  # fmt: skip
        if given.json is not None:
            name = torch.cuda.get_device_name(where) if cuda else "cpu"
            document = {"device": name, "ranks": ranks, "torch": torch.__version__, "rows": rows}
            given.json.write_text(json.dumps(document, indent=1) + "\n")
    if ranks > 1:
        dist.destroy_process_group()


def _device(where: torch.device, on: Device, scale: float) -> list[dict[str, Any]]:
    n = max(64, int(8192 * scale))
    half = torch.randn(n, n, device=where, dtype=torch.bfloat16)
    single = torch.randn(n // 2, n // 2, device=where)
    rows = [
        _row("bf16 product", 2 * n**3 / _seconds(lambda: half @ half, where), "FLOP/s", on.half_flops),
        _row(
            "float32 product", 2 * (n // 2) ** 3 / _seconds(lambda: single @ single, where), "FLOP/s", on.single_flops
        ),
    ]
    tokens = max(128, int(32768 * scale))
    q, k, v = (torch.randn(1, 8, tokens, 128, device=where, dtype=torch.bfloat16) for _ in range(3))
    work = 4 * 8 * tokens**2 * 128 / 2

    def attend() -> Any:
        return torch.ops.autosp.attention(q, k, v, causal=True)

    forward = _seconds(attend, where)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = torch.ops.autosp.attention(*inputs, causal=True)[0]
    grad = torch.randn_like(out)
    backward = _seconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True), where)
    rows.append(_row("attention, causal", work / forward, "FLOP/s", on.half_flops * on.attention))
    rows.append(_row("attention, backward", 2.5 * work / backward, "FLOP/s", on.half_flops * on.attention_backward))
    big = torch.randn(max(1024, int(_GIB * scale) // 4), device=where)
    target = torch.empty_like(big)
    rows.append(_row("memory", 2 * 4 * big.numel() / _seconds(lambda: target.copy_(big), where), "B/s", on.bandwidth))
    tiny = torch.zeros(16, device=where)

    def many() -> None:
        for _ in range(200):
            tiny.add_(1)

    rows.append(_row("smallest kernel", _seconds(many, where) / 200, "s", on.launch))
    return rows


def _host(where: torch.device, host: Link, scale: float) -> list[dict[str, Any]]:
    if where.type != "cuda":
        return []
    there = torch.empty(max(1024, int(_GIB * scale)), dtype=torch.uint8, pin_memory=True)
    here = torch.empty_like(there, device=where)
    size = there.numel()
    out = _seconds(lambda: there.copy_(here, non_blocking=True), where)
    back = _seconds(lambda: here.copy_(there, non_blocking=True), where)
    return [_row("to host memory", size / out, "B/s", host.bandwidth), _row("from host memory", size / back, "B/s",
                                                                            host.bandwidth)]  # fmt: skip


def _link(where: torch.device, over: Link, ranks: int, scale: float) -> list[dict[str, Any]]:
    share = (ranks - 1) / ranks
    big = torch.zeros(ranks * max(1024, int(_GIB * scale / 4) // ranks), device=where, dtype=torch.bfloat16)
    out = torch.empty_like(big)
    small, answer = torch.zeros(ranks, device=where), torch.zeros(ranks, device=where)
    exchange = _seconds(lambda: dist.all_to_all_single(out, big), where)
    reduce = _seconds(lambda: dist.all_reduce(big), where)
    latency = _seconds(lambda: dist.all_to_all_single(answer, small), where)
    size = 2 * big.numel()
    return [
        _row("all-to-all", size * share / exchange, "B/s", over.bandwidth),
        _row("all-reduce", 2 * size * share / reduce, "B/s", over.bandwidth),
        _row("smallest all-to-all", latency, "s", over.latency),
    ]


def _row(what: str, measured: float, unit: str, assumed: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "unit": unit, "assumed": assumed}


def _seconds(function: Callable[[], Any], where: torch.device) -> float:
    """Median seconds of one call, the first two left out."""
    times = []
    for _ in range(_RUNS + 2):
        if where.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
