"""The program builder."""

import pytest
import torch

from autosp_ir.errors import AutoSPError, VerifyError
from autosp_ir.ir.graph import Phase
from autosp_ir.ir.program import InputKind, OutputKind, Stage
from autosp_ir.ir.types import Layout, Shard, TensorType
from autosp_ir.rewrite import ProgramBuilder


def test_a_program_reads_like_its_ir() -> None:
    b = ProgramBuilder()
    q, k, v = b.input("q", (1, 4, 8, 16)), b.input("k", (1, 2, 8, 16)), b.input("v", (1, 2, 8, 16))
    out, lse = b.autosp.attention(q, k, v, causal=True)
    w = b.parameter("proj.weight", (16, 16))
    y = b.aten.linear(out, w)
    b.output(loss=b.aten.sum(y))
    program = b.build()
    program.verify()
    assert y.type == TensorType((1, 4, 8, 16), torch.float32)
    assert lse.producer.erased
    assert [(s.kind, s.target) for s in program.signature.inputs][-1] == (InputKind.PARAMETER, "proj.weight")
    assert [s.name for s in program.signature.outputs] == ["loss"]


def test_layouts_of_inputs_are_kept() -> None:
    b = ProgramBuilder(mesh={"sp": 4})
    x = b.input("x", (1, 8, 16), torch.bfloat16, layout={"sp": Shard(1)})
    y = b.call("aten.relu", (x,), name="y")
    b.output(y)
    program = b.build()
    assert program.mesh == {"sp": 4}
    assert y.tensor_type == TensorType((1, 8, 16), torch.bfloat16, layout=Layout({"sp": Shard(1)}))
    assert program.graph.value("y") is y


def test_joint_programs_have_phases_tangents_and_gradients() -> None:
    b = ProgramBuilder(stage="joint", facts={"canonical"}, info={"seq_dims": {"x": 1}})
    x = b.input("x", (2, 3), requires_grad=True)
    y = b.aten.neg(x)
    g = b.tangent("y", like=y)
    with b.phase("backward"), b.source("model.py:3", "block"):
        gx = b.aten.neg(g)
    b.output(y=y)
    b.gradient("x", gx)
    program = b.build()
    assert program.stage is Stage.JOINT
    assert program.facts == {"canonical"}
    assert gx.producer.phase is Phase.BACKWARD
    assert gx.producer.origin.module == "block"
    assert [o.kind for o in program.signature.outputs] == [OutputKind.USER_OUTPUT, OutputKind.GRADIENT]
    program.verify()


def test_bound_tensors_give_shape_and_dtype() -> None:
    b = ProgramBuilder()
    w = b.parameter("w", tensor=torch.ones(3, dtype=torch.float64))
    mean = b.buffer("mean", tensor=torch.zeros(3, dtype=torch.float64))
    c = b.constant("c", torch.ones((), dtype=torch.float64))
    b.output(b.aten.mul.Tensor(b.aten.add.Tensor(w, mean), c))
    b.mutation("mean", w)
    program = b.build()
    program.verify()
    assert w.tensor_type.dtype == torch.float64
    assert set(program.tensors) == {"w", "mean", "c"}


def test_mistakes_are_named_errors() -> None:
    b = ProgramBuilder()
    x = b.input("x", (2, 3))
    with pytest.raises(VerifyError, match="returns nothing"):
        b.build()
    with pytest.raises(VerifyError, match="neither shape nor tensor"):
        b.parameter("w")
    with pytest.raises(AutoSPError, match="did you mean"):
        b.aten.reluu(x)
