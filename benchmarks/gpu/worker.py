"""One rank of one mode: `torchrun --nproc-per-node=2 -m benchmarks.gpu.worker --mode ours --seq 16384 65536`.

`python -m benchmarks.gpu_step` starts this for every mode and collects the rows.
"""

from __future__ import annotations

import argparse
import os
import traceback
from typing import Any

import torch.distributed as dist

from benchmarks.gpu.measure import Measured, describe, leave, measure, report
from benchmarks.gpu.modes import MAKERS, is_ours, maker_of
from benchmarks.gpu.sizes import add_size_arguments, sizes_of
from benchmarks.gpu.workload import Choice, start


def main() -> None:
    """Measure one mode at each length; the first failure ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", required=True, help=f"{', '.join(MAKERS)}, or ours-ANYTHING")
    parser.add_argument("--seq", type=int, nargs="+", default=[16384])
    parser.add_argument("--backend", default=None, help="of our modes: inductor, aot_eager or eager")
    parser.add_argument("--pipeline", default=None, help="of our modes, in place of the default")
    add_size_arguments(parser)
    given = parser.parse_args()
    mode, sizes = given.mode, sizes_of(given)
    choice = Choice(mode, given.backend or ("aot_eager" if mode == "ours-aot-eager" else "inductor"), given.pipeline)
    if not is_ours(mode) and mode not in MAKERS:
        parser.error(f"no mode is called {mode}")
    rows = [Measured(mode, seq, sizes.stand_in or int(os.environ["WORLD_SIZE"])) for seq in given.seq]
    row = rows[0]
    try:
        # DeepSpeed starts the process group of its engine itself.
        device = start(sizes, process_group=not mode.startswith("autosp"))
        make: Any = maker_of(mode)
        model, prepare = make(sizes, device, choice)
        for row in rows:
            measure(row, sizes, model, prepare(row.seq))
            if dist.get_rank() == 0:
                report(row)
    except Exception as error:  # the table holds every failure
        traceback.print_exc()
        row.error = describe(error)
        report(row)
        leave()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
