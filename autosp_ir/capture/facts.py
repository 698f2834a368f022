"""Facts about the values of a batch that a captured program relies on.

Capture may only drop a padding mask because the example's mask was all ones, or a packed-sequence mask because the
example's positions counted up from zero. Such a fact is recorded, and every later batch must satisfy it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autosp_ir._torch_compat import is_fake
from autosp_ir.errors import RuntimeMismatchError


def _counts_up(tensor: Tensor) -> Tensor | None:
    if tensor.ndim == 0 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return None
    expected = torch.arange(tensor.shape[-1], device=tensor.device, dtype=tensor.dtype)
    return (tensor == expected).all()


FACTS: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "arange": (_counts_up, "count 0, 1, 2, … along the last dimension"),
    "ones": (lambda t: (t == 1).all(), "be all ones"),
}
"""What can be known of a tensor's values: the test, 0-d and bool or None for never, and how to say it."""


def facts_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fact that holds for each integer or bool tensor of an example batch, if any does.

    Fake and meta tensors have no values, so nothing is known of them. The device is waited for once.
    """
    asked = [
        (name, fact, holds(tensor))
        for name, tensor in tensors.items()
        if not (tensor.is_floating_point() or tensor.is_complex() or is_fake(tensor) or tensor.device.type == "meta")
        for fact, (holds, _) in FACTS.items()
    ]
    found: dict[str, str] = {}
    for (name, fact, _), answer in zip(asked, _answers([test for _, _, test in asked]), strict=True):
        if answer:
            found.setdefault(name, fact)
    return found


def check_facts(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Check a batch against the facts that a program was built on; the device is waited for once.

    Args:
        facts: Input name to fact, from `program.info["batch_facts"]`.
        tensors: The batch's tensors by name.

    Raises:
        RuntimeMismatchError: A fact does not hold for this batch.
    """
    answers = _answers([FACTS[fact][0](tensors[name]) for name, fact in facts.items()])
    for (name, fact), answer in zip(facts.items(), answers, strict=True):
        if answer:
            continue
        raise RuntimeMismatchError(
            f"input {name!r} must {FACTS[fact][1]}: the captured program dropped a mask because the example's did",
            hint=f"capture again with this batch as the example, so that {name} is kept as a mask",
        )


def _answers(tests: Sequence[Tensor | None]) -> list[bool]:
    """The values of 0-d tensors; None is False."""
    made = [test for test in tests if test is not None]
    values = iter(torch.stack([test.to(made[0].device) for test in made]).tolist() if made else ())
    return [test is not None and bool(next(values)) for test in tests]


__all__ = ["FACTS", "check_facts", "facts_of"]
