"""Settings of the whole suite."""

from __future__ import annotations

import pytest

from tests.collector import calm_collector


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Slow the garbage collector down once the modules under test are imported."""
    calm_collector()
