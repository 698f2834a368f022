"""Programs made in the IR: any layouts over several ranks, any operations on one, and any functions of tokens."""

from __future__ import annotations

import random
from typing import Any

from autosp_ir.ir.graph import Graph
from autosp_ir.ir.program import Program
from autosp_ir.sim.fuzz import random_graph
from autosp_ir.sim.layout_truth import check_layout_truth
from autosp_ir.sim.lockstep import simulate
from autosp_ir.testing.check import assert_same_numbers
from autosp_ir.testing.equivalence import compare_runs
from autosp_ir.testing.promote import promote
from tests.comm.random_layouts import random_pair
from tests.fuzz.cases import Case, features_of, run_pipeline
from tests.fuzz.pipelines import draw_pipeline, draw_ranks
from tests.fuzz.token_programs import token_program

_JOINT_SHARE = 0.1
# Inputs are of size one, and some programs have no output or gradient but what rounding leaves of it.
_LEAST = 1e-2


def judge_layouts(case: Case) -> set[str]:
    """A random partitioned program: every value is what its layout says, whole or differentiated and lowered."""
    rng = random.Random(case.seed)
    chosen = case.apply(
        {
            "ranks": rng.choice([2, 2, 4, 8]),
            "nodes": rng.choice([8, 12, 24]),
            "joint": rng.random() < _JOINT_SHARE,
            "pipeline": draw_pipeline(rng, 1, tokens=False),
        }
    )
    ranks: int = chosen["ranks"]
    many, one, batch = random_pair(case.seed, ranks, chosen["nodes"])
    many.verify()
    # Autograd differentiates a product in another order where extents are one, which those of one rank may be.
    report = check_layout_truth(many, one, batch, gradients=chosen["joint"], allow_reshaped=chosen["joint"])
    if report.unmatched and not chosen["joint"]:
        raise AssertionError(f"values without a counterpart on one rank: {report.unmatched}")
    found = {f"ranks {ranks}", "layouts joint" if chosen["joint"] else "layouts forward", *_placements(many)}
    if not chosen["joint"]:
        return found
    result = run_pipeline(many, chosen["pipeline"], ranks)
    runs = simulate(result.program, batch), simulate(one, batch)
    compare_runs(*runs, least=_LEAST, title=chosen["pipeline"]).check()
    return found | features_of(result, ranks)


def _placements(program: Program) -> set[str]:
    kinds = [v.type for n in program.graph.nodes for v in n.results]
    return {f"layout {type(k.layout['sp']).__name__}" for k in kinds if hasattr(k, "layout")}


def judge_graphs(case: Case) -> set[str]:
    """Any program of a few dozen ATen operations, for one rank: a pipeline keeps its numbers and gradients."""
    rng = random.Random(case.seed)
    chosen = case.apply({"nodes": rng.choice([12, 24, 32]), "pipeline": draw_pipeline(rng, 1, tokens=False)})
    # Decompositions write down numbers of a dtype, such as its largest: float64 must be there before they run.
    program = promote(random_graph(case.seed, chosen["nodes"]))
    result = run_pipeline(program, chosen["pipeline"], 1)
    assert_same_numbers(program, result.program, seed=case.seed, least=_LEAST)
    return features_of(result, 1) | _operations(program.graph)


def judge_tokens(case: Case) -> set[str]:
    """Any functions of tokens and of features: cut over ranks by a pipeline, their loss and gradients stay."""
    rng = random.Random(case.seed)
    ranks = draw_ranks(rng)
    chosen = case.apply({"ranks": ranks, "nodes": rng.choice([3, 6, 10]), "pipeline": draw_pipeline(rng, ranks)})
    program, batch = token_program(case.seed, ranks, chosen["nodes"])
    program.verify()
    result = run_pipeline(program, chosen["pipeline"], chosen["ranks"])
    assert_same_numbers(program, result.program, batch, least=_LEAST)
    return features_of(result, chosen["ranks"]) | _operations(program.graph)


def _operations(graph: Graph) -> set[Any]:
    return {n.op.name for n in graph.nodes if n.op.name.startswith(("aten.", "operator."))}
