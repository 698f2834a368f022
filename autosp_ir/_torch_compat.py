"""The one place that touches torch's private API.

Each symbol has an accessor here and a test in `tests/test_torch_compat.py`, so that a torch upgrade breaks in one
place with one message. Supported: torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as _UntypedDispatchMode


class TorchDispatchMode(_UntypedDispatchMode):
    """Torch's dispatch mode, with a constructor that type checkers know."""

    def __init__(self) -> None:
        construct: Callable[[Any], None] = _UntypedDispatchMode.__init__
        construct(self)


def resolve_group_name(name: str) -> dist.ProcessGroup | None:
    """Find a process group by its c10d name (`ProcessGroup.group_name`); None when there is no such group."""
    from torch.distributed import distributed_c10d

    private: Any = distributed_c10d
    try:
        group = private._resolve_process_group(name)
    except (RuntimeError, LookupError):
        return None
    return group if isinstance(group, dist.ProcessGroup) else None


def default_store() -> Any:
    """The rendezvous store of the default process group, with `clone()` and `timeout`, which its stub lacks."""
    from torch.distributed import distributed_c10d

    private: Any = distributed_c10d
    return private._get_default_store()


def all_gather_single(output: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Gather every rank's `x` into `output`, concatenated along dimension 0; torch 2.13 renamed the call."""
    gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, x, group=group)


def reduce_scatter_single(output: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum `x` over the ranks and keep this rank's block of dimension 0; torch 2.13 renamed the call."""
    scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, x, group=group)


def native_dropout_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """The bool mask that torch's CUDA dropout draws for a tensor like this one; True keeps an element."""
    mask: torch.Tensor = torch.ops.aten.native_dropout(like, p, True)[1]
    return mask


