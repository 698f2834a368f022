"""Backend `inductor` on real gloo ranks: exact, compiled once, and in the order of the program."""

from __future__ import annotations

import re

import pytest

from tests.emit import compiled
from tests.gloo import run_ranks
from tests.sampling import sampled

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]
_TOLERANCE = 1e-4
_MODELS = ("llama-gqa", "llama-mqa", "plain", "gpt2", "llama-mha", "qwen3", "mistral")


@pytest.mark.parametrize("name", sampled(_MODELS, 4, 3))
def test_equals_dense_and_compiles_once(name: str) -> None:
    for rank in run_ranks(compiled.two_batches, 2, name, timeout=500.0):
        for loss, gradient in rank.errors:
            assert loss <= _TOLERANCE
            assert gradient <= _TOLERANCE
        # One forward and one backward, compiled for the first batch.
        assert rank.compiled == [2, 2]


@pytest.fixture(scope="module")
def backwards() -> list[str]:
    """What Inductor writes for the backward on each of two ranks."""
    return run_ranks(compiled.backward_code, 2, "llama-gqa", timeout=500.0)


def test_gradients_are_reduced_beside_the_backward_and_awaited_behind_it(backwards: list[str]) -> None:
    """The order of starts and waits survives Inductor's own scheduling."""
    for code in backwards:
        lines = code.splitlines()
        reductions = [i for i, line in enumerate(lines) if "all_reduce_.default(" in line]
        work = [i for i, line in enumerate(lines) if "extern_kernels.mm(" in line]
        attention = [i for i, line in enumerate(lines) if "autosp.attention_backward.default(" in line]
        assert len(attention) == 2
        assert len([i for i in reductions if i < attention[0]]) >= 7, "the upper layer is reduced before the lower one"
        assert len([i for i in reductions if attention[0] < i < attention[1]]) >= 9
        reduced = {_buffer(lines[i]) for i in reductions}
        waits = [i for i, line in enumerate(lines) if "wait_tensor.default(" in line and _buffer(line) in reduced]
        assert len(waits) == len(reductions)
        assert min(waits) > max(work)
        assert "empty_strided_cpu" not in "".join(lines[max(reductions) :])


def test_attention_and_exchanges_hand_each_other_their_results_without_a_copy(backwards: list[str]) -> None:
    """Tokens are outermost in what arrives, in what attention makes of it, and so in the blocks that leave."""
    for code in backwards:
        arrived = re.findall(r"(buf\d+) = torch.ops._c10d_functional.all_to_all_single", code)
        taken = re.findall(r"attention_backward.default\(reinterpret_tensor\((buf\d+)", code)
        made = re.findall(r"assert_size_stride\((buf\d+), .*'torch.ops.autosp.attention_backward.default'", code)
        sent = re.findall(r"all_to_all_single.default\(reinterpret_tensor\((buf\d+)", code)
        assert len(taken) == 2 and set(taken) <= set(arrived)
        assert len(made) == 6 and set(made) <= set(sent)


@pytest.mark.parametrize("pinned", [True, False])
def test_an_overlapped_schedule_survives_inductor_because_it_is_pinned(pinned: bool) -> None:
    """Every exchange, wait, product and attention stands where `overlap` put it; without the pins some do not."""
    expected = compiled.arranged("llama-gqa")
    assert expected.count("attention") == 4, "two groups of heads in each of two layers"
    for order in run_ranks(compiled.forward_order, 2, "llama-gqa", pinned, timeout=500.0):
        assert (order == expected) is pinned


def test_an_overlapped_step_is_bit_identical() -> None:
    assert all(run_ranks(compiled.overlapped_gradients, 2, "llama-gqa", timeout=300.0))


def _buffer(line: str) -> str:
    found = re.search(r"\bbuf\d+", line.partition("default(")[2])
    assert found is not None, line
    return found.group()
