"""What `diagnose` says, for every way that an examination can end."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import autosp_ir as air
from autosp_ir.doctor import Diagnosis, RankFinding, Verdict, diagnose, steps_of, tables
from autosp_ir.doctor.placements import family_of
from tests.doctor.factories import mixes, whole
from tests.models import llama

PREFIX = "canonicalize,pad-tokens,token-partition,ulysses"


def printed(diagnosis: Diagnosis) -> str:
    written = StringIO()
    console = Console(file=written, width=200, no_color=True)
    for table in tables(diagnosis):
        console.print(table)
    return written.getvalue()


def one(pipeline: str, ranks: int = 2) -> RankFinding:
    model, batch = llama(length=24, num_hidden_layers=1)
    return diagnose(model, batch, [ranks], pipeline=pipeline).findings[0]


def test_a_model_that_is_exact_on_some_numbers_of_ranks_and_refused_on_others() -> None:
    model, batch = llama(length=24, heads=4, kv_heads=2, num_hidden_layers=1)
    steps: list[str] = []
    diagnosis = diagnose(model, batch, (2, 8), progress=steps.append)
    assert [f.verdict for f in diagnosis.findings] == [Verdict.EXACT, Verdict.REFUSED]
    assert diagnosis.ok and diagnosis.verdict is Verdict.REFUSED
    assert len(steps) == steps_of((2, 8)) - 1  # what is refused is not simulated
    exact, refused = diagnosis.findings
    assert exact.error is not None and exact.error < 1e-10
    assert exact.spread == 1.0 and not exact.gathers and not exact.reason
    assert {c.family for c in exact.families} >= {"attention", "matmul", "pointwise", "views"}
    assert all(c.whole == c.gathered == 0 for c in exact.families)
    assert refused.failure is not None and refused.failure.hint is not None and refused.families
    assert refused.failure.summary == "UnsupportedError [ulysses]: 4 query heads cannot be spread over 8 ranks"
    assert refused.failure.summary in str(diagnosis)
    assert "What you can do:" in printed(diagnosis)


@pytest.mark.parametrize("length", [24, 23])
def test_what_reads_gathered_tokens_is_named_with_its_line_and_bytes(length: int) -> None:
    model, batch = mixes(length)
    finding = diagnose(model, batch, (2,)).on(2)
    assert finding.verdict is Verdict.EXACT_WITH_GATHERS
    (gather,) = finding.gathers
    assert gather.operation == "aten.cummax" and gather.source is not None and "factories.py" in gather.source
    assert gather.bytes == finding.gathered_bytes == 2 * 24 * 16 * 4  # padded to an even number of tokens
    assert finding.reason == "gathered: 1 × aten.cummax"
    assert any("aten.cummax" in note or "aten.slice" in note for note in finding.notes)
    assert "aten.cummax" in printed(diagnose(model, batch, (2,)))


def test_strict_refuses_what_would_be_gathered() -> None:
    finding = diagnose(*mixes(), (2,), strict=True).on(2)
    assert finding.verdict is Verdict.REFUSED and finding.failure is not None
    assert "strict" in str(finding.failure.hint)


def test_a_model_of_which_nothing_is_cut_says_so() -> None:
    finding = diagnose(*whole(), (2,), seq_dims={"pixels": 2}).on(2)
    assert finding.verdict is Verdict.EXACT_WITH_GATHERS
    assert finding.spread == 0.0 and "nothing is cut" in finding.reason


def test_a_model_that_cannot_be_captured_is_refused_on_every_number_of_ranks() -> None:
    model, batch = whole()
    diagnosis = diagnose(model, batch)
    assert [f.verdict for f in diagnosis.findings] == [Verdict.REFUSED] * 2
    assert diagnosis.findings[0].failure is not None
    assert diagnosis.findings[0].failure.stage == "capture" and diagnosis.capture_error is None


@air.register_pass("doctor-drops-a-sum", stage="forward")
def drops_a_sum(program: air.Program, ctx: air.PassContext) -> None:
    """A wrong pass that layouts do not show: it scales the loss on the way."""
    rewriter = ctx.rewriter(program)
    for node in program.find("aten.silu"):
        with rewriter.after(node):
            doubled = rewriter.create("aten.mul.Tensor", (node.result, 2.0))
        for user in [u for u in node.users if u is not doubled.producer]:
            rewriter.set_args(user, tuple(doubled if a is node.result else a for a in user.args))


@air.register_pass("doctor-crashes", stage="forward")
def crashes(program: air.Program, ctx: air.PassContext) -> None:
    """A pass that raises what it did not mean to."""
    raise KeyError("nowhere")


def test_a_wrong_program_is_called_wrong() -> None:
    finding = one(f"canonicalize,doctor-drops-a-sum,{PREFIX.partition(',')[2]}")
    assert finding.verdict is Verdict.WRONG and finding.verdict.is_bug
    assert finding.failure is not None and "differ by more than" in finding.failure.reason
    assert finding.error is not None and finding.error > 1e-3


def test_an_exception_that_is_no_named_error_is_a_crash() -> None:
    finding = one(f"{PREFIX},doctor-crashes")
    assert finding.verdict is Verdict.CRASH
    assert finding.failure is not None and "nowhere" in finding.failure.reason


def test_an_exception_of_the_check_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr(air.testing.DenseReference, "compare", fails)
    finding = one(PREFIX)
    assert finding.verdict is Verdict.CRASH and finding.failure is not None
    assert finding.failure.error == "RuntimeError" and "out of paper" in str(finding.failure.context)


@pytest.mark.parametrize("ranks", [(), (0,), (2, -1)])
def test_numbers_of_ranks_that_are_none(ranks: tuple[int, ...]) -> None:
    with pytest.raises(air.PipelineError, match="numbers of ranks"):
        diagnose(*mixes(), ranks)


def test_a_malformed_pipeline_is_the_callers_mistake() -> None:
    with pytest.raises(air.PipelineError, match="no-such-pass"):
        diagnose(*mixes(), (2,), pipeline="no-such-pass")


def test_a_diagnosis_is_plain_data() -> None:
    diagnosis = diagnose(*mixes(), (2,), name="mixes")
    plain = json.loads(json.dumps(diagnosis.to_dict()))
    assert plain["model"] == "mixes" and plain["ok"] and plain["verdict"] == "exact with gathers"
    assert plain["inputs"] == {"input_ids": [2, 24], "labels": [2, 24]}
    assert plain["findings"][0]["gathers"][0]["operation"] == "aten.cummax"
    with pytest.raises(KeyError):
        diagnosis.on(3)


@pytest.mark.parametrize(
    ("build", "family"),
    [(lambda: llama(length=8, num_hidden_layers=1), {"matmul", "pointwise", "loss"}), (mixes, {"indexing"})],
)
def test_families_are_those_of_the_layout_rules(build: Callable[[], tuple[nn.Module, Any]], family: set[str]) -> None:
    program = air.capture(*build())
    assert family <= {family_of(node) for node in program.graph.nodes}
