"""Our side of the table: `torchrun --nproc-per-node=2 -m benchmarks.gpu.ours --seq 16384 65536`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

import autosp_ir as air
from benchmarks.gpu.workload import Sizes, build, measure, report, start, tokens


def main() -> None:
    """Measure one backend and pipeline at each length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq", type=int, nargs="+", default=[16384])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--pipeline", default=None)
    parser.add_argument("--mode", default="ours")
    for name, kind in Sizes.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type={"int": int, "float": float, "str": str}[kind])
    given = vars(parser.parse_args())
    sizes = Sizes(**{k: given[k] for k in Sizes.__annotations__ if given[k] is not None})
    device = start(sizes)
    model = build(sizes, device, None)
    for seq in given["seq"]:
        ids = tokens(sizes, seq, device)
        batch = {"input_ids": ids, "labels": ids.clone()}
        step = air.parallelize(model, batch, backend=given["backend"], pipeline=given["pipeline"])

        def run(forward: Callable[..., Any] = step, batch: dict[str, Tensor] = batch) -> Tensor:
            loss: Tensor = forward(**batch).loss
            loss.backward()
            return loss

        report(measure(given["mode"], seq, sizes, model, run))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
