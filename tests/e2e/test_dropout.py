"""Dropout through the line: the dense model's masks with `rng=global`, each rank's own with `rng=per_rank`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autosp_ir as air
from autosp_ir.testing.compare import gradient_floor
from tests.e2e.dropouts import HIDDEN, Awkward, Dropping, batch_of, transformer, under_masks
from tests.e2e.line import check_line, partitioned
from tests.sampling import sampled

GLOBAL = air.DEFAULT_PIPELINE.replace("canonicalize", "canonicalize{rng=global}")
CHUNKED = GLOBAL.replace("pad-tokens", "pad-tokens{multiple=4}").replace("ulysses", "ulysses,head-chunk,tile{wide=1.5}")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("length", [16, 13])
@pytest.mark.parametrize("policy", ["save-all", "min-cut"])
def test_global_masks_are_those_of_the_dense_model(ranks: int, length: int, policy: str) -> None:
    check_line(Dropping(), batch_of(length), ranks, GLOBAL.replace("remat", f"remat{{policy={policy}}}"))


@pytest.mark.parametrize("attention", ["heads", "batch"])
def test_dropout_of_probabilities_in_separate_operators(attention: str) -> None:
    check_line(Dropping(attention), batch_of(13), 2, GLOBAL)
    (node, *_) = partitioned(air.capture(Dropping(attention), batch_of()), 2).find("autosp.attention")
    assert node.arg("keep").producer.arg("index") is not None


@pytest.mark.parametrize("hidden", sorted(HIDDEN.keys() - {"elements"}))
def test_every_spelling_of_dropout(hidden: str) -> None:
    check_line(Dropping(hidden=hidden), batch_of(13), 2, GLOBAL)


@pytest.mark.parametrize("ranks", [1, 2])
def test_chunks_read_one_mask(ranks: int) -> None:
    check_line(Dropping(), batch_of(16), ranks, CHUNKED)
    result = air.PassManager(CHUNKED).run(air.capture(Dropping(), batch_of(16)), mesh={"sp": ranks})
    told = [r.message for r in result.remarks]
    assert "attention stays whole: its dropout mask differs by head" in told
    assert any("in 4 chunks of tokens" in message for message in told)


@pytest.mark.parametrize("model", sampled([Dropping, Awkward], 2))
def test_a_length_that_is_a_symbol(model: type[nn.Module]) -> None:
    program = partitioned(air.capture(model(), batch_of(16, 3), dynamic=True), 2, GLOBAL)
    air.testing.assert_equivalent(model(), program, batch_of(22, 3))


@pytest.mark.parametrize("length", [16, 13])
def test_masks_follow_the_memory_of_the_dense_model(length: int) -> None:
    check_line(Awkward(), batch_of(length, 3), 4, GLOBAL)


@pytest.mark.parametrize(
    "name", ["bert", "pooled bert", "opt", *(pytest.param(n, marks=pytest.mark.long) for n in ("bart", "t5"))]
)
def test_transformers_with_the_dropout_of_their_configuration(name: str) -> None:
    model, batch = transformer(name)
    check_line(model, batch, 2, GLOBAL)


def test_every_cut_of_a_mask_is_drawn_by_its_rank() -> None:
    program = partitioned(air.capture(Awkward(), batch_of(16, 3)), 4)
    masks = [n for n in program.find("autosp.keep_mask") if n.phase is air.Phase.FORWARD]
    cuts = [n.result.tensor_type.layout["sp"] for n in masks]
    assert cuts == [air.Shard(1), air.Shard(0, 3), air.Shard(0, 3), air.Shard(0)]
    assert all(n.arg("index") is not None for n in masks)


class Checkpointed(nn.Module):
    """A checkpoint draws the masks of its forward again in the backward; the program draws once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        checkpointed: Tensor = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return checkpointed.square().mean()


def test_dropout_inside_a_checkpoint() -> None:
    check_line(Checkpointed(), {"x": torch.randn(2, 16, 8)}, 2, GLOBAL, seq_dims={"x": 1})


def test_evaluation_draws_nothing() -> None:
    program = partitioned(air.capture(Dropping().eval(), batch_of()), 2)
    assert not [n for n in program.graph.nodes if n.op.has(air.Trait.RANDOM)]
    check_line(Dropping().eval(), batch_of(), 2)


# rng=per_rank ---------------------------------------------------------------------------------------------------------


def masks_of(program: air.Program, simulation: air.Simulation) -> list[list[Tensor]]:
    """The ranks' forward masks, in the order of the model."""
    order = {n.result: i for i, n in enumerate(program.find("autosp.random_state"))}
    nodes = [n for n in program.find("autosp.keep_mask") if n.phase is air.Phase.FORWARD]
    nodes.sort(key=lambda n: order[n.arg("state")])
    return [[values[n.name] for values in simulation.values] for n in nodes]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [air.DEFAULT_PIPELINE, CHUNKED.replace("global", "per_rank")])
