"""`remat{policy=budget}`: the model it judges by, the peak it keeps to, and what it may run again."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn

from autosp_ir.analysis.cost import device, link
from autosp_ir.analysis.liveness import liveness
from autosp_ir.capture.from_config import model_from_config
from autosp_ir.capture.program import capture
from autosp_ir.errors import PassError, PipelineError, UnsupportedError
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.ops import Trait
from autosp_ir.ir.program import Program
from autosp_ir.pipeline import PassManager
from autosp_ir.pipeline.base import PassContext
from autosp_ir.pipeline.manager import PassResult
from autosp_passes._remat.budget import Portfolio, parse_size
from autosp_passes._remat.materialise import Materialiser
from autosp_passes._remat.model import StepModel
from autosp_passes._remat.rules import Semantics
from tests.models.architectures import ARCHITECTURES

torch.set_num_threads(1)
_FORWARD = "canonicalize,pad-tokens,token-partition,ulysses,"


@cache
def joint(name: str, ranks: int, tiled: bool = False, layers: int = 4) -> Program:
    config = {"model_type": name, **ARCHITECTURES[name].config}
    config |= {k: 512 for k in ("max_position_embeddings", "n_positions") if k in config}
    config |= {k: layers for k in ("num_hidden_layers", "n_layer") if k in config}
    model, batch = model_from_config(config, length=256)
    pipeline = _FORWARD + ("tile{wide=1.5}," if tiled else "") + "differentiate"
    return PassManager(pipeline).run(capture(model, batch), mesh={"sp": ranks}).program


def model_of(program: Program, *rerun: str) -> StepModel:
    return StepModel(program, Semantics(program, rerun), device("h100"), link("nvlink4"))


def budgeted(program: Program, options: str) -> PassResult:
    return PassManager(f"remat{{policy=budget {options}}}").run(program, mesh=program.mesh)


@pytest.mark.parametrize(
    "rerun", [(), pytest.param(("attention",), marks=pytest.mark.long), ("attention", "collectives")]
)
@pytest.mark.parametrize(("name", "ranks", "tiled"), [("llama", 1, False), ("gpt2", 2, True), ("llama", 4, True)])
def test_the_model_is_the_program(name: str, ranks: int, tiled: bool, rerun: tuple[str, ...]) -> None:
    """Peak and order of every candidate are those of the program that the choice is written into."""
    program = joint(name, ranks, tiled)
    model = model_of(program, *rerun)
    for outcome in Portfolio(program, model, Semantics(program, rerun)).rules.values():
        written = program.clone()
        rewriter = PassContext(program=written, pass_name="remat").rewriter(written)
        chosen = [written.graph.value(model.nodes[i].result.name) for i in outcome.saved]
        Materialiser(written, rewriter, chosen, Semantics(written, rerun)).run()
        rewriter.dead_code()
        written.verify()
        assert liveness(written).peak_bytes == outcome.peak
        again = sum(n.phase is Phase.RECOMPUTE for n in written.graph.nodes)
        assert again == sum(copy for _, copy in outcome.order)


def test_peaks_and_times_are_monotone_in_the_budget() -> None:
    program = joint("llama", 2)
    model = model_of(program)
    portfolio = Portfolio(program, model, Semantics(program))
    most, least = portfolio.rules["save-all"].peak, portfolio.least().peak
    assert least < 0.5 * most
    budgets = [least + (most - least) * k / 8 for k in range(9)]
    chosen = [portfolio.choose(b).outcome for b in budgets]
    assert all(o.peak <= b for o, b in zip(chosen, budgets, strict=True))
    assert [o.peak for o in chosen] == sorted(o.peak for o in chosen)
    assert [o.extra for o in chosen] == sorted((o.extra for o in chosen), reverse=True)
    assert chosen[-1].extra == 0


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.45])
def test_the_program_keeps_to_the_peak(fraction: float) -> None:
    program = joint("llama", 2)
    whole = liveness(PassManager("remat{policy=save-all}").run(program, mesh=program.mesh).program).peak_bytes
    result = budgeted(program, f"fraction={fraction}")
    assert liveness(result.program).peak_bytes == result.statistics["remat"]["peak_bytes"] <= fraction * whole
    same = budgeted(program, f"peak={int(fraction * whole)}")
    assert same.statistics["remat"]["peak_bytes"] <= fraction * whole


def test_it_beats_the_other_rules_at_their_own_peaks() -> None:
    program = joint("llama", 1)
    portfolio = Portfolio(program, model_of(program), Semantics(program))
    for rule in ("min-cut", "autosp-sac", "checkpoint"):
        outcome = portfolio.rules[rule]
        assert portfolio.choose(outcome.peak).outcome.extra <= outcome.extra, rule


def counted(program: Program, trait: Trait, phase: Phase | None = None) -> int:
    nodes = program.graph.nodes
    return sum(n.op.has(trait) and (phase is None or n.phase is phase) for n in nodes)


@pytest.mark.parametrize("options", ["policy=save-all", "policy=min-cut", "policy=autosp-sac", "policy=budget"])
def test_attention_and_collectives_run_once_unless_asked_for(options: str) -> None:
    program = joint("llama", 2)
    if options == "policy=budget":
        least = Portfolio(program, model_of(program), Semantics(program)).least().peak
        options += f" peak={least}"
    written = PassManager(f"remat{{{options}}}").run(program, mesh=program.mesh).program
    for trait in (Trait.ATTENTION, Trait.COLLECTIVE, Trait.RANDOM):
        assert counted(written, trait) == counted(program, trait)


def test_asked_for_they_run_again_below_what_is_possible_without() -> None:
    program = joint("llama", 2)
    least = Portfolio(program, model_of(program), Semantics(program)).least().peak
    with pytest.raises(PassError, match="the least found is"):
        budgeted(program, f"peak={int(0.9 * least)}")
    both = model_of(program, "attention", "collectives")
    lower = Portfolio(program, both, Semantics(program, ("attention", "collectives"))).least().peak
    assert lower < least
    written = budgeted(program, f"peak={lower} rerun=attention,collectives").program
    assert liveness(written).peak_bytes <= lower
    assert counted(written, Trait.COLLECTIVE, Phase.RECOMPUTE) + counted(written, Trait.ATTENTION, Phase.RECOMPUTE)


def test_values_of_a_chunk_are_never_saved() -> None:
    program = joint("llama", 1, tiled=True)
    result = budgeted(program, "fraction=1")
    again = Counter(n.op.name for n in result.program.graph.nodes if n.phase is Phase.RECOMPUTE)
    assert again["aten._log_softmax"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("policy=budgets", "'save-all', 'autosp-sac', 'min-cut' or 'budget'"),
        ("policy=budget", "needs either peak or fraction"),
        ("policy=budget peak=1GiB fraction=0.5", "needs either peak or fraction"),
        ("policy=budget peak=1Gib/s", "is no size"),
        ("policy=budget fraction=1.5", "less than or equal to 1"),
        ("policy=min-cut fraction=0.5", "belong to policy=budget"),
        ("policy=budget fraction=0.5 rerun=random", "'attention' or 'collectives'"),
    ],
)
def test_wrong_options(options: str, says: str) -> None:
    with pytest.raises(PipelineError, match=says):
        PassManager(f"remat{{{options}}}")


def test_a_device_that_the_table_does_not_have() -> None:
    with pytest.raises(UnsupportedError, match="choose one of a100, cpu, h100, h200"):
        budgeted(joint("llama", 1), "fraction=0.5 device=b200")


def test_a_symbolic_length_is_refused() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.lin(x).sin().sum()
            return result

    program = capture(Pointwise(), {"x": torch.randn(2, 16, 8)}, seq_dims={"x": 1}, dynamic=True)
    with pytest.raises(PassError, match="a length that is a symbol"):
        PassManager("canonicalize,differentiate,remat{policy=budget fraction=0.5}").run(program)


@pytest.mark.parametrize(("text", "size"), [("1.5GiB", 1.5 * 2**30), ("3MB", 3e6), (17, 17.0), ("17", 17.0)])
def test_sizes(text: str | int, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("policy", ["save-all", "autosp-sac", "min-cut", "budget fraction=1"])
def test_nothing_computed_again_reads_a_buffer_that_the_forward_updates(policy: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.scale: torch.Tensor
            self.register_buffer("scale", torch.full((4,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = (x * self.weight * (self.scale + 1)).sin().sum()
            self.scale.mul_(0.5)
            return result

    x = torch.randn(2, 8, 4)
    dense, model = Counting(), Counting()
    dense(x).backward()
    program = capture(model, {"x": x}, seq_dims={"x": 1})
    pipeline = f"canonicalize,differentiate,remat{{policy={policy}}},grad-sync,lower-comm"
    step = PassManager(pipeline).run(program).program.emit(backend="aot_eager")
    step(x=x).backward()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, dense.weight.grad)
    torch.testing.assert_close(model.scale, dense.scale)
