"""Which dimension of each input holds the sequence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from autosp_ir.errors import CaptureError

_PRIMARY = {"input_ids": 1, "inputs_embeds": 1}
_SECONDARY = {
    "labels": 1,
    "shift_labels": 1,
    "attention_mask": 1,
    "token_type_ids": 1,
    "loss_mask": 1,
    "position_ids": -1,
}


def resolve_seq_dims(tensors: Mapping[str, Tensor], seq_dims: Mapping[str, int] | None) -> dict[str, int]:
    """Decide the sequence dimension of every input that has one.

    Args:
        tensors: The batch's tensors by name.
        seq_dims: The user's choice, negative dimensions allowed; None infers from well-known names, else from shapes.

    Returns:
        Input name to non-negative dimension; inputs without a sequence are left out.

    Raises:
        CaptureError: The choice does not fit the batch, or there is more than one candidate, or none.
    """
    if seq_dims is not None:
        return _checked(tensors, seq_dims)
    return _by_name(tensors) or _by_shape(tensors)


def _checked(tensors: Mapping[str, Tensor], seq_dims: Mapping[str, int]) -> dict[str, int]:
    resolved: dict[str, int] = {}
    for name, dim in seq_dims.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CaptureError(
                f"seq_dims names {name!r}, which is not a tensor of the batch", hint=f"the batch has {list(tensors)}"
            )
        if not -tensor.ndim <= dim < tensor.ndim:
            raise CaptureError(
                f"seq_dims gives dimension {dim} of {name!r}, which has shape {list(tensor.shape)}",
                hint=f"choose a dimension from 0 to {tensor.ndim - 1}",
            )
        resolved[name] = dim % tensor.ndim
    lengths = {name: int(tensors[name].shape[dim]) for name, dim in resolved.items()}
    if len(set(lengths.values())) > 1:
        raise CaptureError(
            f"the sequence dimensions have different lengths: {lengths}",
            hint="every input named in seq_dims must have the same sequence length",
        )
    if not resolved:
        raise CaptureError("seq_dims is empty", hint=_example(tensors))
    return resolved


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Names that transformers gives its inputs; empty when the batch has neither token ids nor embeddings."""
    primary = next((n for n in _PRIMARY if n in tensors and tensors[n].ndim >= 2), None)
    if primary is None:
        return {}
    length = tensors[primary].shape[_PRIMARY[primary]]
    found = {primary: _PRIMARY[primary]}
    for name, dim in {**_PRIMARY, **_SECONDARY}.items():
        tensor = tensors.get(name)
        # A 4-D mask has two token dimensions and labels of shape [B] have none: neither is a sequence to cut.
        if tensor is None or tensor.ndim < 2 or (tensor.ndim > 2 and name in ("attention_mask", "labels")):
            continue
        if tensor.shape[dim] == length:
            found[name] = dim % tensor.ndim
    return found


def _by_shape(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Integer `[B, S]` tensors fix the sequence; without them it must be the only dimension that fits."""
    ids = {n: t for n, t in tensors.items() if t.ndim == 2 and not t.is_floating_point()}
    lengths = {int(t.shape[1]) for t in ids.values()}
    if len(lengths) == 1:
        length = lengths.pop()
        features = {n: 1 for n, t in tensors.items() if t.ndim >= 3 and t.shape[1] == length}
        return {n: 1 for n in tensors if n in ids or n in features}
    if not ids:
        flat = {n: t for n, t in tensors.items() if t.ndim == 1 and not t.is_floating_point() and t.shape[0] > 1}
        if flat and len({int(t.shape[0]) for t in flat.values()}) == 1 and len(flat) == len(tensors):
            return dict.fromkeys(flat, 0)
    candidates = [f"{n}[{list(t.shape)}]: dimensions {list(range(t.ndim))}" for n, t in tensors.items() if t.ndim]
    raise CaptureError(
        "the sequence dimension cannot be inferred from this batch; candidates are " + "; ".join(candidates),
        hint=_example(tensors),
    )


def _example(tensors: Mapping[str, Tensor]) -> str:
    example = ", ".join(f'"{n}": 1' for n, t in tensors.items() if t.ndim > 1) or '"x": 0'
    return f"say which dimension of which input is the sequence, for example seq_dims={{{example}}}"


__all__ = ["resolve_seq_dims"]
