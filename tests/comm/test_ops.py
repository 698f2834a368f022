"""The layout operators without a process group: tracing, shapes, one rank, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from autosp_ir.comm.groups import bind_axis, group_of, resolve
from autosp_ir.comm.ops import SCHEMAS, inverse_permutation
from autosp_ir.errors import LayoutError, RuntimeMismatchError

autosp = torch.ops.autosp

# name, attributes before axis and size, attributes after them, output shape of an [8, 12] tensor on 4 ranks, backward.
OPERATORS: list[tuple[str, tuple[Any, ...], tuple[Any, ...], tuple[int, ...], str, tuple[Any, ...]]] = [
    ("invariant_to_replicate", (), (), (8, 12), "all_reduce", ("sp", 4)),
    ("shard", (1,), (), (8, 3), "all_gather", (1, "sp", 4)),
    ("shard", (-1,), (), (8, 3), "all_gather", (-1, "sp", 4)),
    ("all_gather", (0,), (), (32, 12), "shard", (0, "sp", 4)),
    ("all_gather", (0,), ("invariant",), (32, 12), "shard", (0, "sp", 4)),
    ("all_gather", (0,), ("replicate",), (32, 12), "reduce_scatter", (0, "sp", 4)),
    ("reduce_scatter", (0,), (), (2, 12), "all_gather", (0, "sp", 4, "replicate")),
    ("all_reduce", (), (), (8, 12), "invariant_to_replicate", ("sp", 4)),
    ("all_to_all", (0, 1), (), (2, 48), "all_to_all", (1, 0, "sp", 4)),
    ("permute", ([1, 2, 3, 0],), (), (8, 12), "permute", ([3, 0, 1, 2], "sp", 4)),
]
IDS = [f"{name}{before}{after}" for name, before, after, *_ in OPERATORS]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize(("name", "before", "after", "shape", "backward", "backward_args"), OPERATORS, ids=IDS)
def test_traces_with_its_backward(
    mode: Literal["fake", "symbolic"],
    name: str,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    shape: tuple[int, ...],
    backward: str,
    backward_args: tuple[Any, ...],
) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        y = getattr(autosp, name)(x, *before, "sp", 4, *after)
        return y, torch.autograd.grad(y.sum(), x)[0]

    traced = make_fx(step, tracing_mode=mode)(torch.randn(8, 12, requires_grad=True))
    calls = [node for node in traced.graph.nodes if str(node.target).startswith("autosp.")]
    assert [str(call.target) for call in calls] == [f"autosp.{name}.default", f"autosp.{backward}.default"]
    assert calls[0].meta["val"].shape == shape and calls[0].meta["val"].is_contiguous()
    assert calls[1].args[1:] == backward_args
    assert calls[1].meta["val"].shape == (8, 12)


def test_backward_of_the_backward_traces_too() -> None:
    def step(x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(autosp.shard(x, 0, "sp", 2).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.sum(), x)[0]

    traced = make_fx(step, tracing_mode="fake")(torch.randn(4, requires_grad=True))
    assert [str(n.target) for n in traced.graph.nodes].count("autosp.shard.default") == 2


def test_axis_index_traces_as_a_call() -> None:
    traced = make_fx(lambda x: x + autosp.axis_index("sp", 4), tracing_mode="fake")(torch.zeros(2))
    assert "autosp.axis_index.default" in [str(node.target) for node in traced.graph.nodes]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        local = autosp.shard(x, 0, "sp", 4) @ autosp.invariant_to_replicate(self.weight, "sp", 4)
        return (autosp.all_reduce(local.square().sum(), "sp", 4),)


def test_joint_tracing_shows_every_backward_collective() -> None:
    from torch._functorch.aot_autograd import aot_export_module

    with FakeTensorMode():
        joint, _ = aot_export_module(_Block(), (torch.randn(8, 12),), trace_joint=True, output_loss_index=0)
    assert isinstance(joint, GraphModule)
    calls = [str(node.target) for node in joint.graph.nodes if str(node.target).startswith("autosp.")]
    assert calls == [
        "autosp.shard.default",
        "autosp.invariant_to_replicate.default",
        "autosp.all_reduce.default",
        "autosp.invariant_to_replicate.default",
        "autosp.all_reduce.default",
    ]


@pytest.mark.parametrize(("name", "before", "after"), [row[:3] for row in OPERATORS], ids=IDS)
def test_one_rank_needs_no_process_group(name: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    before = ([0],) if name == "permute" else before
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    args = (x, *before, "sp", 1, *after)
    y = getattr(autosp, name)(*args)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert torch.autograd.gradcheck(lambda z: getattr(autosp, name)(z, *args[1:]), x)
    torch.library.opcheck(getattr(autosp, name).default, args)


def test_axis_index_of_one_rank() -> None:
    index = autosp.axis_index("sp", 1)
    assert index.dtype == torch.int64 and index.shape == () and int(index) == 0


def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor) -> Tensor:
        y: Tensor = autosp.all_to_all(autosp.shard(x, 0, "sp", 1), 0, 1, "sp", 1)
        return y.sum()

    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x))


def test_schemas_are_what_is_registered() -> None:
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        assert str(getattr(autosp, name).default._schema).replace("autosp::", "") == schema


def test_inverse_permutation() -> None:
    perm = [2, 0, 3, 1]
    assert [perm[i] for i in inverse_permutation(perm)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: autosp.shard(x, 2, "sp", 2), "out of range"),
        (lambda x: autosp.shard(x, 0, "sp", 2), "cannot be split evenly"),
        (lambda x: autosp.reduce_scatter(x, 0, "sp", 2), "cannot be split evenly"),
        (lambda x: autosp.all_to_all(x, 0, 1, "sp", 2), "cannot be split evenly"),
        (lambda x: autosp.all_to_all(x, 1, -1, "sp", 2), "same dimension"),
        (lambda x: autosp.all_gather(x, 0, "sp", 2, "shard"), "all_gather cannot end in 'shard'"),
        (lambda x: autosp.permute(x, [0, 0], "sp", 2), "not a permutation"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_refusals(call: Callable[[Tensor], Tensor], message: str, traced: bool) -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(LayoutError, match=message):
        make_fx(call, tracing_mode="fake")(x) if traced else call(x)


def test_a_missing_process_group_is_named() -> None:
    with pytest.raises(RuntimeMismatchError, match="not initialized") as error:
        autosp.all_reduce(torch.zeros(2), "sp", 2)
    assert "torchrun" in str(error.value)
    with pytest.raises(RuntimeMismatchError, match="not initialized"):
        resolve("sp")
    assert group_of("sp", 1) is None and callable(bind_axis)
