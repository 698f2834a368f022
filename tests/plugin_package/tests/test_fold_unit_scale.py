import pytest
from example_model import batch, model

import autosp_ir as air


@pytest.mark.parametrize("ranks", [4, 8])
def test_it_keeps_loss_and_gradients(ranks: int) -> None:
    passes = "canonicalize,fold-unit-scale,pad-tokens,token-partition,all-gather-kv"
    before = air.capture(model(), batch())
    air.testing.check_pass(passes, before, world=ranks, batch=batch(), expect={"aten.mul.Tensor": 0})
