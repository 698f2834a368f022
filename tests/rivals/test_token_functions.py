"""However a loss reads its tokens, it and every gradient are the dense model's, at a length that needs padding."""

from __future__ import annotations

import pytest

import autosp_ir as air
from tests.rivals.line import run_line
from tests.rivals.token_functions import FUNCTIONS, build

SHARDED = frozenset(
    {
        "label_smoothing",
        "class_weights",
        "summed_loss",
        "classes_second",
        "log_probabilities",
        "mean_squares",
        "distance_bias",
        "learned_bias",
        "divergence",
        "binary_targets",
        "large_logits_penalty",
        "expert_balance",
        "contrast_between_rows",
        "rolled_labels",
        "shifted_across_rows",
        "masked_mean",
        "gram_matrix",
        "sequence_first",
        "by_position",
        "preference",
        "gated_halves",
        "complex_rotation",
        "norm_of_rows",
        "similarities",
        "middle_values",
        "filled_columns",
        "counted_bins",
        "dense_by_tensordot",
        "summary_by_token",
        "summary_by_token_in_front",
        "repeated_on_the_left",
        "weights_of_a_batch",
        "summary_by_head",
        "linear_attention",
    }
)
"""What gathers nothing; the others gather some tokens, with a remark, and are exact too."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_and_gathered_only_where_known(name: str) -> None:
    model, batch = build(name, batch_size=3, length=15)
    line = run_line(model, batch, 2)
    assert (line.gathered == []) == (name in SHARDED), line.gathered


@pytest.mark.parametrize(
    "name",
    ["preference", "gated_halves", "norm_of_rows", "similarities", "filled_columns", "summary_by_head"],
)
def test_exact_as_a_compiler_sees_it(name: str) -> None:
    """Backends that compile trace the step decomposed: what it is decomposed to needs rules of its own."""
    pipeline = air.DEFAULT_PIPELINE.replace("differentiate", "differentiate{decompose=true}")
    assert run_line(*build(name, batch_size=2, length=13), 2, pipeline).gathered == []
