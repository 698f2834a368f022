"""A transformers model with random weights, and a batch for it, from what a `config.json` says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir._torch_compat import fake_mode_for_export
from autosp_ir.errors import CaptureError

IGNORE_INDEX = -100
_IGNORED_EVERY = 5
_HINT = "give the config.json of a transformers model: an object with a model_type"


def model_from_config(
    config: str | Path | Mapping[str, Any],
    length: int = 64,
    batch_size: int = 2,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    fake: bool = False,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model in training mode, and a random batch with labels.

    The model's class is the first of `architectures`; without it the one that transformers trains this kind with: a
    decoder on the next token, an encoder on masked tokens, an encoder-decoder on its target, a vision model on classes.

    Args:
        config: A file, or its content.
        length: Tokens per sequence; an encoder-decoder has as many in its source as in its target. Images have the
            size that the config says.
        batch_size: Sequences.
        dtype: Of the weights and images; None takes the config's own.
        seed: Of weights and batch.
        overrides: Entries that replace those of the config.
        fake: Give the model fake weights, which have a size and no memory: for capture and planning alone.

    Returns:
        The model, and keyword arguments for its forward: `input_ids` and `labels`, int64 `[batch_size, length]` with
        every fifth label ignored, or `pixel_values` `[batch_size, channels, height, width]` and `labels`
        `[batch_size]`.

    Raises:
        CaptureError: transformers is not installed, does not know the config, or trains no such model.
    """
    content = {**_content(config), **(overrides or {})}
    kind = content.get("model_type")
    transformers = _transformers()
    if kind not in transformers.CONFIG_MAPPING:
        raise CaptureError(f"transformers knows no model_type {kind!r}", hint=_HINT)
    torch.manual_seed(seed)
    try:
        made = transformers.CONFIG_MAPPING[kind].from_dict(content)
        with torch.device("meta") if fake else nullcontext():
            model: nn.Module = _model_class(transformers, made)._from_config(made)
    except CaptureError:
        raise
    except Exception as error:  # whatever a model's constructor raises is about its config
        raise CaptureError(
            f"transformers cannot build a {kind} model from this config: {type(error).__name__}: {error}",
            hint="check that the config loads with transformers.AutoConfig and fits the installed release",
        ) from error
    if dtype is not None:
        model = model.to(dtype)
    if fake:
        with fake_mode_for_export():
            model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed + 1)
    return model.train(), _batch(made, model, length, batch_size, generator)


def _content(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    try:
        read = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptureError(f"{config} cannot be read as a config: {error}", hint=_HINT) from error
    if not isinstance(read, dict):
        raise CaptureError(f"{config} holds no JSON object", hint=_HINT)
    return read


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CaptureError("a config.json needs transformers", hint="pip install 'autosp-ir[hf]'") from error
    return transformers


def _model_class(transformers: Any, config: Any) -> Any:
    named = next(iter(config.architectures or ()), None)
    if named is not None and hasattr(transformers, named):
        return getattr(transformers, named)
    auto = transformers.models.auto.modeling_auto
    masked = () if getattr(config, "is_decoder", False) else (auto.MODEL_FOR_MASKED_LM_MAPPING,)
    tables = (
        *((auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,) if config.is_encoder_decoder else masked),
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )
    found = next((table[type(config)] for table in tables if type(config) in table), None)
    if found is None:
        raise CaptureError(
            f"transformers has no language or image model for model_type {config.model_type!r}",
            hint="name the class in the config's architectures, or give a factory that returns (model, batch)",
        )
    return found[0] if isinstance(found, tuple) else found


def _batch(
    config: Any, model: nn.Module, length: int, batch_size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return _images(config, model, batch_size, generator)
    text = config.get_text_config()
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")}
    # Special ids would decide on positions and masks, which a batch without padding does not have.
    usable = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    ids = usable[torch.randint(0, len(usable), (batch_size, length), generator=generator)]
    labels = usable[torch.randint(0, len(usable), (batch_size, length), generator=generator)]
    labels = labels if config.is_encoder_decoder else ids.clone()
    labels[:, 1::_IGNORED_EVERY] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def _images(config: Any, model: nn.Module, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.randn(batch_size, config.num_channels, height, width, generator=generator)
    labels = torch.randint(0, config.num_labels, (batch_size,), generator=generator)
    return {"pixel_values": pixels.to(next(model.parameters()).dtype), "labels": labels}


__all__ = ["IGNORE_INDEX", "model_from_config"]
