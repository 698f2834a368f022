"""Times every part of the line on this machine, for a small transformers Llama: `python -m benchmarks --help`."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import autosp_ir as air

T = TypeVar("T")
VOCABULARY = 256


def timed(seconds: dict[str, float], part: str, work: Callable[[], T]) -> T:
    """Runs `work` and records its wall-clock seconds under `part`."""
    start = time.perf_counter()
    result = work()
    seconds[part] = time.perf_counter() - start
    return result


def small_llama(layers: int) -> LlamaForCausalLM:
    """A grouped-query Llama with hidden size 128 and random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def measure(layers: int, tokens: int, ranks: int) -> dict[str, float]:
    """Seconds of the dense step, capture, each pass, and the simulated step of all ranks."""
    torch.manual_seed(0)
    model = small_llama(layers)
    ids = torch.randint(VOCABULARY, (1, tokens))
    batch = {"input_ids": ids, "labels": ids.clone()}
    seconds: dict[str, float] = {}

    timed(seconds, "dense step", lambda: model(**batch).loss.backward())
    program = timed(seconds, "capture", lambda: air.capture(model, batch))
    manager = air.PassManager(air.DEFAULT_PIPELINE)
    result = timed(seconds, "all passes", lambda: manager.run(program, mesh={"sp": ranks}))
    seconds |= {f"pass {name}": spent for name, spent in result.timings.items()}
    timed(seconds, "simulated step", lambda: air.simulate(result.program, batch))
    return seconds


def main(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    tokens: Annotated[int, typer.Option(help="Sequence length.")] = 512,
    ranks: Annotated[int, typer.Option(help="Size of the sp axis.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Time capture, passes and simulation, and print one table."""
    console = Console()
    with console.status("measuring"):
        seconds = measure(layers, tokens, ranks)
    machine = (
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    table = Table("part", "seconds", title=f"{layers} layers, {tokens} tokens, {ranks} ranks", caption=machine)
    for part, spent in seconds.items():
        table.add_row(part, f"{spent:.3f}")
    console.print(table)
    if json_path is not None:
        figures = {"machine": machine, "layers": layers, "tokens": tokens, "ranks": ranks, "seconds": seconds}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
