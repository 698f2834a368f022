from __future__ import annotations

import pytest
import torch

from autosp_ir.emit.fx_export import export_graph
from autosp_ir.emit.split import crossing_values, split_joint
from autosp_ir.errors import UnsupportedError
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.program import InputKind, OutputKind, Program
from autosp_ir.ir.types import TensorType, TupleType
from autosp_ir.pipeline.manager import PassManager
from tests.passes.joints import decoder, decoder_batch, decoder_tangents, forward_program, run_joint, run_split


@pytest.fixture(scope="module")
def joint() -> Program:
    return PassManager("differentiate").run(forward_program(decoder(), decoder_batch())).program


def test_halves_compute_what_the_whole_computes(joint: Program) -> None:
    batch, tangents = decoder_batch(), decoder_tangents()
    expected, got = run_joint(joint, batch, tangents), run_split(split_joint(joint), batch, tangents)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[n], got[n]) for n in expected)


def test_signatures_meet_at_the_saved_values(joint: Program) -> None:
    forward, backward, saved = split_joint(joint)
    assert backward is not None
    forward.verify()
    backward.verify()
    assert not [i for i in forward.signature.inputs if i.kind is InputKind.TANGENT]
    given = [o.target for o in forward.signature.outputs if o.kind is OutputKind.SAVED]
    taken = [i.target for i in backward.signature.inputs if i.kind is InputKind.SAVED]
    assert given == taken == list(saved) == [v.name for v in crossing_values(joint)]
    assert all(o.kind is OutputKind.GRADIENT for o in backward.signature.outputs)
    assert {n.phase for n in forward.graph.nodes if n.op.kind == "call_function"} == {Phase.FORWARD}
    assert Phase.FORWARD not in {n.phase for n in backward.graph.nodes if n.op.kind == "call_function"}


def test_halves_export(joint: Program) -> None:
    for half in split_joint(joint)[:2]:
        assert isinstance(half, Program)
        gm = export_graph(half)
        gm.graph.lint()
        assert len(gm.graph.nodes) == len(half.graph)


def test_the_whole_is_untouched(joint: Program) -> None:
    before = str(joint)
    split_joint(joint)
    assert str(joint) == before


def test_a_tuple_cannot_cross(joint: Program) -> None:
    program = joint.clone()
    norm = program.find("aten.native_layer_norm")[0]
    assert isinstance(norm.result.type, TupleType)
    first = next(u for u in norm.users)
    assert isinstance(first.result.type, TensorType)
    first.phase = Phase.BACKWARD
    with pytest.raises(UnsupportedError, match="neither a tensor nor a number"):
        split_joint(program)
