"""DDP, ZeroRedundancyOptimizer and FSDP2 around a step, on dp 2 x sp 2 over gloo, and checkpoints across meshes."""

from __future__ import annotations

import pytest

from tests.emit import compose
from tests.gloo import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]
_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, compose.Composed]]:
    return run_ranks(compose.composed, 4, str(tmp_path_factory.mktemp("checkpoints")), timeout=400.0)


@pytest.mark.parametrize("how", compose.WRAPPERS)
def test_wrapped_steps_train_as_dense_and_resume_on_another_mesh(
    how: str, found: list[dict[str, compose.Composed]]
) -> None:
    for rank in found:
        assert max(rank[how]) <= _TOLERANCE, rank[how]
