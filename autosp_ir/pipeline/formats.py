"""Pipelines as TOML and JSON documents.

Both hold a list of passes, with the options that are not at their defaults:

    [[passes]]
    name = "canonicalize"

    [[passes]]
    name = "ulysses"
    options = { fuse = "qkv" }

A document whose only key is `pipeline` holds pipeline text instead: `pipeline = "canonicalize,ulysses{fuse=qkv}"`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from autosp_ir.errors import ParseError, PipelineError
from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.options import make_options, same_value
from autosp_ir.pipeline.registry import REGISTRY, Registry, parse_pipeline
from autosp_ir.pipeline.spec import closest, excerpt, place

_EXAMPLE = 'write passes = [{"name": "ulysses", "options": {"fuse": "qkv"}}], or one [[passes]] table each'


def to_data(passes: Sequence[Pass]) -> dict[str, Any]:
    """The document: plain lists, mappings, text and numbers."""
    listed = []
    for each in passes:
        options = _changed(each.options)
        listed.append({"name": each.name, "options": options} if options else {"name": each.name})
    return {"passes": listed}


def from_data(data: object, registry: Registry = REGISTRY) -> list[Pass]:
    """The passes of a document.

    Raises:
        ParseError: Its pipeline text is malformed.
        PipelineError: It does not have the form of a pipeline, or a pass or option is unknown.
    """
    if isinstance(data, Mapping) and isinstance(data.get("pipeline"), str) and "passes" not in data:
        _check_keys(data, ("pipeline",), "the document")
        return parse_pipeline(data["pipeline"], registry)
    if not isinstance(data, Mapping):
        raise PipelineError(f"a pipeline document is a table, not {type(data).__name__}", hint=_EXAMPLE)
    _check_keys(data, ("passes", "pipeline"), "the document")
    listed = data.get("passes")
    if not isinstance(listed, list) or "pipeline" in data:
        raise PipelineError("the document has no list of passes, or one of two kinds", hint=_EXAMPLE)
    return [_pass(element, index, registry) for index, element in enumerate(listed)]


def to_toml(passes: Sequence[Pass]) -> str:
    """TOML that `from_toml` reads back to equal passes.

    Raises:
        PipelineError: TOML cannot say an option's value: it has no `none`.
    """
    tables = []
    for element in to_data(passes)["passes"]:
        lines = ["[[passes]]", f"name = {_toml(element['name'], element['name'])}"]
        if "options" in element:
            lines.append(f"options = {_toml(element['options'], element['name'])}")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables) if tables else "passes = []\n"


def from_toml(text: str, registry: Registry = REGISTRY) -> list[Pass]:
    """The passes of a TOML document.

    Raises:
        ParseError: The text is malformed; it names line and column.
        PipelineError: A pass, option or key is unknown.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _malformed("TOML", text, str(error).partition(" (at")[0], _offset(error, text)) from error
    return from_data(data, registry)


def to_json(passes: Sequence[Pass]) -> str:
    """JSON that `from_json` reads back to equal passes."""
    return json.dumps(to_data(passes), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str, registry: Registry = REGISTRY) -> list[Pass]:
    """The passes of a JSON document; as `from_toml`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise _malformed("JSON", text, error.msg, error.pos) from error
    return from_data(data, registry)


def read(path: str | Path) -> str:
    """The text of a file.

    Raises:
        PipelineError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} cannot be read: {error}", hint="give the path of a text file") from error


def write(text: str, path: str | Path | None) -> str:
    """Write text to a file, if one is given, and return it."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _pass(element: object, index: int, registry: Registry) -> Pass:
    where = f"pass {index + 1}"
    if not isinstance(element, Mapping) or not isinstance(element.get("name"), str):
        raise PipelineError(f"{where} of the document has no name", hint=_EXAMPLE)
    _check_keys(element, ("name", "options"), f"{where} ({element['name']})")
    options = element.get("options", {})
    if not isinstance(options, Mapping):
        raise PipelineError(f"the options of {where} ({element['name']}) are not a table", hint=_EXAMPLE)
    pass_class = registry.get(element["name"])
    fields = {str(name).replace("-", "_"): value for name, value in options.items()}
    return pass_class(make_options(pass_class.name, pass_class.Options, fields))


def _check_keys(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in table:
        if key not in known:
            raise PipelineError(f"{what} has an unknown key {key!r}", hint=closest(str(key), known))


def _changed(options: BaseModel) -> dict[str, Any]:
    """The options that are not at their defaults, as JSON would hold them."""
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(options).model_fields.items()
        if not field.is_required()
    }
    given = {name: getattr(options, name) for name in type(options).model_fields}
    changed = [n for n, value in given.items() if n not in defaults or not same_value(value, defaults[n])]
    dumped = options.model_dump(mode="json", include=set(changed))
    return {name.replace("_", "-"): _ordered(dumped[name], given[name]) for name in changed}


def _ordered(dumped: Any, value: Any) -> Any:
    """Sets have no order of their own; the same pipeline is the same text."""
    return sorted(dumped, key=str) if isinstance(value, set | frozenset) else dumped


def _toml(value: Any, pass_name: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(_toml(item, pass_name) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(str(k))} = {_toml(v, pass_name)}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}"
    raise PipelineError(
        f"an option of {pass_name} is {value!r}, which TOML cannot say", hint="write JSON, or pipeline text"
    )


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else json.dumps(name, ensure_ascii=False)


def _offset(error: tomllib.TOMLDecodeError, text: str) -> int:
    """Where a TOML error is; Python before 3.14 says it in the message only."""
    message = str(error)
    if "(at line" not in message:
        return len(text)
    line, column = (int(part.split()[-1]) for part in message.rpartition("(at ")[2].rstrip(")").split(","))
    return sum(len(each) for each in text.splitlines(keepends=True)[: line - 1]) + column - 1


def _malformed(kind: str, text: str, reason: str, offset: int) -> ParseError:
    at = min(offset, max(len(text.rstrip()) - 1, 0))
    line, column = place(text, at)
    shown = excerpt(text, at).partition("\n")[2]
    return ParseError(f"malformed {kind}: {reason}\n{shown}", line=line, column=column, hint=_EXAMPLE)


__all__ = ["from_data", "from_json", "from_toml", "to_data", "to_json", "to_toml"]
