"""Settings of the whole suite."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import HealthCheck, settings

from tests.collector import calm_collector

# How fast examples are made is a matter of what else the machine does.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line."""
    parser.addoption("--slice", metavar="K/N", help="the K-th of N parts of what is selected, K from 0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one slice; which test is in which does not depend on the others."""
    wanted = config.getoption("--slice")
    if wanted is None:
        return
    part, _, parts = wanted.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise pytest.UsageError(f"--slice takes K/N with K from 0 to N - 1, not {wanted}")
    inside = {item: zlib.crc32(item.nodeid.encode()) % int(parts) == int(part) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not inside[item]])
    items[:] = [item for item in items if inside[item]]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Slow the garbage collector down once the modules under test are imported."""
    calm_collector()