def test_masks_of_ones_own_are_a_mask_of_the_whole(ranks: int, pipeline: str) -> None:
    """A step is the dense model's under the mask that the ranks' parts make up: loss and every gradient."""
    model = Dropping("heads", "everything").double()
    program = partitioned(air.capture(model, batch_of()), ranks, pipeline)
    simulation = air.simulate(program, batch_of(), trace=True)
    # Tokens of [B, S, C] and heads of [B, H, S, S] both lie along dimension 1.
    masks = [torch.cat(parts, 1) for parts in masks_of(program, simulation)]
    assert [tuple(m.shape) for m in masks] == [(2, 16, 16), (2, 4, 16, 16), (2, 16, 16)]
    dense = under_masks(Dropping("heads", "everything").double(), masks)
    loss = dense(**batch_of())
    loss.backward()
    grads = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    assert abs(simulation.loss - loss) <= 1e-12 * abs(loss)
    floor = gradient_floor(grads.values(), 1e-6)
    for name, grad in grads.items():
        assert (simulation.grads[name] - grad).abs().max() <= 1e-10 * max(float(grad.abs().max()), floor), name


def test_ranks_draw_apart_and_the_same_from_the_same_seed() -> None:
    program = partitioned(air.capture(Dropping(), batch_of(64, 8)), 4)
    first, again, other = (air.simulate(program, batch_of(64, 8), seed=s, trace=True) for s in (0, 0, 1))
    drawn = [masks_of(program, s) for s in (first, again, other)]
    for mask, same, different in zip(*drawn, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mask, same, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(mask, different, strict=True))
        assert not any(torch.equal(mask[0], other_rank) for other_rank in mask[1:])
    assert torch.equal(first.loss, again.loss)


def test_every_element_is_kept_as_often_as_asked_and_independently() -> None:
    program = partitioned(air.capture(Dropping(), batch_of(64, 8)), 4)
    masks = masks_of(program, air.simulate(program, batch_of(64, 8), trace=True))
    for parts, keep in zip(masks, (0.8, 0.7, 0.8, 0.9), strict=True):
        deviation = (keep * (1 - keep) / parts[0].numel()) ** 0.5
        for part in parts:
            assert abs(float(part.float().mean()) - keep) < 5 * deviation
        # Two ranks keep the same element as often as chance has it: no rank follows another.
        both = float((parts[0] & parts[1]).float().mean())
        assert abs(both - keep**2) < 5 * (keep**2 * (1 - keep**2) / parts[0].numel()) ** 0.5


class Pooled(nn.Module):
    """A value that ranks hold whole drops out: what a class token is classified from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.drop = nn.Linear(8, 8), nn.Linear(8, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(x).mean(1)
        loss: Tensor = self.head(self.drop(pooled)).square().mean()
        return loss


def test_ranks_hold_one_mask_of_what_they_hold_whole() -> None:
    program = partitioned(air.capture(Pooled(), {"x": torch.randn(2, 16, 8)}, seq_dims={"x": 1}), 4)
    (mask,) = program.find("autosp.keep_mask")[:1]
    assert isinstance(mask.result.tensor_type.layout["sp"], air.Invariant) and mask.arg("index") is None
    simulation = air.simulate(program, {"x": torch.randn(2, 16, 8)}, trace=True)
    drawn = [values[mask.name] for values in simulation.values]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    # A gradient on which ranks disagreed would be a SimulationError.
    assert simulation.grads


# What is refused ------------------------------------------------------------------------------------------------------


def test_masks_of_ones_own_are_not_compared_with_the_dense_model() -> None:
    program = partitioned(air.capture(Dropping(), batch_of()), 2)
    with pytest.raises(air.UnsupportedError, match="does not draw") as raised:
        air.testing.assert_equivalent(Dropping(), program, batch_of())
    assert "canonicalize{rng=global}" in str(raised.value)


def test_a_lost_mask_is_a_lost_dropout() -> None:
    program = air.PassManager("canonicalize").run(air.capture(Dropping(), batch_of())).program
    (node,) = program.find("autosp.attention")
    rewriter = air.Rewriter(program, "careless")
    rewriter.set_arg(node, "dropout", 0.0)
    rewriter.set_arg(node, "keep", None)
    rewriter.dead_code()
    with pytest.raises(air.VerifyError, match="dropout is lost"):
        program.verify()


def test_a_strategy_that_places_no_masks_refuses_them() -> None:
    program = air.PassManager("canonicalize").run(air.capture(Dropping(), batch_of())).program
    (node,) = program.find("autosp.attention")
    with pytest.raises(air.UnsupportedError, match="mask this strategy does not place"):
        air.attention_arguments(node)


def test_doctor_compares_the_masks_of_the_dense_model() -> None:
    (found,) = air.doctor.diagnose(Dropping(), batch_of(), [2]).findings
    assert found.verdict is air.doctor.Verdict.EXACT
