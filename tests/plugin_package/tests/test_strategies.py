"""Both strategies against the dense model, as forward and as lowered programs."""

from functools import cache

import pytest
import torch
from example_model import batch, model

import autosp_ir as air

FORWARD = "canonicalize,pad-tokens,token-partition,{strategy}"
REST = "differentiate,remat,grad-sync,lower-comm"
GROUPED, UNEVEN, WHOLE = (4, 2, True, 32), (3, 1, True, 27), (2, 2, False, 32)


@cache
def dense(heads: int, kv_heads: int, causal: bool, length: int) -> air.testing.DenseReference:
    return air.testing.DenseReference.of(model(heads, kv_heads, causal), batch(length))


@pytest.mark.parametrize(
    ("settings", "ranks"), [(GROUPED, 2), (GROUPED, 4), (GROUPED, 8), (UNEVEN, 4), (WHOLE, 4)], ids=str
)
@pytest.mark.parametrize("strategy", ["all-gather-kv", "ring-attention"])
def test_loss_and_gradients_are_the_dense_models(
    strategy: str, settings: tuple[int, int, bool, int], ranks: int
) -> None:
    reference = dense(*settings)
    result = air.PassManager(FORWARD.format(strategy=strategy)).run(reference.program, mesh={"sp": ranks})
    assert result.statistics[strategy] == {"attentions": 2}
    reference.check(result.program)
    if settings == GROUPED:
        lowered = air.PassManager(REST).run(result.program).program
        assert lowered.stage is air.Stage.LOWERED
        reference.check(lowered)


class Biased(torch.nn.Module):
    """One attention with a learned bias that broadcasts to the scores."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.bias = torch.nn.Embedding(29, 16), torch.nn.Parameter(torch.randn(*shape))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids `[B, 27]` to a scalar."""
        q = self.embed(input_ids).unflatten(2, (4, 4)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=self.bias)
        return out.transpose(1, 2).flatten(2).square().mean()


@pytest.mark.parametrize("shape", [(27, 27), (1, 4, 27, 27), (4, 1, 27), (2, 1, 1, 27)], ids=str)
def test_a_learned_bias_beside_gathered_keys(shape: tuple[int, ...]) -> None:
    ids = torch.arange(54).remainder(29).view(2, 27)
    reference = air.testing.DenseReference.of(Biased(*shape), {"input_ids": ids})
    pipeline = f"{FORWARD.format(strategy='all-gather-kv')},{REST}"
    reference.check(air.PassManager(pipeline).run(reference.program, mesh={"sp": 4}).program)


def test_what_is_sent() -> None:
    sent = {}
    for strategy in ("all-gather-kv", "ring-attention"):
        pipeline = air.PassManager(FORWARD.format(strategy=strategy))
        program = pipeline.run(dense(*GROUPED).program, mesh={"sp": 4}).program
        sent[strategy] = [c.op for c in air.simulate(program, batch()).comm]
    layers, pair, steps = 2, 2, 3
    assert sent["all-gather-kv"].count("all_gather") == layers * pair
    assert sent["all-gather-kv"].count("reduce_scatter") == layers * pair
    assert sent["ring-attention"].count("permute") == 2 * layers * pair * steps  # forward and backward


def test_a_length_that_is_no_number_is_gathered_but_does_not_go_around() -> None:
    program = air.capture(model(), batch(), dynamic=True)
    result = air.PassManager(FORWARD.format(strategy="all-gather-kv")).run(program, mesh={"sp": 4})
    air.testing.assert_equivalent(model(), result.program, batch(48), world=4)
    with pytest.raises(air.UnsupportedError, match="needs a length that is a number"):
        air.PassManager(FORWARD.format(strategy="ring-attention")).run(program, mesh={"sp": 4})
