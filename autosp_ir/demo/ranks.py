"""The sequence-parallel half of the demonstration: gloo ranks started through torchrun's own API."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from autosp_ir.demo.workload import History, Workload, batch_of, build_model, train
from autosp_ir.emit.parallelize import parallelize
from autosp_ir.errors import AutoSPError


def train_on_ranks(workload: Workload, ranks: int, folder: Path, report: Callable[[int], None]) -> History:
    """Train the demonstration's model with one sequence over several processes.

    Args:
        workload: Sizes.
        ranks: Number of processes.
        folder: Where ranks leave their progress and result.
        report: Called with the number of finished steps.

    Raises:
        AutoSPError: A rank failed; its traceback is on standard error.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    failure: list[BaseException] = []

    def launch() -> None:
        try:
            elastic_launch(config, _rank_main)(workload, str(folder))
        except BaseException as error:
            failure.append(error)

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    progress = folder / "progress"
    progress.write_text("0")
    thread = threading.Thread(target=launch, daemon=True)
    thread.start()
    while thread.is_alive():
        report(int(progress.read_text() or 0))
        time.sleep(0.1)
    if failure:
        raise AutoSPError(
            f"the sequence-parallel run failed: {failure[0]}", hint="read the rank's traceback above"
        ) from failure[0]
    loaded: Any = torch.load(folder / "history.pt", weights_only=False)
    if not isinstance(loaded, History):
        raise AutoSPError("the ranks left no result", hint="run the demo again with an empty output folder")
    return loaded


def _rank_main(workload: Workload, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build_model(workload)
    step = parallelize(model, batch_of(workload, 0), backend="aot_eager")
    progress = Path(folder) / "progress"

    def report(index: int, loss: float) -> None:
        del loss
        if dist.get_rank() == 0:
            progress.write_text(str(index + 1))

    history = train(model, step, workload, report)
    if dist.get_rank() == 0:
        torch.save(history, Path(folder) / "history.pt")
    dist.barrier()
    dist.destroy_process_group()
