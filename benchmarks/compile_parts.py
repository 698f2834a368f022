"""Seconds of each part of compilation, once, in this process: `python -m benchmarks.compile_parts --layers 2`.

`python -m benchmarks.compile_time` starts this in a fresh process for every number of layers. Weights are fake, so
neither memory nor time depends on their size; nothing is run, and no other process is needed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autosp_ir as air
from autosp_ir.emit.parallelize import default_pipeline
from autosp_ir.pipeline.instrument import Verify
from autosp_ir.pipeline.trace import PassRecord
from benchmarks.gpu.launch import MARK
from benchmarks.gpu.sizes import Sizes, add_size_arguments, sizes_of

Seconds = dict[str, float]


class TimedVerify(Verify):
    """Verification as the pass manager does it, with the seconds it took.

    Attributes:
        seconds: By the pass it followed; `input` for the captured program.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def before_pipeline(self, program: air.Program, passes: Sequence[air.Pass]) -> None:
        """Verify the input."""
        with self._timed("input"):
            super().before_pipeline(program, passes)

    def before_pass(self, pass_: air.Pass, program: air.Program) -> None:
        """Note what must not change."""
        with self._timed(pass_.name):
            super().before_pass(pass_, program)

    def after_pass(self, pass_: air.Pass, program: air.Program, record: PassRecord) -> None:
        """Verify what the pass left."""
        with self._timed(pass_.name):
            super().after_pass(pass_, program, record)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def fake_llama(sizes: Sizes, device: torch.device) -> nn.Module:
    """A LlamaForCausalLM whose weights take no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.gpu.workload import build

    with FakeTensorMode():
        return build(sizes, device, None)


def pretend_ranks(ranks: int) -> None:
    """Start a process group whose collectives do nothing: emission binds the program to one, and runs no step."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def compile_once(
    sizes: Sizes, seq: int, ranks: int, backend: str, device: str = "cpu", pipeline: str | None = None
) -> dict[str, Any]:
    """Capture, rewrite and emit one model.

    Args:
        sizes: The model.
        seq: Tokens.
        ranks: Size of the `sp` axis.
        backend: `aot_eager` or `inductor`.
        device: Device of the weights; Inductor compiles for it.
        pipeline: Passes to run; None for the default ones.

    Returns:
        Seconds by part, verification by pass, and the number of nodes of both programs.
    """
    seconds: Seconds = {}
    model = fake_llama(sizes, torch.device(device))
    ids = torch.randint(sizes.vocab, (1, seq), device=device)
    batch = {"input_ids": ids, "labels": ids.clone()}
    captured = _timed(seconds, "capture", lambda: air.capture(model, batch))
    verify = TimedVerify()
    chosen: Any = backend
    passes = pipeline or default_pipeline(backend=chosen)
    manager = air.PassManager(passes, verify=False, instruments=[verify])
    began = time.perf_counter()
    result = manager.run(captured, mesh={"sp": ranks})
    whole = time.perf_counter() - began
    seconds |= {f"pass {name}": spent for name, spent in result.timings.items()}
    seconds["verification"] = sum(verify.seconds.values())
    seconds["pass manager: clone, hashes"] = whole - sum(result.timings.values()) - seconds["verification"]
    pretend_ranks(ranks)
    _timed(seconds, f"emit {backend}", lambda: air.emit(result.program, backend=chosen))
    seconds["total"] = sum(seconds.values())
    nodes = {"captured": len(list(captured.graph.nodes)), "lowered": len(list(result.program.graph.nodes))}
    return {"seconds": seconds, "verification": dict(verify.seconds), "nodes": nodes}


def _timed(seconds: Seconds, part: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    seconds[part] = time.perf_counter() - began
    return result


def peak_mib() -> float:
    """Peak resident memory of this process; unlike `getrusage`, without that of the process it came from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    """Compile one model and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--backend", choices=["aot_eager", "inductor"], default="aot_eager")
    parser.add_argument("--device", default="cpu", help="cuda compiles for a GPU and needs one")
    parser.add_argument("--pipeline", default=None)
    add_size_arguments(parser)
    given = parser.parse_args()
    sizes = sizes_of(given)
    before = peak_mib()
    row = {
        "layers": sizes.layers,
        "seq": given.seq,
        "ranks": given.ranks,
        "backend": given.backend,
        "device": given.device,
        "pipeline": given.pipeline,
    }
    row |= compile_once(sizes, given.seq, given.ranks, given.backend, given.device, given.pipeline)
    dist.destroy_process_group()
    row |= {"imports_mib": before, "peak_mib": peak_mib(), "torch": torch.__version__}
    print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
