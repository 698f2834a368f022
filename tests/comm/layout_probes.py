"""One probe or more for every operation that has a layout rule of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autosp_ir.comm.rules.base import RULES
from autosp_ir.comm.rules.pointwise import pointwise
from autosp_ir.ir.ops import op_by_name
from tests.comm.layout_probe import Probe, resolvable, runs

_GENERATOR = torch.Generator().manual_seed(0)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_GENERATOR)


def complex_(*shape: int) -> Tensor:
    return torch.complex(real(*shape), real(*shape))


def positive(*shape: int) -> Tensor:
    return real(*shape).abs() + 0.5


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_GENERATOR)


def mask(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_GENERATOR) > 0.5


def _matmuls() -> list[Probe]:
    return [
        Probe("aten.mm", (real(4, 8), real(8, 4))),
        Probe("aten.bmm", (real(4, 4, 8), real(4, 8, 2))),
        Probe("aten.addmm", (real(4), real(8, 4), real(4, 4))),
        Probe("aten.addmm", (real(8, 4), real(8, 4), real(4, 4))),
        Probe("aten.addmm", (torch.zeros(8, 4, dtype=torch.float64), real(8, 4), real(4, 4)), zeros=(0,)),
        Probe("aten.baddbmm", (real(2, 4, 2), real(2, 4, 8), real(2, 8, 2))),
        Probe("aten.mv", (real(4, 8), real(8))),
        Probe("aten.dot", (real(8), real(8))),
        Probe("aten.outer", (real(4), real(8))),
        Probe("aten.matmul", (real(2, 4, 8), real(8, 4))),
        Probe("aten.matmul", (real(2, 2, 4, 8), real(2, 1, 8, 4))),
        Probe("aten.matmul", (real(4, 2, 4), real(4))),
        Probe("aten.matmul", (real(4), real(2, 4, 2))),
        Probe("aten.linear", (real(2, 4, 8), real(4, 8))),
        Probe("aten.linear", (real(2, 4, 8), real(4, 8), real(4))),
        Probe("aten.einsum", ("bsh,bth->bst", [real(2, 4, 2), real(2, 4, 2)])),
        Probe("aten.einsum", ("bsh->hs", [real(2, 4, 2)])),
    ]


def _views() -> list[Probe]:
    x = real(2, 4, 8)
    probes = [
        Probe("aten.view", (x, [8, 8]), sizes=1),
        Probe("aten.view", (x, [2, 4, 2, 4]), sizes=1),
        Probe("aten.view", (x, [2, 32]), sizes=1),
        Probe("aten.view", (x, [64]), sizes=1),
        Probe("aten.view", (real(64), [2, 4, 8]), sizes=1),
        Probe("aten.view", (real(8, 8), [2, 4, 8]), sizes=1),
        Probe("aten.view", (real(1, 2, 4), [2, 1, 4]), sizes=1),
        Probe("aten.view", (real(2, 2, 2), [2, 1, 2, 2, 1]), sizes=1),
        Probe("aten.reshape", (real(4, 2, 4), [2, 2, 8]), sizes=1),
        Probe("aten._unsafe_view", (real(4, 2, 4), [8, 4]), sizes=1),
        Probe("aten.flatten.using_ints", (x, 0, 1)),
        Probe("aten.flatten.using_ints", (x, 1, 2)),
        Probe("aten.unflatten.int", (x, 2, [2, 4])),
        Probe("aten.unflatten.int", (x, 2, [1, 8])),
        Probe("aten.view_as_complex", (real(2, 4, 2),)),
        Probe("aten.view_as_real", (complex_(2, 4),)),
        Probe("aten.transpose.int", (x, 1, 2)),
        Probe("aten.swapaxes", (x, 0, 2)),
        Probe("aten.t", (real(4, 8),)),
        Probe("aten.mT", (x,)),
        Probe("aten.numpy_T", (x,)),
        Probe("aten.permute", (x, [2, 0, 1])),
        Probe("aten.movedim.int", (x, 0, 2)),
        Probe("aten.unsqueeze", (x, 1)),
        Probe("aten.unsqueeze", (x, -1)),
        Probe("aten.squeeze", (real(2, 1, 4),)),
        Probe("aten.squeeze.dim", (real(2, 1, 4), 1)),
        Probe("aten.squeeze.dim", (real(2, 2, 4), 1)),
        Probe("aten.squeeze.dims", (real(2, 1, 4), [0, 1])),
        Probe("aten.select.int", (x, 1, 2)),
        Probe("aten.expand", (real(2, 1, 4), [3, 2, 4, 4]), sizes=1),
        Probe("aten.expand", (real(1), [2, 4]), sizes=1),
        Probe("aten.expand", (real(4), [4, 4]), sizes=1),
        Probe("aten.expand_as", (real(2, 1, 4), real(2, 4, 4))),
        Probe("aten.expand_as", (real(4), real(4, 4))),
        Probe("aten.slice.Tensor", (x, 1, 1, 3)),
        Probe("aten.slice.Tensor", (x, 1, 0, 9223372036854775807)),
        Probe("aten.slice.Tensor", (x, 1, 0, 4)),
        Probe("aten.slice.Tensor", (x, 1, 0, 2)),
        Probe("aten.slice.Tensor", (x, 1, -2, 9223372036854775807)),
        Probe("aten.narrow", (x, 2, 1, 4)),
        Probe("aten.flip", (x, [1])),
        Probe("prims.rev", (x, [1])),
        Probe("aten.roll", (x, [1], [1])),
        Probe("aten.roll", (x, [1])),
        Probe("aten.constant_pad_nd", (x, [0, 0, 1, 2])),
        Probe("aten.constant_pad_nd", (x, [1, 0], 3.0)),
        Probe("aten.pad", (x, [0, 1], "constant", None)),
        Probe("aten.repeat", (x, [2, 1, 1, 3])),
        Probe("aten.tile", (x, [1, 2])),
        Probe("aten.repeat_interleave.self_int", (x, 2, 1)),
        Probe("aten.repeat_interleave.self_int", (x, 2)),
        Probe("aten.split.Tensor", (x, 2, 2)),
        Probe("aten.split_with_sizes", (x, [2, 6], 2)),
        Probe("aten.split.sizes", (x, [2, 6], 2)),
        Probe("aten.chunk", (x, 3, 2)),
        Probe("aten.unbind.int", (x, 1)),
        Probe("aten.cat", ([x, real(2, 4, 8)], -1)),
        Probe("aten.cat", ([x, real(2, 4, 8)], 1)),
        Probe("aten.cat", ([x, torch.zeros(2, 4, 2, dtype=torch.float64)], 2), zeros=(1,)),
        Probe("aten.stack", ([x, real(2, 4, 8)], 1)),
        Probe("aten.stack", ([x, real(2, 4, 8)], -1)),
    ]
    probes += [Probe(f"aten.{name}", (x,)) for name in ("clone", "contiguous", "detach", "alias")]
    probes += [
        Probe("aten._to_copy", (x,), {"dtype": torch.float32}),
        Probe("aten._to_copy", (x,), {"dtype": torch.int64}),
        Probe("aten._to_copy", (ints(9, 4, 4),), {"dtype": torch.float64}),
        Probe("aten._to_copy", (ints(2, 4, 4),), {"dtype": torch.bool}),
        Probe("prims.convert_element_type", (x, torch.float32)),
        Probe("prims.convert_element_type", (x, torch.int64)),
        Probe("aten.to.dtype", (x, torch.float64)),
        Probe("aten.to.dtype_layout", (x,), {"dtype": torch.float32}),
        Probe("aten.to.device", (x, "cpu", torch.float32)),
        Probe("aten.to.other", (x, ints(2, 4, 4))),
        Probe("aten.type_as", (ints(9, 4, 4), x)),
    ]
    return probes


def _reductions() -> list[Probe]:
    x = real(2, 4, 8)
    probes = [
        Probe("aten.sum", (x,)),
        Probe("aten.sum.dim_IntList", (x, [1])),
        Probe("aten.sum.dim_IntList", (x, [0, 2], True)),
        Probe("aten.sum_to_size", (x, [4, 1]), sizes=1),
        Probe("aten.mean", (x,)),
        Probe("aten.mean.dim", (x, [-1], True)),
        Probe("aten.mean.dim", (x, [0])),
        Probe("aten.cumsum", (x, 1)),
        Probe("aten.softmax.int", (x, -1)),
        Probe("aten._softmax", (x, 1, False)),
        Probe("aten._safe_softmax", (x, -1)),
        Probe("aten.log_softmax.int", (x, 1)),
        Probe("aten._log_softmax", (x, 2, False)),
        Probe("aten._softmax_backward_data", (x, real(2, 4, 8), 1, torch.float64)),
        Probe("aten._log_softmax_backward_data", (x, real(2, 4, 8), 2, torch.float64)),
        Probe("aten.tril", (x,)),
        Probe("aten.triu", (real(4, 2, 2, 2), 1)),
        Probe("aten.diff", (x,)),
        Probe("aten.topk", (x, 2)),
        Probe("aten.sort", (x, 1)),
        Probe("aten.argsort", (x, 1)),
        Probe("aten.glu", (x, -1)),
        Probe("aten.cumprod", (x, 0)),
        Probe("aten.logcumsumexp", (x, 1)),
        Probe("aten.max", (x,)),
        Probe("aten.max.dim", (x, 1)),
        Probe("aten.min.dim", (x, 0, True)),
        Probe("aten.argmax", (x,)),
        Probe("aten.argmax", (x, 1)),
        Probe("aten.any", (mask(4, 4),)),
        Probe("aten.all.dim", (mask(4, 4), 1)),
        Probe("aten.prod", (x,)),
        Probe("aten.prod.dim_int", (x, 1)),
        Probe("aten.var.correction", (x, [-1]), {"correction": 0, "keepdim": True}),
        Probe("aten.var_mean.correction", (x, [-1]), {"correction": 0, "keepdim": True}),
        Probe("aten.std.correction", (x, [1]), {"correction": 1}),
        Probe("aten.linalg_vector_norm", (x, 2.0, [-1], True)),
        Probe("aten.logsumexp", (x, [1])),
        Probe("aten.amax", (x, [1])),
        Probe("aten.amin", (x, [0, 2], True)),
        Probe("aten.count_nonzero", (ints(2, 4, 4),)),
        Probe("aten.count_nonzero.dim_IntList", (ints(2, 4, 4), [1])),
        Probe("aten.any.dims", (mask(4, 4), [1])),
        Probe("aten.var", (x,)),
        Probe("aten.var.dim", (x, [1])),
        Probe("aten.std", (x,)),
        Probe("aten.std.dim", (x, [-1])),
        Probe("aten.norm.ScalarOpt_dim", (x, 2, [-1])),
        Probe("aten.nansum", (x,)),
        Probe("aten.sort.stable", (x,), {"stable": True, "dim": 1}),
        Probe("aten.cummax", (x, 1)),
    ]
    weight, bias = real(8), real(8)
    out, mean, rstd = torch.ops.aten.native_layer_norm(x, [8], weight, bias, 1e-5)
    probes += [
        Probe("aten.layer_norm", (x, [8], weight, bias)),
        Probe("aten.native_layer_norm", (x, [8], weight, bias, 1e-5)),
        Probe("aten.native_layer_norm", (x, [4, 8], None, None, 1e-5)),
        Probe(
            "aten.native_layer_norm_backward",
            (real(*out.shape), x, [8], mean, rstd, weight, bias, [True, True, True]),
        ),
        Probe("aten.rms_norm", (x, [8], weight, 1e-5)),
        Probe("aten._fused_rms_norm", (x, [8], weight, 1e-5)),
    ]
    return probes


def _indexing() -> list[Probe]:
    table, ids = real(6, 4), ints(6, 2, 4)
    data, index = real(4, 4, 8), ints(4, 4, 4, 8)
    return [
        Probe("aten.embedding", (table, ids)),
        Probe("aten.embedding_dense_backward", (real(2, 4, 4), ids, 6, -1, False)),
        Probe("aten.embedding_dense_backward", (real(2, 4, 4), ids, 6, 1, False)),
        Probe("aten.embedding_dense_backward", (real(2, 4, 4), ids, 6, -1, True)),
        Probe("aten.one_hot", (ids, 6)),
        Probe("aten.gather", (data, 1, index)),
        Probe("aten.gather", (data, 0, ints(4, 2, 4, 4))),
        Probe("aten.take_along_dim", (data, index, 1)),
        Probe("aten.scatter_add", (real(4, 4, 8), 1, index, real(4, 4, 8))),
        Probe("aten.scatter_add", (torch.zeros(4, 4, 8, dtype=torch.float64), 1, index, real(4, 4, 8)), zeros=(0,)),
        Probe("aten.scatter.src", (real(4, 8), 1, torch.arange(8).expand(4, 8).contiguous(), real(4, 8))),
        Probe("aten.scatter.value", (torch.zeros(4, 8, dtype=torch.float64), 1, ints(8, 4, 2), 1.0), zeros=(0,)),
        Probe("aten.scatter.value", (real(4, 8), 1, ints(8, 4, 2), 0)),
        Probe("aten.index.Tensor", (table, [ids])),
        Probe("aten.index.Tensor", (data, [None, ints(4, 4)])),
        Probe("aten.index.Tensor", (data, [ints(4, 2, 4), ints(4, 4)])),
        Probe("aten.index.Tensor", (data, [ints(4, 4), None, ints(8, 4)])),
        Probe("aten.index_select", (data, 1, ints(4, 6))),
        Probe("aten.index_add", (real(4, 4, 8), 1, ints(4, 6), real(4, 6, 8))),
        Probe("aten.index_add", (torch.zeros(4, 4, 8, dtype=torch.float64), 1, ints(4, 6), real(4, 6, 8)), zeros=(0,)),
        Probe("aten.index_put", (real(4, 4, 8), [None, ints(4, 6)], real(4, 6, 8), True)),
        Probe("aten.index_put", (real(6, 8), [ints(6, 2, 3)], real(2, 3, 8), True)),
        Probe("aten.index_put", (torch.zeros(6, 4, dtype=torch.float64), [ids], real(2, 4, 4), True), zeros=(0,)),
        Probe("aten.index_put", (real(6, 4), [ids], real(2, 4, 4), True)),
        Probe("aten.index_put", (real(6, 4), [torch.arange(4)], real(4, 4), False)),
        Probe("aten.slice_backward", (real(2, 3, 8), [2, 4, 8], 1, 0, 3, 1), sizes=1),
        Probe("aten.slice_backward", (real(2, 4, 8), [2, 4, 8], 1, 0, 9223372036854775807, 1), sizes=1),
        Probe("aten.select_backward", (real(2, 8), [2, 4, 8], 1, 2), sizes=1),
        Probe("aten.zeros_like", (real(4, 4),)),
        Probe("aten.full_like", (real(4, 4), 2.0)),
        Probe("aten.full", ([2, 4], 3.0), sizes=0),
        Probe("aten.new_zeros", (real(4, 4), [2, 4]), sizes=1),
        Probe("aten.new_full", (real(4, 4), [2, 4], 2.0), sizes=1),
        Probe("aten.scalar_tensor", (3.0,)),
        Probe("aten.arange", (8,)),
        Probe("aten.arange.start", (2, 8)),
        Probe("aten.arange.start_step", (2, 8, 2)),
        Probe("aten.linspace", (0, 1, 4)),
        Probe("aten.eye", (4,)),
        Probe("aten.zeros", ([2, 4],), sizes=0),
        Probe("aten.ones", ([8],), sizes=0),
    ]


def _losses() -> list[Probe]:
    scores, labels, weight = real(8, 5), ints(5, 8), positive(5)
    labels[2] = -100
    picture, classes = real(2, 5, 4), ints(5, 2, 4)
    logp = torch.log_softmax(scores, -1)
    probes: list[Probe] = []
    for reduction in (0, 1, 2):
        loss, total = torch.ops.aten.nll_loss_forward(logp, labels, weight, reduction, -100)

        def shaped(reduction: int = reduction) -> Tensor:
            return real(4, 4) if reduction == 0 else real()

        probes += [
            Probe("aten.cross_entropy_loss", (scores, labels, weight, reduction, -100)),
            Probe("aten.cross_entropy_loss", (scores, labels, None, reduction, -100, 0.1)),
            Probe("aten.cross_entropy_loss", (scores, torch.softmax(real(8, 5), -1), None, reduction)),
            Probe("aten.cross_entropy_loss", (picture, classes, None, reduction)),
            Probe("aten.nll_loss_nd", (logp, labels, None, reduction)),
            Probe("aten.nll_loss_forward", (logp, labels, weight, reduction, -100)),
            Probe("aten.nll_loss_backward", (real(*loss.shape), logp, labels, weight, reduction, -100, total)),
            Probe("aten.mse_loss", (real(2, 4, 2), real(2, 4, 2), reduction)),
            Probe("aten.mse_loss", (real(4, 2), real(2), reduction)),
            Probe("aten.huber_loss", (real(4, 4), real(4, 4), reduction)),
            Probe("aten.kl_div", (real(4, 4), positive(4, 4), reduction)),
            Probe("aten.smooth_l1_loss", (real(4, 4), real(4, 4), reduction)),
            Probe("aten.smooth_l1_loss_backward", (shaped(), real(4, 4), real(4, 4), reduction, 1.0)),
            Probe("aten.huber_loss_backward", (shaped(), real(4, 4), real(4, 4), reduction, 1.0)),
            Probe(
                "aten.binary_cross_entropy_backward",
                (shaped(), torch.rand(4, 4, dtype=torch.float64), mask(4, 4).double(), None, reduction),
            ),
            Probe("aten.binary_cross_entropy", (torch.rand(4, 4), torch.rand(4, 4), None, reduction)),
            Probe(
                "aten.mse_loss_backward",
                (real(4, 2) if reduction == 0 else real(), real(4, 2), real(4, 2), reduction),
            ),
            Probe("aten.binary_cross_entropy_with_logits", (real(4, 4), mask(4, 4).double(), None, None, reduction)),
        ]
    return probes


def _pointwise() -> list[Probe]:
    x, y = real(2, 4, 8), real(2, 4, 8)
    probes = [Probe(f"aten.{op}.Tensor", (x, y)) for op in ("add", "sub", "mul", "div", "rsub")]
    probes += [Probe(f"aten.{op}.Tensor", (x, real(4, 1))) for op in ("add", "mul", "div")]
    probes += [
        Probe("aten.mul.Tensor", (real(2, 1, 8), real(4, 8))),
        Probe("aten.add.Tensor", (x, torch.zeros(2, 4, 8, dtype=torch.float64)), zeros=(1,)),
        Probe("aten.add.Tensor", (x, 1.0)),
        Probe("aten.mul.Tensor", (x, 2.0)),
        Probe("aten.mul.Scalar", (x, 2.0)),
        Probe("aten.add.Scalar", (x, 2.0)),
        Probe("aten.sub.Scalar", (x, 0)),
        Probe("aten.div.Tensor_mode", (x, y), {"rounding_mode": "floor"}),
        Probe("aten.pow.Tensor_Scalar", (x, 2)),
        Probe("aten.neg", (x,)),
        Probe("aten.silu", (x,)),
        Probe("aten.rsqrt", (positive(2, 4),)),
        Probe("aten.eq.Tensor", (1 + ints(2, 4, 4), 1 + ints(2, 4, 4))),
        Probe("aten.ne.Scalar", (ints(3, 4, 4), 1)),
        Probe("aten.where.self", (mask(2, 4, 8), x, y)),
        Probe("aten.where.self", (mask(4, 8), x, torch.zeros(2, 4, 8, dtype=torch.float64)), zeros=(2,)),
        Probe("aten.masked_fill.Scalar", (x, mask(4, 8), 0)),
        Probe("aten.masked_fill.Scalar", (x, mask(4, 8), -1.0)),
        Probe("aten.silu_backward", (x, y)),
        Probe("aten.elu_backward", (x, 1.0, 1.0, 1.0, False, y)),
        Probe("aten.hardtanh_backward", (x, y, -1.0, 1.0)),
        Probe("aten.softplus_backward", (x, y, 1.0, 20.0)),
        Probe("aten.masked_fill.Tensor", (x, mask(4, 8), torch.tensor(0.5, dtype=torch.float64))),
        Probe("aten.where.ScalarOther", (mask(2, 4, 8), x, 0)),
        Probe("aten.where.ScalarOther", (mask(2, 4, 8), x, 1.0)),
        Probe("aten.where.ScalarSelf", (mask(2, 4, 8), 0, x)),
        Probe("aten.where.Scalar", (mask(2, 4, 8), 0.0, 1.0)),
        Probe("aten.floor_divide", (x, y)),
        Probe("aten.floor_divide.Scalar", (x, 2.0)),
        Probe("aten.log_sigmoid", (x,)),
        Probe("aten.gelu_backward", (x, y)),
        Probe("aten.tanh_backward", (x, y)),
        Probe("aten.sigmoid_backward", (x, y)),
        Probe("aten.threshold_backward", (x, y, 0)),
        Probe("aten.leaky_relu_backward", (x, y, 0.1, False)),
        Probe("aten.lerp.Scalar", (x, y, 0.3)),
        Probe("aten.addcmul", (x, y, real(8))),
        Probe("aten.clamp", (x, -1.0, 1.0)),
        Probe("aten.maximum", (x, y)),
    ]
    return probes


def _attention() -> list[Probe]:
    q, k, v = real(2, 4, 4, 2), real(2, 2, 4, 2), real(2, 2, 4, 2)
    out, lse = torch.ops.autosp.attention(q, k, v, causal=True)
    bias = real(1, 1, 4, 4)
    biased = []
    for shape in ((4, 4), (1, 4, 1, 4), (2, 4, 4, 4), (2, 1, 1, 4)):
        learned = real(*shape)
        both = torch.ops.autosp.attention(q, k, v, learned, softcap=2.0)
        operands = (real(2, 4, 4, 2), real(2, 4, 4), q, k, v, learned, None, *both)
        biased.append(Probe("autosp.attention_bias_backward", operands, {"softcap": 2.0}))
    return [
        *biased,
        Probe("autosp.attention", (q, k, v), {"causal": True}),
        Probe("autosp.attention", (q, k, v, bias)),
        Probe("autosp.attention", (q, k, v, real(2, 4, 4, 4))),
        Probe("autosp.attention", (q, k, v, None, ints(2, 2, 4).sort().values), {"causal": True}),
        Probe("autosp.attention_backward", (real(2, 4, 4, 2), None, q, k, v, None, None, out, lse), {"causal": True}),
        Probe(
            "autosp.attention_backward",
            (real(2, 4, 4, 2), real(2, 4, 4), q, k, v, None, None, out, lse),
            {"causal": True},
        ),
        Probe("aten.scaled_dot_product_attention", (q, real(2, 4, 4, 2), real(2, 4, 4, 2), None, 0.0, True)),
        Probe("aten.scaled_dot_product_attention", (q, real(2, 4, 4, 2), real(2, 4, 4, 2), mask(4, 4))),
    ]


def _losses_of_pictures() -> list[Probe]:
    logp, classes = torch.log_softmax(real(2, 5, 4, 2), 1), ints(5, 2, 4, 2)
    probes: list[Probe] = []
    for reduction in (0, 1, 2):
        loss, total = torch.ops.aten.nll_loss2d_forward(logp, classes, None, reduction, -100)
        probes += [
            Probe("aten.nll_loss2d", (logp, classes, None, reduction)),
            Probe("aten.nll_loss2d_forward", (logp, classes, None, reduction, -100)),
            Probe("aten.nll_loss2d_backward", (real(*loss.shape), logp, classes, None, reduction, -100, total)),
        ]
    return probes


def _random() -> list[Probe]:
    x = real(4, 4)
    return [
        Probe("aten.dropout", (x, 0.0, True)),
        Probe("aten.dropout", (x, 0.5, False)),
        Probe("aten.native_dropout", (x, 0.0, True)),
    ]


def _group_norm_backward() -> list[Probe]:
    x, weight = real(4, 4, 2), real(4)
    _, mean, rstd = torch.ops.aten.native_group_norm(x, weight, None, 4, 4, 2, 2, 1e-5)
    rest = (mean, rstd, weight, 4, 4, 2, 2, [True, True, True])
    return [Probe("aten.native_group_norm_backward", (real(4, 4, 2), x, *rest))]


def _written_and_compared() -> list[Probe]:
    x, y = real(2, 4, 8), real(2, 4, 8)
    return [
        Probe("aten.inner", (real(2, 4, 8), real(4, 8))),
        Probe("aten.tensordot", (real(2, 4, 8), real(8, 2, 4), [2, 1], [0, 2])),
        Probe("aten.tensordot", (real(2, 4, 8), real(8, 4), [-1], [0])),
        Probe("aten.tensor_split.sections", (x, 3, 2)),
        Probe("aten.view_as", (x, real(8, 8))),
        Probe("aten.view_as", (x, real(2, 4, 2, 4))),
        Probe("aten.real", (complex_(2, 4),)),
        Probe("aten.imag", (complex_(2, 4),)),
        Probe("aten._conj", (complex_(2, 4),)),
        Probe("aten.tensor_split.indices", (x, [2, 5], -1)),
        Probe("aten.tensor_split.sections", (x, 2, 1)),
        Probe("aten.glu_backward", (real(2, 4, 4), x, -1)),
        Probe("aten.glu_backward", (real(1, 4, 8), x, 0)),
        Probe("aten.slice_scatter", (x, real(2, 4, 3), -1, 2, 5)),
        Probe("aten.slice_scatter", (x, real(2, 2, 8), 1, 0, 9223372036854775807, 2)),
        Probe("aten.slice_scatter", (torch.zeros(2, 4, 8, dtype=torch.float64), real(2, 4, 4), 2, 4), zeros=(0,)),
        Probe("aten.slice_scatter", (x, torch.zeros(2, 4, 4, dtype=torch.float64), 2, 4), zeros=(1,)),
        Probe("aten.select_scatter", (x, real(4, 8), 0, 1)),
        Probe("aten.select_scatter", (x, real(2, 8), -2, 1)),
        Probe("aten.select_scatter", (x, real(2, 4), 2, -1)),
        Probe("aten.select_scatter", (torch.zeros(2, 4, 8, dtype=torch.float64), real(4, 8), 0, 1), zeros=(0,)),
        Probe("aten.select_scatter", (x, torch.zeros(2, 4, dtype=torch.float64), 2, 1), zeros=(1,)),
        Probe("aten.median.dim", (x, 1)),
        Probe("aten.kthvalue", (x, 2, -1)),
        Probe("aten.mode", (ints(3, 4, 8), 1)),
        Probe("aten.aminmax", (x,), {"dim": 1}),
        Probe("aten.aminmax", (x,)),
        Probe("aten.linalg_cross", (real(2, 4, 3), real(1, 4, 3))),
        Probe("aten.cosine_similarity", (x, real(4, 8), 1)),
        Probe("aten.cosine_similarity", (x, real(2, 4, 8), -1)),
        Probe("aten.pairwise_distance", (x, real(4, 8))),
        Probe("aten.group_norm", (real(8, 4), 2, real(4), real(4))),
        Probe("aten.group_norm", (real(4, 4, 2), 2)),
        Probe("aten.native_group_norm", (real(8, 4), real(4), real(4), 8, 4, 1, 2, 1e-5)),
        *_group_norm_backward(),
        Probe("aten.scatter_reduce.two", (real(4, 8), 1, ints(8, 4, 2), real(4, 2), "sum")),
        Probe("aten.scatter_reduce.two", (torch.zeros(4, 8), 1, ints(8, 4, 8), real(4, 8).float(), "amax"), zeros=(0,)),
        Probe("aten.index_copy", (real(4, 4, 8), 1, torch.arange(2), real(4, 2, 8))),
        Probe("aten.index_fill.int_Scalar", (real(4, 4, 8), 1, torch.arange(2), 0.0)),
        Probe("aten.index_fill.int_Tensor", (real(4, 4, 8), 1, torch.arange(2), real())),
        Probe("aten.bucketize.Tensor", (real(4, 8), torch.tensor([-0.5, 0.5]))),
        Probe("aten.searchsorted.Tensor", (torch.tensor([-0.5, 0.5], dtype=torch.float64), real(4, 8))),
        Probe("aten.searchsorted.Tensor", (real(4, 2).sort(-1).values, real(4, 8))),
        Probe("aten.conv1d", (real(2, 4, 8), real(6, 2, 1), real(6), [1], [0], [1], 2)),
        Probe("aten.conv1d", (real(2, 4, 8), real(6, 4, 3), None, [1], [1])),
        Probe("aten.conv1d", (real(4, 8), real(6, 4, 1), None, [2])),
        Probe("aten.conv2d", (real(2, 2, 4, 8), real(2, 2, 1, 3), None, [1, 1], [0, 1])),
        Probe("aten.conv3d", (real(2, 2, 4, 2, 2), real(2, 2, 1, 1, 2), None, [1], [0])),
        Probe("aten.convolution", (real(2, 4, 8), real(6, 4, 1), None, [1], [0], [1], False, [0], 1)),
        Probe("aten.convolution", (real(2, 4, 8), real(4, 6, 1), None, [1], [0], [1], True, [0], 1)),
        *(
            Probe(
                "aten.convolution_backward",
                (real(2, 6, 8), real(2, 4, 8), real(6, 4, k), [6], [1], [k // 2], [1], False, [0], 1, [True] * 3),
            )
            for k in (1, 3)
        ),
        Probe("aten.fill.Scalar", (real(4, 4), 2.0)),
        Probe("aten.fill.Tensor", (real(4, 4), real())),
        Probe("aten.complex", (x, y)),
        Probe("aten.copy", (x, real(4, 1))),
        Probe("aten.view.dtype", (complex_(2, 4), torch.float64)),
        Probe("aten.polar", (x, y)),
        Probe("aten.__and__.Tensor", (1 + ints(8, 4, 4), 1 + ints(8, 4, 4))),
        Probe("aten.special_ndtr", (x,)),
        Probe("aten.log_sigmoid_forward", (x,)),
        Probe("aten.log_sigmoid_backward", (x, y, real(2, 4, 8))),
    ]


WITHOUT_VALUE = frozenset({"aten.empty.memory_format", "aten.empty_like", "aten.new_empty"})
"""Memory that nobody has written: there is nothing to compare."""


def _spelled_alike(known: list[Probe]) -> list[Probe]:
    """Probes for operations that share rule and arguments with one that has a probe."""
    probed = {p.op for p in known}
    found: list[Probe] = []
    for name, rule in sorted(RULES.items()):
        if name in probed | WITHOUT_VALUE or not resolvable(name):
            continue
        for probe in known:
            alike = RULES.get(probe.op, pointwise) is rule and _arguments(probe.op) == _arguments(name)
            if alike and runs(replace(probe, op=name)):
                found.append(replace(probe, op=name))
    return found


def _arguments(name: str) -> list[tuple[str, str, bool]] | None:
    schema = op_by_name(name).schema
    return [(str(a.type), a.name, a.kwarg_only) for a in schema.arguments] if schema is not None else None


def all_probes() -> list[Probe]:
    """Every probe, in order of family."""
    families = (
        *(_pointwise(), _matmuls(), _views(), _reductions(), _indexing()),
        *(_losses(), _losses_of_pictures(), _attention(), _random(), _written_and_compared()),
    )
    known = [probe for family in families for probe in family]
    return [*known, *_spelled_alike(known)]
