"""Products kept in float32: results, and that the compiler writes what they multiply once."""

from __future__ import annotations

import re

import pytest
import torch

from tests.emit.written import halves_of
from tests.models import build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_of_any_strides_are_summed_unrounded(dtype: torch.dtype) -> None:
    """Nothing asks for operands in the order of rows, so that columns and gaps have to do."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 10).to(dtype), torch.randn(6, 16)[:, ::2].to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    wanted = x.to(wide).t() @ y.to(wide)
    total = torch.ops.autosp.mm_float32(x.t(), y)
    assert total.dtype == wide and total.is_contiguous()
    torch.testing.assert_close(total, wanted)
    more = torch.ops.autosp.addmm_float32(total, x.t(), y)
    torch.testing.assert_close(more, 2 * wanted)
    torch.ops.autosp.addmm_float32_(more, x.t(), y)
    torch.testing.assert_close(more, 3 * wanted)


def test_what_is_multiplied_transposed_is_not_written_a_second_time() -> None:
    """The gradient of a weight multiplies what the gradient of its input does: three kernels a chunk, of three tensors.

    Where strides are asked for, Inductor copies the transposed ones, and what makes them falls into two kernels.
    """
    rows, inter = 64, 256
    model, batch = build(
        "llama-gqa", length=4 * rows, dtype=torch.bfloat16, num_hidden_layers=1, intermediate_size=inter
    )
    pipeline = (
        "canonicalize,pad-tokens{multiple=4},token-partition,ulysses,tile{regions=mlp chunks=4 wide=1.5},"
        "differentiate{decompose=true},remat{aggressive=true},grad-sync,lower-comm,overlap{fused=true}"
    )
    _, backward = halves_of(model, batch, pipeline)
    multiplied = re.findall(r"mm_float32_?\.default\(.*", backward)
    assert len(multiplied) == 20, "the gradients of three weights and two of the gradient of the input, four chunks"
    transposed = rf"empty_strided_cpu\(\({inter}, {rows}\), \(1, {inter}\)"
    assert not re.findall(transposed, backward)
    assert len(re.findall(rf"empty_strided_cpu\(\((?:1, )?{rows}, {inter}\)", backward)) == 4 * 6
