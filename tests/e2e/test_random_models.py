"""Random models through the default pipeline: exact, or refused by a named error; never wrong, never another error."""

from __future__ import annotations

import pytest

from autosp_ir.errors import AutoSPError, PassError, SimulationError
from autosp_ir.testing import EquivalenceError
from tests.e2e.line import check_line
from tests.e2e.random_models import Recipe, build_random, draw
from tests.sampling import sampled

# Shift-invariant mixers make some gradients cancel to zero from terms of full size: rounding there is 1e-16 of the
# largest gradient, which the measure reads as 1e-10.
_RTOL = 1e-9


def exact_or_refused(recipe: Recipe, ranks: int) -> bool:
    """Whether the model came out exact; False when it was refused by name.

    Raises:
        AssertionError: It came out wrong, or failed in any other way.
    """
    model, batch = build_random(recipe)
    try:
        check_line(model, batch, ranks, rtol=_RTOL)
    except (EquivalenceError, SimulationError) as error:
        raise AssertionError(f"{recipe} on {ranks} ranks: {error}") from error
    except AutoSPError as error:
        own = not isinstance(error, PassError) or isinstance(error.__cause__, AutoSPError | None)
        assert own and error.hint, f"{recipe} on {ranks} ranks fails without a name or a hint: {error!r}"
        return False
    return True


def ranks_of(seed: int) -> int:
    return 2 if seed % 2 else 4


@pytest.mark.parametrize("seed", range(8))
def test_random_tokenwise_models(seed: int) -> None:
    recipe = draw(seed, mixers=False)
    exact = exact_or_refused(recipe, ranks_of(seed))
    assert exact or recipe.spelling == "bmm", f"refused, but was exact before: {recipe}"


@pytest.mark.parametrize("seed", sampled(range(100, 112), 2))
def test_random_models_whose_tokens_meet_outside_attention(seed: int) -> None:
    recipe = draw(seed, mixers=True)
    exact = exact_or_refused(recipe, ranks_of(seed))
    assert exact or recipe.spelling == "bmm", f"refused, but was exact before: {recipe}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", sampled(range(1000, 1030), 3))
def test_more_random_models(seed: int) -> None:
    exact_or_refused(draw(seed, mixers=seed % 3 > 0), ranks_of(seed))
