"""Transformers models: attention captured as one operator, masks captured as they are defined.

With stock attention, export turns every causal model's mask into data that disables flash attention. For the
duration of a capture the models of a module tree use an attention function that emits `autosp::attention` and a mask
function that spells every mask out, causal or not. Whether a mask is plain causal is then *proved* on the graph
(`autosp_ir.analysis.masks`), never assumed: what cannot be proved stays as a mask.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir.comm import attention as _attention_operator  # noqa: F401 - registers autosp::attention
from autosp_ir.comm import random_masks as _random_operators  # noqa: F401 - registers autosp::keep_mask
from autosp_ir.errors import UnsupportedError

IMPLEMENTATION = "autosp_capture"
"""Name under which the attention and mask functions are registered while a capture runs."""

_REPLACED = {"sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
_CHANGES_SCORES = {
    "s_aux": "attention sinks",
    "cache": "a paged cache",
    "cu_seq_lens_q": "packed sequences given by cumulative lengths",
    "cu_seq_lens_k": "packed sequences given by cumulative lengths",
    "head_mask": "a head mask",
}
_UNSUPPORTED_FLAGS = {
    "use_cache": "a key/value cache",
    "output_attentions": "attention weights as outputs",
}


def transformers_models(model: nn.Module) -> list[Any]:
    """Every transformers model inside `model`; empty when transformers was never imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return []
    return [m for m in model.modules() if isinstance(m, modeling.PreTrainedModel)]


def check_arguments(model: nn.Module, constants: Mapping[str, Any]) -> None:
    """Refuse what a captured step of a transformers model cannot return.

    Raises:
        UnsupportedError: The batch or the config asks for a cache or for attention weights.
    """
    found = transformers_models(model)
    if not found:
        return
    for flag, words in _UNSUPPORTED_FLAGS.items():
        if constants.get(flag):
            raise UnsupportedError(
                f"{flag}=True asks for {words}, which a training step does not have", hint=f"leave {flag} out"
            )
    if any(getattr(m.config, "output_attentions", False) for m in found):
        raise UnsupportedError(
            "config.output_attentions asks for attention weights, which are never materialised",
            hint="set config.output_attentions = False",
        )


@contextlib.contextmanager
def captured_attention(model: nn.Module, use_cache: bool | None = None) -> Iterator[None]:
    """Let the transformers models inside `model` emit `autosp::attention`; everything is restored afterwards.

    Models whose attention cannot be exchanged keep their own, and their graph is recognised later.

    Args:
        model: A transformers model, or a module that contains some.
        use_cache: What the batch says; None leaves it to the configs, as a call of the model would.
    """
    found = transformers_models(model)
    if not found:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_registered(model))
        stack.enter_context(_without_cache(model, use_cache))
        for config in _exchangeable(model, found):
            stack.enter_context(_temporarily(config, "_attn_implementation_internal", IMPLEMENTATION))
        yield


def _configs(model: nn.Module) -> list[Any]:
    """Every distinct config object in the tree: submodules may hold their own."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            configs.setdefault(id(config), config)
    return list(configs.values())


def _exchangeable(model: nn.Module, found: list[Any]) -> list[Any]:
    # A model that stock SDPA computes needs nothing but what SDPA reads; others keep their own attention.
    fixed = {id(m.config) for m in found if not (m._can_set_attn_implementation() and m._supports_sdpa)}
    return [
        c for c in _configs(model) if id(c) not in fixed and (c._attn_implementation_internal or "sdpa") in _REPLACED
    ]


@contextlib.contextmanager
def _without_cache(model: nn.Module, use_cache: bool | None) -> Iterator[None]:
    """Trace without a key/value cache, with the masks that the call would have had.

    A training step needs no cache, but transformers looks for packed sequences in the positions only when there is
    none: a model called with its cache attends across them, and so must the program.
    """
    from transformers import masking_utils

    cached = [c for c in _configs(model) if getattr(c, "use_cache", False)]
    with contextlib.ExitStack() as stack:
        for config in cached:
            stack.enter_context(_temporarily(config, "use_cache", False))
        if cached and use_cache is None:
            stack.enter_context(_temporarily(masking_utils, "find_packed_sequence_indices", lambda positions: None))
        yield


@contextlib.contextmanager
def _temporarily(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


@contextlib.contextmanager
def _registered(model: nn.Module) -> Iterator[None]:
    """Register the attention and mask functions, and take them out again."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    names = {id(module): name for name, module in model.named_modules()}

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _attention(names.get(id(module), type(module).__name__), module, *args, **kwargs)

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)
        AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)


def _mask(**arguments: Any) -> Tensor | None:
    """The mask as a bool tensor, `[B, 1, Sq, Skv]`, without any shortcut: shortcuts are proofs, and come later."""
    from transformers.masking_utils import sdpa_mask

    shortcuts = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(**{**arguments, **shortcuts})
    return mask


def _attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: `[B, H, S, D]` in, `[B, S, H, D]` out, keys and values unexpanded."""
    _refuse_unknown(name, kwargs)
    causal = attention_mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and not _same(query.shape[2], key.shape[2]):
        raise UnsupportedError(
            f"causal attention in {name} has {query.shape[2]} queries but {key.shape[2]} keys and no mask",
            hint="train without a cache, on whole sequences",
        )
    bias = attention_mask if position_bias is None else _biased(position_bias, attention_mask)
    attributes: dict[str, Any] = {"causal": causal, "scale": scaling, "softcap": softcap}
    if dropout:
        attributes |= {"dropout": dropout, "keep": _keep(query, key, dropout)}
    out, _ = torch.ops.autosp.attention(query, key, value, bias, **attributes)
    return out.transpose(1, 2).contiguous(), None


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias under a mask, as stock SDPA attention spells it; what the mask says is proved on the graph."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def _keep(query: Tensor, key: Tensor, dropout: float) -> Tensor:
    """Which probabilities dropout keeps: bool `[B, H, Sq, Skv]`, as eager attention draws them."""
    shape = [*query.shape[:3], key.shape[2]]
    where = {"device": query.device, "dtype": query.dtype}
    state = torch.ops.autosp.random_state(None, shape, dropout, **where)
    keep: Tensor = torch.ops.autosp.keep_mask(state, shape, dropout, **where)
    return keep


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _refuse_unknown(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that change the scores. Others are ignored by stock SDPA attention, and so by this one."""
    for argument, words in _CHANGES_SCORES.items():
        if kwargs.get(argument) is not None:
            raise UnsupportedError(
                f"attention in {name} uses {words} ({argument}), which autosp.attention does not express",
                hint="use a model or a configuration without it",
            )


__all__ = ["captured_attention", "check_arguments", "transformers_models"]
