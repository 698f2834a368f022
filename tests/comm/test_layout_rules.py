"""Every layout rule is numerically true: what it claims of local results puts together to the global result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autosp_ir.comm.layout import infer_layout
from autosp_ir.comm.rules.base import RULES
from autosp_ir.errors import LayoutError
from autosp_ir.ir.graph import Graph
from autosp_ir.ir.program import Program, Stage
from autosp_ir.ir.types import INVARIANT, PARTIAL, Placement, Shard, TensorType
from tests.comm.accepted import check_accepted, probe_names
from tests.comm.layout_probe import Probe, ask, expected_of, is_true, placements_of, resolvable, truths
from tests.comm.layout_probes import WITHOUT_VALUE, all_probes, real

PROBES = all_probes()
NAMES = probe_names(PROBES)

# These have no kernel on a CPU, no tensor result, or communicate; the last are tested on simulated ranks.
WITHOUT_PROBE = frozenset({"aten._fused_rms_norm_backward"})
PREFIXES_WITHOUT_PROBE = ("aten.sym_", "autosp.", "_c10d_functional.")


@pytest.mark.parametrize("probe", PROBES, ids=[f"{i}-{p.op}" for i, p in enumerate(PROBES)])
def test_no_rule_makes_a_false_claim(probe: Probe) -> None:
    answers = list(truths(probe, limit=150))
    false = [f"{[str(p) for p in a.placements]} -> {a.outcome}" for a, true in answers if not true]
    assert not false, f"{probe.op} claims what is not so: {false[:5]}"
    assert answers, f"{probe.op} accepts nothing, not even whole operands"
    # A rule that refuses more than before is safe, but a loss: models would gather, or be refused.
    check_accepted(NAMES[id(probe)], [f"{', '.join(map(str, a.placements))} -> {a.outcome}" for a, _ in answers])


def test_every_rule_has_a_probe() -> None:
    probed = {p.op for p in PROBES} | WITHOUT_PROBE | WITHOUT_VALUE
    # Examples in the documentation register rules of their own.
    own = [n for n, rule in RULES.items() if rule.__module__.startswith("autosp_ir.")]
    assert len(own) > 200
    assert not [n for n in own if n not in probed and not n.startswith(PREFIXES_WITHOUT_PROBE)]
    assert not [n for n in own if not resolvable(n)]


@st.composite
def _reshapes(draw: st.DrawFn) -> tuple[Tensor, list[int], Placement, Placement]:
    """A value of 2- and 3-smooth extents, another factorisation of it, and a cut of each."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 2, 3]), min_size=2, max_size=6))
    before, after = (_grouped(draw, factors) for _ in range(2))
    value = real(*before)
    cut = draw(st.sampled_from(placements_of(value)))
    wanted = draw(st.sampled_from(placements_of(value.reshape(after))))
    return value, after, cut, wanted


def _grouped(draw: st.DrawFn, factors: list[int]) -> list[int]:
    extents = [1]
    for factor in factors:
        if draw(st.booleans()):
            extents.append(1)
        extents[-1] *= factor
    return extents


@given(_reshapes())
@settings(max_examples=300, deadline=None)
def test_a_reshape_keeps_the_ranks_where_they_stand(case: tuple[Tensor, list[int], Placement, Placement]) -> None:
    value, after, cut, wanted = case
    probe = Probe("aten.view", (value, after), sizes=1)
    expected = expected_of(probe)
    try:
        outcome, results = ask(probe, [cut], expected, wanted if isinstance(wanted, Shard) else INVARIANT)
    except Exception as error:  # refused by the rule, or by the kernel for sizes cut in the wrong place
        assert type(error).__name__ in ("LayoutError", "VerifyError", "RuntimeError")
        return
    if outcome == wanted or not isinstance(outcome, Shard):
        assert is_true(outcome, results, expected)


@pytest.mark.parametrize(
    ("probe", "placements", "expected"),
    [
        (Probe("aten.linear", (real(2, 4, 8), real(6, 8), real(6))), ["S(1)", "I", "I"], "S(1)"),
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["S(1)", "S(0)"], "P"),
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["S(1, 2)", "S(0, 2)"], "P"),
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["S(0)", "I"], "S(0)"),
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["I", "S(1)"], "S(1)"),
        (Probe("aten.add.Tensor", (real(4, 8), real(8))), ["S(0)", "I"], "S(0)"),
        (Probe("aten.mul.Tensor", (real(4, 8), real(8))), ["P", "I"], "P"),
        (Probe("aten.sum.dim_IntList", (real(4, 8), [0])), ["S(0)"], "P"),
        (Probe("aten.sum.dim_IntList", (real(4, 8), [0])), ["S(1)"], "S(0)"),
        (Probe("aten.cat", ([real(4, 2), real(4, 6)], 1)), ["S(0)", "S(0)"], "S(0)"),
    ],
)
def test_what_must_be_accepted(probe: Probe, placements: list[str], expected: str) -> None:
    accepted = {tuple(map(str, a.placements)): str(a.outcome) for a, true in truths(probe) if true}
    assert accepted[tuple(placements)] == expected


@pytest.mark.parametrize(
    ("probe", "placements"),
    [
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["S(1)", "I"]),
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["S(0)", "S(1)"]),
        (Probe("aten.mm", (real(4, 8), real(8, 4))), ["P", "P"]),
        (Probe("aten.addmm", (real(4), real(4, 8), real(8, 4))), ["I", "S(1)", "S(0)"]),
        (Probe("aten.add.Tensor", (real(4, 8), real(4, 8))), ["P", "I"]),
        (Probe("aten.add.Tensor", (real(4, 8), real(4, 8))), ["S(0)", "I"]),
        (Probe("aten.add.Tensor", (real(4, 8), 1.0)), ["P"]),
        (Probe("aten.div.Tensor", (real(4, 8), real(4, 8))), ["I", "P"]),
        (Probe("aten.silu", (real(4, 8),)), ["P"]),
        (Probe("aten.mean.dim", (real(4, 8), [0])), ["S(0)"]),
        (Probe("aten._softmax", (real(4, 8), 1, False)), ["S(1)"]),
        (Probe("aten.cumsum", (real(4, 8), 0)), ["S(0)"]),
        (Probe("aten.slice.Tensor", (real(4, 8), 0, 0, 2)), ["S(0)"]),
        (Probe("aten.cat", ([real(4, 2), real(2, 2)], 0)), ["S(0)", "S(0)"]),
        (Probe("aten.embedding", (real(4, 8), torch.tensor([0, 3]))), ["S(0)", "I"]),
        (Probe("aten.native_layer_norm", (real(4, 8), [8], None, None, 1e-5)), ["S(1)"]),
    ],
)
def test_what_must_be_refused(probe: Probe, placements: list[str]) -> None:
    accepted = {tuple(map(str, a.placements)) for a, _ in truths(probe)}
    assert tuple(placements) not in accepted


def test_the_same_partial_operand_twice_is_a_product_of_sums() -> None:
    program = Program(Graph(), stage=Stage.JOINT, mesh={"sp": 2})
    kind = TensorType((4,), real(4).dtype).on_axis("sp", PARTIAL)
    value = program.graph.create("placeholder", ("x",), type=kind).result
    squared = program.graph.create("aten.mul.Tensor", (value, value), type=kind)
    with pytest.raises(LayoutError, match=r"product of partial sums|read twice"):
        infer_layout(squared, program, "sp")
