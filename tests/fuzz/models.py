"""Random transformers through capture, partitioned by random pipelines, against the dense model."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from autosp_ir.testing import DenseReference
from tests.e2e.random_attention import SHARING, SPELLINGS
from tests.e2e.random_models import LOSSES, POSITIONS, Recipe, build_random
from tests.e2e.random_parts import MIXERS, MLPS, NORMS
from tests.fuzz.attention import FORMS, use_form
from tests.fuzz.cases import Case, features_of, run_pipeline
from tests.fuzz.pipelines import draw_pipeline, draw_ranks

# Shift-invariant mixers make some gradients cancel to zero from terms of full size: rounding there is 1e-16 of the
# largest gradient, which the measure reads as 1e-10.
_RTOL = 1e-9
_NEVER_CUT = "bmm"


def draw_model(seed: int) -> dict[str, Any]:
    """Fields of the recipe, the form of attention, the number of ranks and the pipeline."""
    rng = random.Random(seed)
    ranks = draw_ranks(rng)
    heads = ranks * rng.choice([1, 1, 2]) if ranks > 1 and rng.random() < 0.95 else rng.choice([2, 4, 6])
    recipe = Recipe(
        seed=seed,
        loss=rng.choice(LOSSES),
        positions=rng.choice(POSITIONS),
        norm=rng.choice(sorted(NORMS)),
        mlp=rng.choice(sorted(MLPS)),
        spelling=rng.choice([s for s in SPELLINGS if s != _NEVER_CUT]) if rng.random() < 0.97 else _NEVER_CUT,
        sharing=rng.choice(["apart", *SHARING]),
        kv_heads=rng.choice([k for k in range(1, heads + 1) if heads % k == 0]),
        mixer=rng.choice(sorted(MIXERS)) if rng.random() < 0.4 else "none",
        bias=rng.random() < 0.5,
        layers=rng.choice((1, 1, 1, 2)),
        tied=rng.random() < 0.3,
        frozen=rng.random() < 0.3,
        length=rng.choice((8, 12, 15, 16, 21, 24)),
        batch_size=rng.choice((1, 2, 3)),
        heads=heads,
    )
    form = rng.choice(sorted(FORMS)) if rng.random() < 0.5 else "none"
    own = {"form": form, "double": rng.random() < 0.3, "ranks": ranks, "pipeline": draw_pipeline(rng, ranks)}
    return asdict(recipe) | own


def judge_models(case: Case) -> set[str]:
    """A random model: captured, rewritten for some ranks, and compared with itself on one device."""
    drawn = case.apply(draw_model(case.seed))
    form, double, ranks, pipeline = (drawn.pop(name) for name in ("form", "double", "ranks", "pipeline"))
    recipe = Recipe(**drawn)
    model, batch = build_random(recipe)
    use_form(model, form)
    reference = DenseReference.of(model.double() if double else model, batch)
    result = run_pipeline(reference.program, pipeline, ranks)
    reference.check(result.program, _RTOL)
    parts = {f"{name}={getattr(recipe, name)}" for name in _PARTS} | {f"form={form}"}
    return features_of(result, ranks) | parts


_PARTS = ("loss", "positions", "norm", "mlp", "spelling", "sharing", "mixer", "tied", "frozen", "layers")


def simpler(case: Case) -> list[Case]:
    """The case with one choice made plain, for every choice that is not."""
    drawn = case.apply(draw_model(case.seed))
    plain = {
        "loss": "cross-entropy",
        "positions": "none",
        "norm": "none",
        "mlp": "sequential",
        "spelling": "sdpa-causal",
        "sharing": "apart",
        "kv_heads": drawn["heads"],
        "mixer": "none",
        "bias": False,
        "layers": 1,
        "tied": False,
        "frozen": False,
        "batch_size": 1,
        "form": "none",
        "double": True,
    }
    return [case.changed(**{name: value}) for name, value in plain.items() if drawn[name] != value]
