"""`early-loss-gradient`: the same numbers, no logits twice, and losses for which it does not hold."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from autosp_ir.ir.graph import Node, Phase
from autosp_ir.testing import DenseReference
from autosp_passes._linearity import is_linear
from tests.models import build
from tests.passes.test_tile import CUT, Wide, wide
from tests.sampling import sampled

torch.set_num_threads(1)


def early(
    program: air.Program, ranks: int = 1, decompose: bool = True, chunks: int = 4, remat: str = "aggressive=true"
) -> air.PassResult:
    front = "canonicalize" if ranks == 1 else CUT
    sync = "" if ranks == 1 else ",grad-sync"
    pipeline = (
        f"{front},tile{{wide=1.5 chunks={chunks}}},differentiate{{decompose={str(decompose).lower()}}},"
        f"remat{{{remat}}},early-loss-gradient{sync},lower-comm"
    )
    return air.PassManager(pipeline).run(program, mesh={"sp": ranks} if ranks > 1 else {})


def heads(program: air.Program, width: int) -> list[Node]:
    """The products that make logits."""
    products = [n for n in program.graph.nodes if n.is_op("aten.mm")]
    return [n for n in products if n.result.tensor_type.shape[-1] == width]


@pytest.mark.parametrize(
    ("name", "ranks", "decompose"),
    sampled(
        [("llama-tied", 4, False), ("llama-gqa", 2, True), ("gpt2", 1, True), ("plain", 2, False), ("qwen3", 4, True)],
        2,
    ),
)
def test_models_are_exact_and_make_their_logits_once(name: str, ranks: int, decompose: bool) -> None:
    model, batch = build(name, length=32, ignored=5)
    reference = DenseReference.of(model, batch)
    result = early(reference.program, ranks, decompose)
    assert result.statistics["early-loss-gradient"] == {"chunks": 4}
    reference.check(result.program)


def test_logits_are_made_once_and_none_is_kept() -> None:
    model, batch = wide()
    program = early(air.capture(model, batch)).program
    made = heads(program, 256)
    assert len(made) == 4
    assert all(n.phase is Phase.FORWARD for n in made)
    wide_values = [v for n in program.graph.nodes for v in n.results if _columns(v) == 256 and _rows(v) == 16]
    assert not [v for v in wide_values if any(u.phase is not Phase.FORWARD for u in v.users)]


def _columns(value: Any) -> Any:
    return value.type.shape[-1] if isinstance(value.type, air.TensorType) and value.type.shape else None


def _rows(value: Any) -> Any:
    return value.type.shape[-2] if isinstance(value.type, air.TensorType) and len(value.type.shape) > 1 else None


def test_one_chunk_after_the_other() -> None:
    """Logits of a chunk are read for the last time before those of the next are made."""
    model, batch = wide()
    nodes = list(early(air.capture(model, batch)).program.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    made = [n for n in nodes if n.is_op("aten.mm") and _columns(n.result) == 256]
    for one, following in itertools.pairwise(made):
        assert max(order[u] for u in one.result.users) < order[following]


@pytest.mark.parametrize(
    ("backend", "scale"),
    [("aot_eager", 0.3), ("aot_eager", -2.0), pytest.param("inductor", 0.3, marks=pytest.mark.long)],
)
def test_the_gradient_that_arrives_scales_what_was_computed(backend: Any, scale: float) -> None:
    model, batch = wide()
    (scale * model(**batch)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step = early(air.capture(model, batch)).program.emit(backend=backend)
    (scale * step(**batch)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


class Squared(Wide):
    """The gradient of the loss in its logits depends on the loss itself."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(input_ids, labels)
        return loss * loss


