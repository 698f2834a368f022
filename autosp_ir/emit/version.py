"""The version of this package's operators, of which caches of compiled code know only the names."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files


@cache
def version_of_operators() -> str:
    """A digest of what computes the operators: code that was compiled for other strides of theirs is not reused."""
    digest = hashlib.sha256()
    for file in sorted(files("autosp_ir.comm").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


__all__ = ["version_of_operators"]
