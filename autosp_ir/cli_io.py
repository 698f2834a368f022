"""What the commands share: programs in, programs and tables out."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosp_ir._torch_compat import pytree_map
from autosp_ir.errors import AutoSPError, CaptureError, PipelineError
from autosp_ir.ir.program import Program

CONFIG_SUFFIX = ".json"


def read_mesh(text: str) -> dict[str, int]:
    """Axis sizes from `dp=2,sp=4`.

    Raises:
        AutoSPError: The text is no mesh.
    """
    try:
        return {axis.strip(): int(size) for axis, _, size in (part.partition("=") for part in text.split(","))}
    except ValueError as error:
        raise AutoSPError(f"{text!r} is no mesh", hint="write axis=size pairs, such as --mesh dp=2,sp=4") from error


def read_source(text: str) -> Program:
    """The program in an IR file, or the one captured from a `config.json` or `package.module:factory`.

    Raises:
        ParseError: The file is no IR text. CaptureError when the model cannot be captured.
    """
    from autosp_ir.ir.text import parse

    path = Path(text)
    if path.is_file() and path.suffix != CONFIG_SUFFIX:
        return parse(path.read_text(encoding="utf-8"))
    return captured(text, dynamic=False)


def captured(spec: str, dynamic: bool) -> Program:
    """Capture the model that `read_model` gives.

    Raises:
        CaptureError: There is no such model, or it cannot be captured.
    """
    from autosp_ir.capture.program import capture as capture_model

    model, batch = read_model(spec)
    return capture_model(model, batch, dynamic=dynamic)


def read_model(
    spec: str,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[nn.Module, Any]:
    """The model and batch of a transformers `config.json`, or those that `package.module:factory` returns.

    Args:
        spec: A path ending in `.json`, or a factory.
        length: Tokens per sequence; a factory must take `length`. None leaves it to them.
        dtype: Of floating-point weights and inputs; None leaves them as they are.
        overrides: Entries of the config to replace.
        **settings: For a config alone, further arguments of `model_from_config`.

    Raises:
        CaptureError: There is no such file or factory, or it does not take what is asked for.
    """
    if spec.endswith(CONFIG_SUFFIX):
        from autosp_ir.capture.from_config import model_from_config

        lengths: dict[str, Any] = {} if length is None else {"length": length}
        return model_from_config(spec, dtype=dtype, overrides=overrides, **lengths, **settings)
    if overrides:
        raise CaptureError(f"{spec!r} is a factory, which has no config entries", hint="leave --set out")
    model, batch = _built(spec, length)
    if dtype is None:
        return model, batch
    return model.to(dtype), pytree_map(lambda leaf: _cast(leaf, dtype), batch)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _built(spec: str, length: int | None) -> tuple[nn.Module, Any]:
    factory = _factory(spec)
    if length is not None and "length" not in inspect.signature(factory).parameters:
        raise CaptureError(f"{spec!r} takes no length", hint="leave --length out, or let factory(length) take one")
    made = factory() if length is None else factory(length=length)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return made
    raise CaptureError(f"{spec!r} returned {type(made).__name__}", hint="return (model, batch), a module and its batch")


def pairs(texts: Iterable[str], example: str) -> dict[str, Any]:
    """Values by name from `name=value`; values are JSON, or plain text where they are not.

    Args:
        texts: As given on the command line.
        example: What to write, for the error.

    Raises:
        AutoSPError: A text has no `=`.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise AutoSPError(f"{text!r} is no name=value pair", hint=f"write {example}")
        try:
            found[name.strip()] = json.loads(value.strip())
        except ValueError:
            found[name.strip()] = value.strip()
    return found


def dtype_named(name: str | None) -> torch.dtype | None:
    """A floating-point dtype by its name in torch; None stays None.

    Raises:
        AutoSPError: There is no such dtype.
    """
    if name is None:
        return None
    found = getattr(torch, name.removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise AutoSPError(f"{name!r} is no floating-point dtype", hint="write float32, bfloat16, float16 or float64")


def load(source: str) -> None:
    """Import a module, or run a Python file as one, so that its passes are registered.

    Raises:
        PipelineError: It cannot be loaded.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        if not source.endswith(".py"):
            importlib.import_module(source)
            return
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        if spec is None or spec.loader is None:
            raise ImportError(f"{source} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        raise PipelineError(
            f"{source!r} cannot be loaded: {error}", hint="give a module, or a Python file that registers passes"
        ) from error


def write(program: Program, output: Path | None, as_json: bool) -> None:
    """Write a program to a file, or to the screen."""
    text = program.to_json() if as_json else str(program)
    if output is None:
        sys.stdout.write(text + "\n")
        return
    output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(program.graph)} nodes written to {output}\n")


def _factory(spec: str) -> Any:
    module_name, colon, attribute = spec.partition(":")
    hint = "give a config.json, or package.module:factory where factory() returns (model, batch)"
    if not colon:
        raise CaptureError(f"{spec!r} is neither a file nor a factory", hint=hint)
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"{spec!r} cannot be loaded: {error}", hint=hint) from error


__all__ = ["captured", "dtype_named", "load", "pairs", "read_mesh", "read_model", "read_source", "write"]