class Twice(Wide):
    """Two losses over the same logits, returned as one."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.embed(input_ids)).flatten(0, 1)
        z_loss = logits.logsumexp(-1).square().mean()
        loss: Tensor = torch.nn.functional.cross_entropy(logits, labels.flatten()) + 0.1 * z_loss
        return loss


@pytest.mark.parametrize("kind", [Squared, Twice])
@pytest.mark.parametrize("ranks", [1, 2])
def test_other_losses_stay_exact(kind: type[Wide], ranks: int) -> None:
    torch.manual_seed(0)
    _, batch = wide()
    reference = DenseReference.of(kind(), batch)
    reference.check(early(reference.program, ranks).program)


class Shaped(Wide):
    """A loss of one number that is no scalar."""

    shape: tuple[int, ...] = (1,)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return super().forward(input_ids, labels).reshape(self.shape)


@pytest.mark.parametrize(
    ("shape", "ranks", "dtype"),
    [
        ((1,), 1, torch.float32),
        ((1, 1, 1), 2, torch.float32),
        ((1,), 1, torch.bfloat16),
        ((1, 1, 1), 1, torch.bfloat16),
    ],
)
def test_a_loss_of_one_number_may_have_dimensions(shape: tuple[int, ...], ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    _, batch = wide()
    model = Shaped().to(dtype)
    model.shape = shape
    reference = DenseReference.of(model, batch)
    result = early(reference.program, ranks)
    assert result.statistics["early-loss-gradient"] == {"chunks": 4}
    reference.check(result.program)


@pytest.mark.parametrize("policy", ["save-all", "autosp-sac", "min-cut", "budget fraction=1.0 device=cpu seconds=1"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_policy_of_remat_may_stand_in_front(policy: str, ranks: int) -> None:
    model, batch = wide()
    reference = DenseReference.of(model, batch)
    result = early(reference.program, ranks, remat=f"policy={policy}")
    assert result.statistics["early-loss-gradient"] == {"chunks": 4}
    reference.check(result.program)


class Focal(Wide):
    """What is summed is not what the chunks compute."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.embed(input_ids)).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


def test_the_remark_of_a_tiled_loss_does_not_ask_for_tile() -> None:
    result = early(air.capture(Focal(), wide()[1]))
    [remark] = [r for r in result.remarks if r.pass_name == "early-loss-gradient"]
    assert "run tile" not in remark.message
    assert "not summed inside" in remark.message


class Shifted(nn.Module):
    """A constant is added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_sum_with_a_number_is_not_linear() -> None:
    """It is affine: twice the operand is not twice the result."""
    program = air.capture(Shifted(), {"x": torch.rand(1, 8)}, seq_dims={"x": 1})
    [node] = [n for n in program.graph.nodes if n.is_op("aten.add.Tensor")]
    assert not is_linear(node, set(node.operands))


def test_a_loss_whose_gradient_reads_the_loss_stays_where_it_is() -> None:
    torch.manual_seed(0)
    _, batch = wide()
    result = early(air.capture(Squared(), batch))
    remarks = [r for r in result.remarks if r.pass_name == "early-loss-gradient"]
    assert [r.kind for r in remarks] == ["missed"] or result.statistics["early-loss-gradient"]["chunks"] == 4


def test_float16_stays_where_it_is() -> None:
    model, batch = wide()
    result = early(air.capture(model.half(), batch))
    assert "early-loss-gradient" not in result.statistics or not result.statistics["early-loss-gradient"]
    assert any("float16" in r.message for r in result.remarks)


def test_without_tile_there_is_nothing_to_do() -> None:
    model, batch = wide()
    result = air.PassManager("canonicalize,differentiate,remat,early-loss-gradient").run(air.capture(model, batch))
    assert any("run tile before differentiate" in r.message for r in result.remarks)


def test_gradients_of_a_bfloat16_head_are_added_up_in_float32() -> None:
    model, batch = wide(length=512)
    model.bfloat16()
    reference = DenseReference.of(model, batch)
    result = early(reference.program, chunks=16)
    sums = [n for n in result.program.graph.nodes if n.is_op("autosp.addmm_float32")]
    assert len([n for n in sums if n.result.tensor_type.shape == (256, 16)]) == 15
    assert all(n.result.tensor_type.dtype is torch.float32 for n in sums)
    reference.check(result.program)


def test_a_frozen_head_gets_no_gradient_and_the_rest_stays_exact() -> None:
    model, batch = wide()
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    head.weight.requires_grad_(False)
    reference = DenseReference.of(model, batch)
    result = early(reference.program)
    assert result.statistics["early-loss-gradient"] == {"chunks": 4}
    reference.check(result.program)
