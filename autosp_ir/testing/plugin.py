"""The pytest plugin: `pytest --update-golden` rewrites golden files instead of comparing with them."""

from __future__ import annotations

import os

import pytest

from autosp_ir.testing.golden import UPDATE_VARIABLE


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.getgroup("autosp-ir").addoption(
        "--update-golden", action="store_true", help="rewrite the golden IR files of check_pass instead of comparing"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Pass the option on through the environment, which the workers of pytest-xdist inherit."""
    if config.getoption("--update-golden"):
        os.environ[UPDATE_VARIABLE] = "1"
