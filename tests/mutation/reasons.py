"""Why a mutant that no test notices is no hole, by mutant; "equivalent" where it computes the same."""

from __future__ import annotations

REASONS: dict[str, str] = {}
