"""Every private torch symbol that autosp_ir uses exists and behaves as its accessor says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist

from autosp_ir import _torch_compat
from autosp_ir.ir.graph import Graph
from autosp_ir.ir.program import Program


def test_resolve_group_name_of_an_unknown_group() -> None:
    assert _torch_compat.resolve_group_name("no such group") is None


def test_group_names_resolve_and_single_collectives_run(tmp_path: object) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None and _torch_compat.resolve_group_name(group.group_name) is group
        x, gathered = torch.arange(3.0), torch.empty(3)
        _torch_compat.all_gather_single(gathered, x, group)
        assert torch.equal(gathered, x)
        store = _torch_compat.default_store()
        store.set("said", "this")
        assert store.clone().get("said") == b"this"
    finally:
        dist.destroy_process_group()


def test_exact_autocast_switches_every_device_and_restores() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    before = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
    with _torch_compat.exact_autocast({"cpu": torch.float16}):
        assert (x @ w.T).dtype == torch.float16 and not torch.is_autocast_cache_enabled()
        with _torch_compat.exact_autocast():
            assert (x @ w.T).dtype == torch.float32
        assert (x @ w.T).dtype == torch.float16
    after = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
    assert after == before
    with _torch_compat.FakeTensorMode(), _torch_compat.exact_autocast({"cuda": torch.bfloat16}):
        fake = torch.empty(2, 3, device="cuda")
        assert (fake @ fake.T).dtype == torch.bfloat16 and fake.softmax(-1).dtype == torch.float32


def test_rejected_fake_operands_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with _torch_compat.FakeTensorMode(), _torch_compat.without_fake_tensor_log(), pytest.raises(RuntimeError):
        torch.empty(2, 3) + torch.empty(2, 4)
    assert not caplog.records


def test_dispatch_modes_see_the_casts_of_autocast() -> None:
    class Seen(_torch_compat.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.casts: list[torch.Tensor] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                self.casts.append(args[0])
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), Seen() as seen:
        torch.nn.functional.linear(x, w)
    assert {id(t) for t in seen.casts} == {id(x), id(w)}


def test_native_dropout_mask() -> None:
    mask = _torch_compat.native_dropout_mask(torch.ones(64, 64), 0.25)
    assert mask.dtype == torch.bool and mask.shape == (64, 64)
    assert 0.7 < float(mask.float().mean()) < 0.8


def test_cpu_flash_attention_pair() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(expected.sum(), (q, k, v))
    out, lse = _torch_compat.cpu_flash_attention()(q, k, v, 0.0, True, scale=0.5)
    torch.testing.assert_close(out, expected)
    backward = _torch_compat.cpu_flash_attention_backward()
    torch.testing.assert_close(backward(torch.ones_like(out), q, k, v, out, lse, 0.0, True, scale=0.5), grads)


@pytest.mark.parametrize(
    ("accessor", "arguments"),
    [
        (
            _torch_compat.cudnn_attention,
            "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
        ),
        (
            _torch_compat.cudnn_attention_backward,
            "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q "
            "max_k dropout_p is_causal scale",
        ),
        (_torch_compat.cuda_flash_attention, "query key value dropout_p is_causal return_debug_mask scale"),
        (
            _torch_compat.cuda_flash_attention_backward,
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
            "philox_seed philox_offset scale",
        ),
        (
            _torch_compat.cuda_efficient_attention,
            "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
        ),
        (
            _torch_compat.cuda_efficient_attention_backward,
            "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask "
            "is_causal scale",
        ),
    ],
)
def test_cuda_attention_schemas(accessor: Callable[[], torch._ops.OpOverload], arguments: str) -> None:
    assert [argument.name for argument in accessor()._schema.arguments] == arguments.split()


def test_a_new_fake_mode_makes_fake_tensors_with_strides() -> None:
    with _torch_compat.new_fake_mode():
        fake = torch.empty_strided((2, 3), (1, 2))
    assert _torch_compat.is_fake(fake) and fake.stride() == (1, 2)


def _traced_product() -> tuple[torch.fx.GraphModule, list[int]]:
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output((graph.call_function(torch.ops.aten.sin.default, (graph.call_function(torch.mul, (x, w)),)), w))
    mode = _torch_compat.new_fake_mode()
    with mode:
        inputs = [torch.empty(3), torch.empty(3, requires_grad=True)]
    return _torch_compat.trace_joint(torch.fx.GraphModule({}, graph), inputs, mode)


def test_a_joint_trace_describes_its_inputs_and_outputs() -> None:
    joint, shared = _traced_product()
    assert shared == [1]
    described = [_torch_compat.describe_joint_value(n.meta["desc"]) for n in joint.graph.nodes if n.op == "placeholder"]
    assert described == [("input", 0), ("input", 1), ("tangent", ("output", 0))]
    output = next(n for n in joint.graph.nodes if n.op == "output")
    outputs = [_torch_compat.describe_joint_value(d) for d in output.meta["desc"] if d is not None]
    assert outputs == [("output", 0), ("output", 1), ("gradient", ("input", 1))]
    assert _torch_compat.describe_joint_value(object()) == ("other", "object")


def test_min_cut_names_what_it_saves() -> None:
    joint, _ = _traced_product()
    saved = _torch_compat.min_cut_saved_names(joint, 2, [1])
    assert saved == {"primals_1", "primals_2"}


def test_min_cut_within_a_budget_and_marked_nodes() -> None:
    joint, _ = _traced_product()
    assert _torch_compat.min_cut_saved_names(joint, 2, [1], budget=0.5) == {"primals_1", "primals_2"}
    joint, _ = _traced_product()
    for node in joint.graph.nodes:
        if node.op == "call_function" and "tangents" not in str([a.name for a in node.all_input_nodes]):
            _torch_compat.mark_must_save(node)
    assert _torch_compat.min_cut_saved_names(joint, 2, [1], budget=0.0) == {"primals_1", "primals_2"}


def test_fx_names_and_calling_conventions() -> None:
    traced = torch.fx.symbolic_trace(torch.nn.ReLU())
    assert isinstance(_torch_compat.fx_calling_convention(traced.graph), torch.fx.graph.CodeGen)
    node = next(iter(traced.graph.nodes))
    _torch_compat.force_fx_name(node, "input")
    assert node.name == "input"
    assert traced.graph.create_node("placeholder", "other", name="input").name != "input"


def test_a_declared_symbol_keeps_its_name_value_and_range() -> None:
    mode = Program(Graph()).fake_mode
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    _torch_compat.declare_symbol(mode.shape_env, symbol, 64, 2, None)
    assert _torch_compat.symbol_facts(mode.shape_env, symbol) == (64, 2, None)
    assert mode.shape_env is not None
    extent = mode.shape_env.create_symintnode(symbol, hint=None)
    assert extent > 3
    assert _torch_compat.symbol_facts(mode.shape_env, symbol) == (64, 4, None)


def test_fake_kernels_fix_no_symbol() -> None:
    mode = Program(Graph()).fake_mode
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    _torch_compat.declare_symbol(mode.shape_env, symbol, 64, 2, None)
    assert mode.shape_env is not None
    with mode, _torch_compat.without_specializing(mode.shape_env):
        x = torch.empty([mode.shape_env.create_symintnode(symbol, hint=None)])
        padded = torch.ops.aten.pad.default(x, [0, 1])
    assert padded.shape[0].node.expr == symbol + 1
    assert symbol not in mode.shape_env.replacements


def test_torch_has_its_own_symbolic_functions() -> None:
    functions = _torch_compat.symbolic_functions()
    assert {"FloorDiv", "PythonMod", "Mod", "CeilDiv", "Max", "Min"} <= functions.keys()
    assert functions["Max"] is not sympy.Max


def test_operators_are_told_from_functions() -> None:
    assert _torch_compat.is_operator(torch.ops.aten.add.Tensor)
    assert _torch_compat.is_operator(torch.ops.higher_order.cond)
    assert not _torch_compat.is_operator(torch.add)


def test_methods_of_tensors_are_told_from_functions() -> None:
    assert _torch_compat.is_tensor_method(torch.Tensor.add)
    assert not _torch_compat.is_tensor_method(torch.add)


def test_nested_containers_flatten_with_names() -> None:
    tree = {"a": [1, (2,)], "b": 3}
    assert _torch_compat.pytree_flatten_with_names(tree) == [(("a", "0"), 1), (("a", "1", "0"), 2), (("b",), 3)]
    assert _torch_compat.pytree_map(lambda leaf: leaf * 10, tree) == {"a": [10, (20,)], "b": 30}


def test_the_fake_mode_of_some_values() -> None:
    mode = _torch_compat.new_fake_mode()
    with mode:
        fake = torch.empty(2)
    assert _torch_compat.fake_mode_of(torch.empty(2), fake) is mode
    assert _torch_compat.fake_mode_of(torch.empty(2)) is None


def test_a_model_with_fake_weights_takes_no_memory() -> None:
    model = torch.nn.Linear(1 << 20, 1 << 20, device="meta")
    with _torch_compat.fake_mode_for_export():
        model = model.to_empty(device="cpu")
    assert _torch_compat.is_fake(model.weight) and model.weight.device.type == "cpu"
