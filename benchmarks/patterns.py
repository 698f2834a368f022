"""Times 50 rewriting rules over the joint graph of a decoder with 8B shapes: `python -m benchmarks.patterns --help`.

The weights are fake: nothing is computed, and the graph has the real shapes.
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import LlamaConfig, LlamaForCausalLM

import autosp_ir as air

_PIPELINE = "canonicalize,pad-tokens,token-partition,ulysses,differentiate"
_IDENTITIES = {
    "aten.mul.Tensor": 1,
    "aten.div.Tensor": 1,
    "aten.add.Tensor": 0,
    "aten.sub.Tensor": 0,
    "aten.mul.Scalar": 1,
    "aten.add.Scalar": 0,
    "aten.div.Scalar": 1,
    "aten.pow.Tensor_Scalar": 1,
}
_INVOLUTIONS = ("aten.neg", "aten.t", "aten.reciprocal", "aten.logical_not", "aten.bitwise_not")
_IDEMPOTENT = (
    "aten.relu",
    "aten.abs",
    "aten.clone",
    "aten.alias",
    "aten.detach",
    "aten.contiguous",
    "aten.sign",
    "aten.floor",
)
_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view")
_CHAINS = {
    "aten.silu": "aten.mul.Tensor",
    "aten.rsqrt": "aten.mul.Tensor",
    "aten.mean.dim": "aten.add.Tensor",
    "aten.pow.Tensor_Scalar": "aten.mean.dim",
    "aten.mm": "aten.view",
    "aten.sum.dim_IntList": "aten.view",
    "aten.cat": "aten.mul.Tensor",
    "aten.slice.Tensor": "aten.neg",
    "aten.transpose.int": "autosp.all_to_all",
    "aten.expand": "aten.mul.Tensor",
}


def drop(name: str, pattern: Callable[..., Any]) -> air.Rule:
    """A rule that replaces its pattern by the variable `x`, where their types are the same."""
    made = air.rule(name)(pattern)
    made.where("the types are the same")(lambda x, match: match.root.result.type == x.type)
    made.replacement(lambda x: x)
    return made


def exact_rules() -> list[air.Rule]:
    """Rules that hold for every program."""
    rules = [
        drop(f"drop-{name}-{n}", lambda op, x, name=name, n=n: op.one_of(name)(x, n)) for name, n in _IDENTITIES.items()
    ]
    rules += [drop(f"drop-double-{n}", lambda op, x, n=n: op.one_of(n)(op.one_of(n)(x).shared())) for n in _INVOLUTIONS]
    for name in _IDEMPOTENT:
        rule = air.rule(f"once-{name}")(lambda op, x, n=name: op.one_of(n)(op.one_of(n)(x).shared().named("y")))
        rule.replacement(lambda y: y)
        rules.append(rule)
    for name in _RESHAPES:
        rule = air.rule(f"merge-{name}")(
            lambda op, x, size, n=name: op.one_of(n)(op.one_of(*_RESHAPES)(x, ...).shared(), size)
        )
        rule.replacement(lambda op, x, size: op.aten.reshape(x, size))
        rules.append(rule)
        rules.append(drop(f"drop-{name}", lambda op, x, size, n=name: op.one_of(n)(x, size)))
    rules.append(
        drop(
            "drop-double-transpose",
            lambda op, x, a, b: op.aten.transpose.int(op.aten.transpose.int(x, a, b).shared(), a, b),
        )
    )
    rules.append(drop("drop-cast", lambda op, x: op.aten._to_copy(x, ...)))
    return rules


def _chain(inner: str, outer: str, end: str | None) -> Callable[[Any, Any], Any]:
    def pattern(op: Any, x: Any) -> Any:
        made = op.one_of(outer)(op.one_of(inner)(x, ...).shared(), ...)
        made = made.commuted() if outer == "aten.mul.Tensor" else made
        return made if end is None else op.one_of(end)(made.shared(), ...)

    return pattern


def searching_rules(count: int) -> list[air.Rule]:
    """Rules of two and three operations that look at common shapes of a decoder and are refused by a condition."""
    chains: list[tuple[str, str, str | None]] = [(inner, outer, None) for inner, outer in _CHAINS.items()]
    chains += [(*pair, end) for end in ("aten.mul.Tensor", "aten.view", "aten.add.Tensor") for pair in _CHAINS.items()]
    rules = []
    for inner, outer, end in chains[:count]:
        rule = air.rule(f"search-{inner}-{outer}-{end}")(_chain(inner, outer, end))
        rule.where("never")(lambda: False)
        rule.replacement(lambda x: x)
        rules.append(rule)
    return rules


def joint_program(layers: int, tokens: int) -> air.Program:
    """The joint graph of a Llama with 8B shapes on 8 ranks."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=1 << 21,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).train()
        torch.set_default_dtype(torch.float32)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    program = air.capture(model, {"input_ids": ids, "labels": ids.clone()})
    return air.PassManager(_PIPELINE, verify=False).run(program, mesh={"sp": 8}).program


def main(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 32,
    tokens: Annotated[int, typer.Option(help="Sequence length.")] = 8192,
    rules: Annotated[int, typer.Option(help="How many rules.")] = 50,
    repeat: Annotated[int, typer.Option(help="Runs; the median counts.")] = 5,
    program_path: Annotated[Path | None, typer.Option("--program", help="Read this joint program instead.")] = None,
) -> None:
    """Print one JSON object: seconds of a run that rewrites, and of one that only searches."""
    program = joint_program(layers, tokens) if program_path is None else air.parse(program_path.read_text())
    exact = exact_rules()
    chosen = [*exact, *searching_rules(rules - len(exact))][:rules]
    seconds, settled = [], []
    for _ in range(repeat):
        work = program.clone()
        start = time.perf_counter()
        statistics = air.apply_rules(chosen, work)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        again = air.apply_rules(chosen, work)
        settled.append(time.perf_counter() - start)
    figures = {
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "nodes": len(program.graph),
        "rules": len(chosen),
        "seconds": round(sorted(seconds)[repeat // 2], 3),
        "rewrites": statistics.rewrites,
        "sweeps": statistics.sweeps,
        "tries": sum(s.tries for s in statistics.rules.values()),
        "seconds_without_rewrites": round(sorted(settled)[repeat // 2], 3),
        "tries_without_rewrites": sum(s.tries for s in again.rules.values()),
        "hits": {name: s.hits for name, s in statistics.rules.items() if s.hits},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
