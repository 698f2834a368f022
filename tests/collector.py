"""The garbage collector in test processes."""

from __future__ import annotations

import gc


def calm_collector() -> None:
    """Collect seldom, and never look at what is imported already.

    Tracing makes many small objects while torch and transformers keep millions alive: with Python's own thresholds a
    quarter of the suite's time is spent walking them again and again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
