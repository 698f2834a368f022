"""Facts about the values of a batch that a captured program relies on.

Capture may only drop a padding mask because the example's mask was all ones, or a packed-sequence mask because the
example's positions counted up from zero. Such a fact is recorded, and every later batch must satisfy it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autosp_ir._torch_compat import is_fake
from autosp_ir.errors import RuntimeMismatchError


def _counts_up(tensor: Tensor) -> bool:
    if tensor.ndim == 0 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    expected = torch.arange(tensor.shape[-1], device=tensor.device, dtype=tensor.dtype)
    return bool((tensor == expected).all())


FACTS: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "arange": (_counts_up, "count 0, 1, 2, … along the last dimension"),
    "ones": (lambda t: bool((t == 1).all()), "be all ones"),
}
"""What can be known of a tensor's values: the test, and how to say it."""


def facts_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fact that holds for each integer or bool tensor of an example batch, if any does.

    Fake and meta tensors have no values, so nothing is known of them.
    """
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or is_fake(tensor) or tensor.device.type == "meta":
            continue
        fact = next((f for f, (holds, _) in FACTS.items() if holds(tensor)), None)
        if fact is not None:
            found[name] = fact
    return found


def check_facts(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Check a batch against the facts that a program was built on.

    Args:
        facts: Input name to fact, from `program.info["batch_facts"]`.
        tensors: The batch's tensors by name.

    Raises:
        RuntimeMismatchError: A fact does not hold for this batch.
    """
    for name, fact in facts.items():
        holds, words = FACTS[fact]
        if holds(tensors[name]):
            continue
        raise RuntimeMismatchError(
            f"input {name!r} must {words}: the captured program dropped a mask because the example's did",
            hint=f"capture again with this batch as the example, so that {name} is kept as a mask",
        )


__all__ = ["FACTS", "check_facts", "facts_of"]
