"""Communication that no kernel covers, on the profiler's timeline: `torchrun --nproc-per-node=2 -m benchmarks.exposed`.

    torchrun --nproc-per-node=2 -m benchmarks.exposed --seq 32768 --pipeline "plain=…" --pipeline "ours=…,overlap{…}"

Each pipeline is compiled, warmed up and profiled for a few steps; what is exposed on rank 0 is printed beside the
estimate for the same program, and both are drawn and written as a Chrome trace. Peers have no estimate.
NCCL_P2P_DISABLE=1 makes communication slow enough to matter.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import autosp_ir as air
from autosp_ir.emit.parallelize import default_pipeline
from autosp_ir.viz.lanes import Lane, exposed_seconds, lanes_svg, lanes_trace, measured_lanes, predicted_lanes
from benchmarks.gpu import ours  # noqa: F401  registers the passes where they are not installed
from benchmarks.gpu.measure import clear
from benchmarks.gpu.modes import maker_of
from benchmarks.gpu.sizes import add_size_arguments, sizes_of
from benchmarks.gpu.workload import Choice, build, start, tokens

_PROFILED = 3


def main() -> None:
    """Measure every pipeline at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[32768])
    parser.add_argument("--pipeline", action="append", default=[], metavar="NAME=PIPELINE")
    parser.add_argument("--peer", action="append", default=[], metavar="MODE", help="of benchmarks.gpu_step, first")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--device", default="h100")
    parser.add_argument("--link", default="nvlink4")
    parser.add_argument("--out", type=Path, default=Path("build/exposed"))
    add_size_arguments(parser)
    given = parser.parse_args()
    sizes = sizes_of(given)
    on = start(sizes)
    default = default_pipeline(backend=given.backend)
    pipelines = dict(text.split("=", 1) for text in given.pipeline) or {
        "program order": default.partition(",overlap")[0],
        "default": default,
    }
    rows = []
    given.out.mkdir(parents=True, exist_ok=True)

    def keep(seq: int, name: str, found: dict[str, Any]) -> None:
        pictures: dict[str, list[Lane]] = {k: found.pop(k) for k in ("predicted", "measured") if k in found}
        rows.append({"seq": seq, "name": name} | found)
        if dist.get_rank() == 0:
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "pipeline"}), flush=True)
            stem = f"{name.replace(' ', '-')}-{seq}"
            (given.out / f"{stem}.svg").write_text(lanes_svg(pictures))
            with gzip.open(given.out / f"{stem}.json.gz", "wt") as trace:
                json.dump(lanes_trace(pictures), trace)
            (given.out / "exposed.json").write_text(json.dumps(rows, indent=1) + "\n")

    for mode in given.peer:
        make: Any = maker_of(mode)
        peer, prepare = make(sizes, on, Choice(mode))
        for seq in given.seq:
            case = prepare(seq)
            keep(seq, mode, _timeline(partial(case.step, None), partial(clear, peer, case)))
    model = build(sizes, on, None)
    for seq in given.seq:
        ids = tokens(sizes, seq, on)
        batch = {"input_ids": ids, "labels": ids.clone()}
        for name, pipeline in pipelines.items():
            keep(seq, name, _ours(model, batch, pipeline, given))
    dist.destroy_process_group()


def _ours(model: torch.nn.Module, batch: dict[str, Any], pipeline: str, given: argparse.Namespace) -> dict[str, Any]:
    """One pipeline, measured and predicted."""
    result = air.PassManager(pipeline).run(air.capture(model, batch), mesh={"sp": dist.get_world_size()})
    step = result.program.emit(backend=given.backend)
    found = _timeline(lambda: step(**batch).loss.backward(), partial(model.zero_grad, set_to_none=True))
    predicted = predicted_lanes(result.program, given.device, given.link, fused=given.backend == "inductor")
    return {
        "pipeline": pipeline,
        **found,
        "predicted_ms": 1e3 * max(s.begin + s.seconds for lane in predicted for s in lane.slices),
        "predicted_exposed_ms": 1e3 * exposed_seconds(predicted),
        "predicted": predicted,
    }


def _timeline(step: Callable[[], object], clear: Callable[[], object]) -> dict[str, Any]:
    """Time of a step by the clock, then what the profiler saw in the middle one of some more."""

    def once() -> None:
        step()
        clear()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds, profiles = [], []
    for _ in range(3):
        once()
    for _ in range(2 * _PROFILED):
        dist.barrier()
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    for _ in range(_PROFILED):
        dist.barrier()
        profiles.append(_profiled(once))
    exposed = [exposed_seconds(lanes) for lanes in profiles]
    middle = sorted(range(_PROFILED), key=exposed.__getitem__)[_PROFILED // 2]
    return {
        "step_ms": 1e3 * statistics.median(seconds),
        "exposed_ms": 1e3 * exposed[middle],
        "exposed_spread_ms": [1e3 * min(exposed), 1e3 * max(exposed)],
        "communication_ms": 1e3 * sum(s.seconds for lane in profiles[middle][1:] for s in lane.slices),
        "kernels_ms": _by_kind(profiles[middle][0]),
        "measured": profiles[middle],
    }


def _by_kind(compute: Lane) -> dict[str, float]:
    """Milliseconds of the kernels of each kind."""
    total: dict[str, float] = {}
    for each in compute.slices:
        total[each.kind] = total.get(each.kind, 0.0) + 1e3 * each.seconds
    return total


def _profiled(once: Any) -> list[Lane]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as recorded:
        once()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return measured_lanes(json.loads(path.read_text())["traceEvents"])


if __name__ == "__main__":
    main()