def cpu_flash_attention() -> torch._ops.OpOverload:
    """The fused CPU attention: `(q, k, v, dropout, is_causal, *, attn_mask, scale) -> (out, lse)`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def cpu_flash_attention_backward() -> torch._ops.OpOverload:
    """The backward of `cpu_flash_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cudnn_attention() -> torch._ops.OpOverload:
    """`(q, k, v, bias, compute_lse, dropout, causal, debug, *, scale) -> (out, lse [B, H, S, 1], …)`."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default


def cudnn_attention_backward() -> torch._ops.OpOverload:
    """The backward of `cudnn_attention`."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def cuda_flash_attention() -> torch._ops.OpOverload:
    """The fused CUDA attention for half types: `(q, k, v, dropout, is_causal, debug, *, scale) -> (out, lse, …)`."""
    return torch.ops.aten._scaled_dot_product_flash_attention.default


def cuda_flash_attention_backward() -> torch._ops.OpOverload:
    """The backward of `cuda_flash_attention`."""
    return torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def cuda_efficient_attention() -> torch._ops.OpOverload:
    """The fused CUDA attention for any floating type but float64; `lse` is [B, H, S rounded up to 32].

    `(q, k, v, bias, compute_lse, dropout, is_causal, *, scale) -> (out, lse, …)`, as many key heads as query heads.
    """
    return torch.ops.aten._scaled_dot_product_efficient_attention.default


def cuda_efficient_attention_backward() -> torch._ops.OpOverload:
    """The backward of `cuda_efficient_attention`."""
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def pytree_flatten_with_names(tree: object) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of nested containers with their paths as strings: `[(("0", "weight"), leaf), …]`."""
    from torch.utils import _pytree

    flat, _ = _pytree.tree_flatten_with_path(tree)
    return [(tuple(_key_name(key) for key in path), leaf) for path, leaf in flat]


def _key_name(key: object) -> str:
    for attribute in ("key", "idx", "name"):
        found = getattr(key, attribute, None)
        if found is not None:
            return str(found)
    return str(key)


def pytree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `fn` to the leaves of nested containers."""
    from torch.utils import _pytree

    return _pytree.tree_map(fn, tree)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor is fake: it has a shape but no values."""
    from torch._subclasses.fake_tensor import is_fake as torch_is_fake

    return torch_is_fake(tensor)


def fake_mode_of(*values: Any) -> Any:
    """The `FakeTensorMode` that the fake tensors among `values` belong to; None when there is none."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode(values)


def is_operator(target: object) -> bool:
    """Whether a target is an operator overload or a higher-order operator."""
    return isinstance(target, OpOverload | HigherOrderOperator)


def is_tensor_method(target: object) -> bool:
    """Whether a target is a method of tensors written in C++, such as `torch.Tensor.add`."""
    return getattr(target, "__objclass__", None) is torch._C.TensorBase


def symbolic_functions() -> dict[str, Any]:
    """Torch's own sympy functions by name (`FloorDiv`, `PythonMod`, `Max`, …); sympy's namesakes differ from them."""
    import sympy
    from torch.utils._sympy import functions

    return {n: f for n, f in vars(functions).items() if isinstance(f, type) and issubclass(f, sympy.Basic)}


def symbol_facts(shape_env: Any, symbol: Any) -> tuple[int | None, int | None, int | None]:
    """A symbol's example value, lower and upper bound in a `ShapeEnv`; None where it has none."""
    hint, bounds = _example_values(shape_env).get(symbol), shape_env.var_to_range.get(symbol)
    low, high = (bounds.lower, bounds.upper) if bounds is not None else (None, None)
    return _finite(hint), _finite(low), _finite(high)


def _example_values(shape_env: Any) -> dict[Any, Any]:
    found: dict[Any, Any] | None = getattr(shape_env, "backed_var_to_val", None)  # torch 2.12 and newer
    return shape_env.var_to_val if found is None else found


def _finite(number: Any) -> int | None:
    return int(number) if number is not None and getattr(number, "is_Integer", False) else None


def declare_symbol(shape_env: Any, symbol: Any, hint: int | None, low: int | None, high: int | None) -> None:
    """Make a symbol known to a `ShapeEnv` under its own name, which torch's public calls cannot."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import ValueRangesSLoc
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    if hint is not None:
        _example_values(shape_env)[symbol] = sympy.Integer(hint)
    shape_env.var_to_range[symbol] = ValueRanges(-int_oo if low is None else low, int_oo if high is None else high)
    here = shape_env._get_sloc()
    shape_env.var_to_range_sloc[symbol] = ValueRangesSLoc(here, here)
    shape_env.var_to_sources[symbol] = []


@contextlib.contextmanager
def without_specializing(shape_env: Any) -> Iterator[None]:
    """Run fake kernels on symbolic extents through their Python decompositions, recording no fact about a symbol.

    The C++ kernels of some composite operators read plain sizes, which would fix a symbol to its example value.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with enable_python_dispatcher(), shape_env.suppress_guards():
        yield


_AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def exact_autocast(dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[None]:
    """Run with autocast on for these device types and off for all others, without its cache.

    Unlike `torch.autocast` this works for fake tensors of a device that the machine does not have.

    Args:
        dtypes: Device type to the dtype that autocast computes in; None switches autocast off.
    """
    wanted = dtypes or {}
    devices = sorted({*_AUTOCAST_DEVICES, *wanted})
    before = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices}
    if not wanted and not any(enabled for enabled, _ in before.values()):
        yield
        return
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(cached and not wanted)
        for device in devices:
            torch.set_autocast_enabled(device, device in wanted)
            torch.set_autocast_dtype(device, wanted.get(device, before[device][1]))
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for device, (enabled, dtype) in before.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def fx_calling_convention(graph: torch.fx.Graph) -> Any:
    """The code generator of an FX graph, which holds its calling convention (`Graph.set_codegen` takes it back)."""
    return graph._codegen


def force_fx_name(node: torch.fx.Node, name: str) -> None:
    """Give an FX node a name that its graph would have altered, such as one that hides a Python builtin."""
    node.name = name
    node.graph._graph_namespace._used_names.add(name)


_UNSHARED_OUTPUTS = ("non_alias", "unsafe_view_alias", "custom_function_view")


def trace_joint(
    module: torch.fx.GraphModule, inputs: Sequence[Any], fake_mode: Any, *, decompose: bool = False
) -> tuple[torch.fx.GraphModule, list[int]]:
    """Trace forward and backward of a graph as one flat ATen graph, by AOTAutograd.

    Args:
        module: A graph that takes flat arguments and returns a flat tuple.
        inputs: Fake tensors and SymInts of `fake_mode`; `requires_grad` says which gradients to compute.
        decompose: Trace with Inductor's decompositions, so that what can be fused or recomputed is visible.
        fake_mode: The mode that owns the inputs.

    Returns:
        The joint graph, whose placeholders and output carry `meta["desc"]` (read it with `describe_joint_value`), and
        the positions of forward outputs that share storage with an input or another output: torch leaves those out
        of the backward.
    """
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
    from torch._guards import TracingContext, tracing

    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(TracingContext(fake_mode)))
        stack.enter_context(torch.enable_grad())
        # The forward graph says every dtype; an ambient autocast would cast a second time.
        stack.enter_context(exact_autocast())
        table = inductor_decompositions() if decompose else None
        joint = aot_export_joint_with_descriptors(stack, module, tuple(inputs), decompositions=table)
        outputs = joint._aot_state.fw_metadata.output_info
        shared = [i for i, o in enumerate(outputs) if o.output_type.name not in _UNSHARED_OUTPUTS]
        return joint.graph_module, shared


def inductor_decompositions() -> dict[Any, Any]:
    """Inductor's decomposition table, operator -> Python function, less the operators that layouts know better whole.

    The scattering backward operators fuse no better for being decomposed before the layouts are inferred, and their
    parts (scatters into zeros by computed index) say less about where the result lives. A `stack` as a `cat` along a
    cut dimension, of which blocks are viewed apart again, the `as_strided` in a group norm and the written rows of an
    `index_fill` say nothing of it. Inductor decomposes them itself when it compiles.
    """
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    scatters = {aten.embedding_dense_backward, aten.slice_backward, aten.select_backward}
    whole = scatters | {aten.stack, aten.index_fill, aten.native_group_norm, aten.native_group_norm_backward}
    return {op: rule for op, rule in select_decomp_table().items() if getattr(op, "overloadpacket", op) not in whole}


def trace_decomposed(graph: torch.fx.GraphModule, inputs: Sequence[Any], fake_mode: Any) -> torch.fx.GraphModule:
    """Trace an ATen graph again with all of Inductor's decompositions.

    Args:
        graph: A functional ATen graph that takes flat arguments.
        inputs: Fake tensors and SymInts of `fake_mode`.
        fake_mode: The mode that owns the inputs.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode, torch.no_grad():
        return make_fx(graph, decomposition_table=select_decomp_table())(*inputs)


def write_in_place(graph: torch.fx.Graph, functional: OpOverload, mutable: OpOverload, argument: str) -> None:
    """Let Inductor write results over an operand that nothing reads later, and copy the operand where something does.

    Args:
        graph: A traced graph with fake values in `meta["val"]`.
        functional: An operator of one result.
        mutable: One of the same arguments that writes the result over `argument` and returns nothing.
        argument: The operand that is written.
    """
    import operator

    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    names = [a.name for a in functional._schema.arguments]
    for node in graph.find_nodes(op="call_function", target=functional):
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        with graph.inserting_before(node):
            call = graph.call_function(auto_functionalized, (mutable,), given)
            result = graph.call_function(operator.getitem, (call, 1))
        value = node.meta["val"]
        call.meta["val"], result.meta["val"] = (None, value), value
        node.replace_all_uses_with(result)
        graph.erase_node(node)


# Pointwise operations that may be computed in one expression; Inductor's own limits are 30 and 8 operands.
_INLINED = 100


def compile_with_inductor(
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    fake_mode: Any,
    *,
    is_backward: bool,
    donated: Sequence[int] = (),
    last_pass: Any = None,
    version: str = "",
    reuse: bool = True,
    inline: bool = False,
) -> tuple[Callable[[list[Any]], Any], list[tuple[int, ...] | None]]:
    """Compile a decomposed ATen graph.

    Args:
        graph: From `trace_decomposed`.
        inputs: The fake inputs it was traced with; the compiled code demands their strides.
        fake_mode: The mode that owns the inputs.
        is_backward: Whether the graph is a backward.
        donated: Positions of inputs whose memory the code may overwrite, because nothing else reads them.
        last_pass: From `graph_pass`: runs behind Inductor's own graph passes.
        version: Of the operators in the graph, of which Inductor's cache knows the names alone.
        reuse: Whether a buffer that is no longer read may be kept for a later one of its size, or goes back to the
            allocator at once.
        inline: Whether long chains of pointwise operations stay one expression.

    Returns:
        A callable that takes one list of arguments and empties it, and the strides of its outputs (None where an
        output is no tensor).
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    context = TracingContext(fake_mode)
    # The two fields of AOTAutograd's metadata that Inductor reads.
    metadata: Any = SimpleNamespace(bw_donated_idxs=list(donated), static_input_indices=[])
    context.fw_metadata = metadata
    changes: dict[str, Any] = {"allow_buffer_reuse": reuse and config.allow_buffer_reuse}
    if inline:
        changes |= {"realize_opcount_threshold": _INLINED, "realize_acc_reads_threshold": _INLINED}
    if last_pass is not None:
        changes["post_grad_custom_post_pass"] = last_pass
    settings: Any = torch.compiler.config
    own_entries = settings.patch(cache_key_tag=f"{settings.cache_key_tag}{version}")
    with tracing(context), TracingContext.report_output_strides() as strides, config.patch(changes), own_entries:
        # Its patterns turn the scatter of a loss's backward into arithmetic that fuses: no second logits tensor.
        graph = joint_graph_passes(graph)
        compiled: Callable[[list[Any]], Any] = compile_fx_inner(graph, list(inputs), is_backward=is_backward)
    returned: Any = graph.graph.output_node().args[0]
    known: list[Any] = list(strides or [])
    return compiled, known if len(known) == len(returned) else [None] * len(returned)


def order_nodes(graph: torch.fx.Graph, behind: Mapping[torch.fx.Node, Iterable[torch.fx.Node]]) -> None:
    """Make nodes of one of Inductor's graphs depend on others, which its scheduler keeps in front of them.

    Args:
        graph: A graph of Inductor after its own passes. It is changed.
        behind: For each node what it stands behind.
    """
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch.utils._ordered_set import OrderedSet

    preserve_node_ordering(graph, {node: OrderedSet(others) for node, others in behind.items()})


def graph_pass(run: Callable[[torch.fx.Graph], None], name: str) -> Any:
    """A pass for `torch._inductor.config.post_grad_custom_post_pass`.

    Args:
        run: Changes a graph in place.
        name: Identifies what it does, for Inductor's cache of compiled graphs.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Named(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> Any:
            return name

    return Named()


def spin(seconds: float, device: torch.device) -> None:
    """Queue a kernel of one thread that does nothing for a while.

    Args:
        seconds: How long at 2 GHz, the clock that no GPU of today exceeds: longer on one of a lower clock.
        device: A CUDA device; its current stream.
    """
    with torch.cuda.device(device):
        torch.cuda._sleep(int(seconds * 2e9))


def storage_key(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share storage, fake ones included."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def backward_is_retained() -> bool:
    """Whether the running backward was called with `retain_graph=True`."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def clear_saved_tensors(ctx: Any) -> None:
    """Let the tensors an autograd function saved die with their last reader, unless the graph is retained."""
    ctx.maybe_clear_saved_tensors()


def describe_joint_value(descriptor: Any) -> tuple[str, Any]:
    """What an input or output of a joint graph stands for, as `(kind, target)`.

    Returns:
        `("input", i)` and `("output", i)` by position in the traced call, `("attribute", path)` for a parameter or
        buffer of the traced module, `("tangent", described output)`, `("gradient", described input)`,
        `("mutation", described input)`, or `("other", type name)`.
    """
    name = type(descriptor).__name__
    if name in ("PlainAOTInput", "PlainAOTOutput"):
        return ("input" if name == "PlainAOTInput" else "output"), descriptor.idx
    if name in ("ParamAOTInput", "BufferAOTInput"):
        return "attribute", descriptor.target
    if name == "TangentAOTInput":
        return "tangent", describe_joint_value(descriptor.output)
    if name == "GradAOTOutput":
        return "gradient", describe_joint_value(descriptor.grad_of)
    if name == "InputMutationAOTOutput":
        return "mutation", describe_joint_value(descriptor.mutated_input)
    return "other", name


def min_cut_saved_names(
    joint: torch.fx.GraphModule,
    forward_outputs: int,
    static_inputs: Sequence[int],
    *,
    budget: float = 1.0,
    aggressive: bool = False,
) -> set[str]:
    """The names of the values that torch's min-cut partitioner saves for the backward.

    Args:
        joint: A joint graph of which it may change anything: placeholders first, tangents with targets that contain
            "tangents", one flat output tuple with the forward's outputs in front.
        forward_outputs: How many of the outputs are the forward's.
        static_inputs: Positions of parameters and buffers, which cost nothing to save.
        budget: Torch's `activation_memory_budget`: below 1 it also computes costly operations again.
        aggressive: Torch's `aggressive_recomputation`: only matrix products, attention and the like are kept.
    """
    from torch._functorch import config
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    # Without merging equal nodes, every name it decides on is the name of a node that was given.
    with config.patch(cse=False, activation_memory_budget=budget, aggressive_recomputation=aggressive):
        _, backward = min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=forward_outputs, static_lifetime_input_indices=list(static_inputs)
        )
    inputs = [n for n in backward.graph.nodes if n.op == "placeholder"]
    return {n.name for n in inputs if "tangents" not in str(n.target)}


def mark_must_recompute(node: torch.fx.Node) -> None:
    """Forbid torch's partitioner to save a node, as a checkpointed region of the user would."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0


def mark_must_save(node: torch.fx.Node) -> None:
    """Forbid torch's partitioner to compute a node again: the backward gets it saved, if it needs it."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


@contextlib.contextmanager
def without_fake_tensor_log() -> Iterator[None]:
    """Keep torch from logging the Python stack of an operation that rejects its fake operands; it still raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def fake_mode_for_export() -> Any:
    """A fake-tensor mode in which a model with fake weights can be built and exported."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True)


def new_fake_mode() -> Any:
    """A fake-tensor mode of its own, without symbols."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
