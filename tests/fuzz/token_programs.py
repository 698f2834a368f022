"""Random one-device programs over a token axis, made in the IR: what no model writes, next to what every model does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autosp_ir.errors import AutoSPError
from autosp_ir.ir.graph import Value
from autosp_ir.ir.program import Program
from autosp_ir.rewrite.builder import ProgramBuilder
from tests.comm.random_layouts import LOCAL_STEPS, Ref, Step, Walk

VOCAB = 11
_LENGTHS = (6, 8, 9, 12, 15, 16, 24)
_WIDTHS = (4, 6, 8)
_SMALLEST = 2


def token_program(seed: int, ranks: int, nodes: int) -> tuple[Program, dict[str, Tensor]]:
    """A program of one loss and at most one more output, and a batch.

    Args:
        seed: Chooses everything.
        ranks: Heads are a multiple of them, mostly.
        nodes: About how many functions are applied.

    Returns:
        A forward program with `info["seq_dims"]`, bound to float64 parameters; floats `[B, S, C]`, ids and labels
        `[B, S]`.
    """
    return TokenWalk(seed, ranks).program(nodes)


class TokenWalk(Walk):
    """A walk in which inputs run over tokens; what the operations of `random_layouts` need of a walk is inherited."""

    def __init__(self, seed: int, ranks: int) -> None:
        self.random = rng = random.Random(seed)
        self.ranks = ranks
        self.generator = torch.Generator().manual_seed(seed)
        self.rows, self.length, self.width = rng.choice([1, 2, 3]), rng.choice(_LENGTHS), rng.choice(_WIDTHS)
        self.heads = ranks * rng.choice([1, 2]) if rng.random() < 0.9 else rng.choice([2, 3])
        self.builder = ProgramBuilder(info={"seq_dims": {"x": 1, "ids": 1, "labels": 1}, "training": True})
        shape = (self.rows, self.length)
        self.x = self.builder.input("x", (*shape, self.width), torch.float64, requires_grad=rng.random() < 0.5)
        self.ids, self.labels = (self.builder.input(n, shape, torch.int64) for n in ("ids", "labels"))
        self.values: list[Value] = [self.x]
        self.batch = {
            "x": torch.randn((*shape, self.width), generator=self.generator, dtype=torch.float64),
            "ids": torch.randint(0, VOCAB, shape, generator=self.generator),
            "labels": self._labels(shape),
        }
        # Every program needs a parameter in front of everything, or nothing has a gradient.
        self.values.append(self.linear(self.x, self.width))
        self.values.append(self.call("aten.embedding", self.weight(VOCAB, self.width), self.ids))

    def _labels(self, shape: tuple[int, int]) -> Tensor:
        labels = torch.randint(0, VOCAB, shape, generator=self.generator)
        ignored = torch.rand(shape, generator=self.generator) < 0.3
        return labels.masked_fill(ignored, -100).index_fill(1, torch.tensor([1]), 3)

    def program(self, nodes: int) -> tuple[Program, dict[str, Tensor]]:
        """Apply functions, then reduce everything that nothing reads to one loss."""
        for _ in range(nodes):
            self._attempt(self.random.choice(_FUNCTIONS) if self.random.random() < 0.6 else _local)
        leaves = [self.values[i] for i in self.floats() if not self.values[i].users]
        outputs = {"loss": self._loss(leaves or self.values[-1:])}
        shown = self.random.choice(leaves) if leaves and self.random.random() < 0.3 else None
        if shown is not None:
            outputs["shown"] = shown
        self.builder.output(**outputs)
        return self.builder.build(), self.batch

    def _attempt(self, function: Callable[[TokenWalk], Any]) -> None:
        before = list(self.builder.program.graph.nodes)
        try:
            made = function(self)
        except (AutoSPError, RuntimeError, IndexError, ValueError):
            made = None
        if made is not None:
            self.values.extend(made if isinstance(made, tuple | list) else [made])
            return
        known = set(before)
        for node in reversed(list(self.builder.program.graph.nodes)):
            if node not in known and node.op.kind != "placeholder":
                self.builder.program.graph.erase(node)

    def _loss(self, leaves: list[Value]) -> Value:
        """Means and sums of bounded functions, and one loss over labels."""
        terms = []
        for leaf in leaves:
            bounded = self.call("aten.tanh", leaf)
            reduce = self.random.choice(["mean", "mean", "sum"])
            term = self.call(f"aten.{reduce}", bounded)
            terms.append(self.call("aten.div.Tensor", term, 16.0) if reduce == "sum" else term)
        if self.random.random() < 0.5:
            logits = self.linear(self.token_value(), VOCAB)
            reduction = self.random.choice([1, 1, 2])
            flat = (self.call("aten.reshape", logits, [-1, VOCAB]), self.call("aten.reshape", self.labels, [-1]))
            smoothing = self.random.choice([0.0, 0.0, 0.1])
            loss = self.call("aten.cross_entropy_loss", *flat, None, reduction, -100, smoothing)
            terms.append(self.call("aten.div.Tensor", loss, 8.0))
        total = terms[0]
        for term in terms[1:]:
            total = self.call("aten.add.Tensor", total, term)
        return total

    def call(self, op: str, *args: Any, **kwargs: Any) -> Value:
        """The value of a new node."""
        made: Value = self.builder.call(op, args, kwargs)
        return made

    def parts(self, op: str, *args: Any) -> tuple[Value, ...]:
        """The values of a new node that has several."""
        made: tuple[Value, ...] = self.builder.call(op, args)
        return made

    def weight(self, *shape: int) -> Value:
        """A new parameter; now and then a buffer."""
        scale = 1.0 / math.sqrt(shape[-1])
        tensor = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        name = f"w{len(self.builder.program.tensors)}"
        if self.random.random() < 0.1:
            return self.builder.buffer(name, tensor=tensor)
        return self.builder.parameter(name, tensor=torch.nn.Parameter(tensor))

    def linear(self, value: Value, out: int) -> Value:
        """A projection of the last dimension."""
        inner = int(value.tensor_type.shape[-1])
        bias = [self.weight(out)] if self.random.random() < 0.5 else []
        return self.call("aten.linear", value, self.weight(out, inner), *bias)

    def token_value(self) -> Value:
        """A value `[B, S, C]`, a recent one more often."""
        found = [v for v in self.values if self._is_sequence(v)]
        return self.random.choice(found[-4:] if self.random.random() < 0.7 else found)

    def _is_sequence(self, value: Value) -> bool:
        kind = value.tensor_type
        return (
            kind.dtype.is_floating_point
            and kind.ndim == 3
            and kind.shape[:2] == (self.rows, self.length)
            and kind.shape[2] != 0
        )

    def positions(self) -> Value:
        """Token indices `[S]`."""
        return self.call("aten.arange", self.length, dtype=torch.int64, device=torch.device("cpu"))


def _local(w: TokenWalk) -> Value | None:
    step = w.random.choice(LOCAL_STEPS)(w)
    return None if step is None else _taken(w, step)


def _taken(w: TokenWalk, step: Step) -> Value:
    def resolved(item: Any) -> Any:
        if isinstance(item, Ref):
            return w.values[item.index]
        return type(item)(map(resolved, item)) if isinstance(item, tuple | list) else item

    made = w.builder.call(step.op, resolved(step.args))
    value: Value = made[0] if isinstance(made, tuple) else made
    return value


def _projected(w: TokenWalk) -> Value:
    return w.linear(w.token_value(), w.width)


def _mlp(w: TokenWalk) -> Value:
    x = w.token_value()
    wide = w.linear(x, 4 * w.width)
    active = w.call(w.random.choice(["aten.gelu", "aten.silu", "aten.relu"]), wide)
    if w.random.random() < 0.5:
        active = w.call("aten.mul.Tensor", active, w.linear(x, 4 * w.width))
    return w.call("aten.add.Tensor", x, w.linear(active, int(x.tensor_type.shape[-1])))


def _norm(w: TokenWalk) -> Value:
    x = w.token_value()
    features = int(x.tensor_type.shape[-1])
    if w.random.random() < 0.5:
        return w.call("aten.layer_norm", x, [features], w.weight(features), w.weight(features), 1e-3)
    return w.call("aten.rms_norm", x, [features], w.weight(features), 1e-3)


def _attention(w: TokenWalk) -> Value:
    keys = w.random.choice([k for k in range(1, w.heads + 1) if w.heads % k == 0])
    source = w.token_value()
    over = source if w.random.random() < 0.7 else w.token_value()
    q = _heads(w, source, w.heads)
    k = _heads(w, over, keys)
    v = k if w.random.random() < 0.15 else _heads(w, over, keys)
    if keys != w.heads:
        k, v = (w.call("aten.repeat_interleave.self_int", t, w.heads // keys, 1) for t in (k, v))
    out = w.call("aten.scaled_dot_product_attention", q, k, v, *_mask(w))
    return w.call("aten.reshape", w.call("aten.transpose.int", out, 1, 2), [w.rows, w.length, w.heads * 2])


def _heads(w: TokenWalk, x: Value, heads: int) -> Value:
    split = w.call("aten.view", w.linear(x, heads * 2), [w.rows, w.length, heads, 2])
    return w.call("aten.transpose.int", split, 1, 2)


def _mask(w: TokenWalk) -> tuple[Any, ...]:
    kind = w.random.choice(["causal", "causal", "full", "window", "packed", "bias"])
    if kind == "causal":
        return None, 0.0, True
    if kind == "full":
        return ()
    at = w.positions()
    distance = w.call("aten.sub.Tensor", w.call("aten.unsqueeze", at, 1), at)
    if kind == "bias":
        number = w.call("aten._to_copy", distance, dtype=torch.float64)
        return (w.call("aten.mul.Tensor", number, -0.1),)
    causal = w.call("aten.ge.Scalar", distance, 0)
    if kind == "window":
        return (w.call("aten.logical_and", causal, w.call("aten.lt.Scalar", distance, 4)),)
    document = w.call("aten.cumsum", w.call("aten.eq.Scalar", w.ids, 0), 1)
    rows, columns = (w.call("aten.unsqueeze", document, d) for d in (2, 1))
    same = w.call("aten.unsqueeze", w.call("aten.eq.Tensor", rows, columns), 1)
    return (w.call("aten.logical_and", same, causal),)


def _shift(w: TokenWalk) -> Value:
    x = w.token_value()
    kept = w.call("aten.slice.Tensor", x, 1, 0, -1)
    return w.call("aten.constant_pad_nd", kept, [0, 0, 1, 0], 0.0)


def _convolution(w: TokenWalk) -> Value:
    x = w.token_value()
    channels = int(x.tensor_type.shape[-1])
    groups = w.random.choice([1, channels])
    turned = w.call("aten.transpose.int", x, 1, 2)
    causal = w.random.random() < 0.5
    padded = w.call("aten.constant_pad_nd", turned, [2, 0], 0.0) if causal else turned
    weight = w.weight(channels, channels // groups, 3)
    made = w.call("aten.conv1d", padded, weight, None, [1], [0 if causal else 1], [1], groups)
    return w.call("aten.transpose.int", made, 1, 2)


def _whole_tokens(w: TokenWalk) -> Value:
    x = w.token_value()
    choices: list[Callable[[], Value]] = [
        lambda: w.call("aten.roll", x, [w.random.choice([1, -1, 3])], [1]),
        lambda: w.call("aten.flip", x, [1]),
        lambda: w.call("aten.cumsum", x, 1),
        lambda: w.call("aten.softmax.int", x, 1),
        lambda: w.call("aten.sub.Tensor", x, w.call("aten.amax", x, [1], True)),
        lambda: w.call("aten.sub.Tensor", x, w.call("aten.mean.dim", x, [1], True)),
        lambda: w.call("aten.mul.Tensor", x, w.call("aten.sigmoid", w.call("aten.sum.dim_IntList", x, [1], True))),
        lambda: w.call("aten.sub.Tensor", x, w.call("aten.logsumexp", x, [1], True)),
        lambda: w.call("aten.sub.Tensor", x, w.call("aten.unsqueeze", w.call("aten.select.int", x, 1, 0), 1)),
        lambda: w.call("aten.index_select", x, 1, w.positions()),
        lambda: w.parts("aten.sort", x, 1)[0],
        lambda: w.call("aten.var.correction", x, [1], correction=1, keepdim=True),
    ]
    return w.random.choice(choices)()


def _pooled(w: TokenWalk) -> Value:
    x = w.token_value()
    choices: list[Callable[[], Value]] = [
        lambda: w.call("aten.mean.dim", x, [1]),
        lambda: w.call("aten.amax", x, [1]),
        lambda: w.call("aten.select.int", x, 1, w.random.choice([0, -1])),
        lambda: w.parts("aten.max.dim", x, 1)[0],
        lambda: w.parts("aten.topk", x, _SMALLEST, 1)[0],
        lambda: w.call("aten.slice.Tensor", x, 1, 0, None, 2),
    ]
    return w.random.choice(choices)()


def _gram(w: TokenWalk) -> Value:
    x = w.token_value()
    turned = w.call("aten.transpose.int", x, 1, 2)
    return w.call("aten.matmul", x, w.call("aten.div.Tensor", w.call("aten.matmul", turned, x), float(w.length)))


def _by_position(w: TokenWalk) -> Value:
    x = w.token_value()
    table = w.weight(32, int(x.tensor_type.shape[-1]))
    if w.random.random() < 0.5:
        return w.call("aten.add.Tensor", x, w.call("aten.embedding", table, w.positions()))
    return w.call("aten.add.Tensor", x, w.call("aten.slice.Tensor", table, 0, 0, w.length))


def _masked(w: TokenWalk) -> Value:
    x = w.token_value()
    valid = w.call("aten.unsqueeze", w.call("aten.ne.Scalar", w.labels, -100), -1)
    kept = w.call("aten.mul.Tensor", x, valid)
    if w.random.random() < 0.5:
        return kept
    count = w.call("aten.sum.dim_IntList", valid, [1], True)
    return w.call("aten.div.Tensor", w.call("aten.sum.dim_IntList", kept, [1], True), count)


def _flattened(w: TokenWalk) -> Value:
    x = w.token_value()
    features = int(x.tensor_type.shape[-1])
    flat = w.call("aten.reshape", x, [w.rows * w.length, features])
    made = w.linear(w.call("aten.tanh", flat), features)
    return w.call("aten.view", made, [w.rows, w.length, features])


def _tokens_first(w: TokenWalk) -> Value:
    x = w.call("aten.transpose.int", w.token_value(), 0, 1)
    made = w.linear(x, int(x.tensor_type.shape[-1]))
    return w.call("aten.permute", made, [1, 0, 2])


def _experts(w: TokenWalk) -> Value:
    x = w.token_value()
    scores = w.call("aten.softmax.int", w.linear(x, 3), -1)
    best, _ = w.parts("aten.topk", scores, 1, -1)
    return w.call("aten.mul.Tensor", x, best)


def _halves(w: TokenWalk) -> Value:
    x = w.token_value()
    dim = w.random.choice([1, 2])
    pair = w.parts("aten.chunk", x, 2, dim)
    return w.call("aten.cat", [pair[1], pair[0]], dim)


_FUNCTIONS: tuple[Callable[[TokenWalk], Any], ...] = (
    *(_projected, _mlp, _mlp, _norm, _attention, _attention, _attention, _shift, _convolution, _whole_tokens),
    *(_whole_tokens, _pooled, _gram, _by_position, _masked, _flattened, _tokens_first, _experts, _halves),
)
