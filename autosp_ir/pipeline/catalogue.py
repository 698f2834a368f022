"""The catalogue of passes, made from the passes themselves: stage, facts, options and what they are for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from autosp_ir.pipeline.base import Pass
from autosp_ir.pipeline.registry import registered_passes

_FACTS = ("requires", "provides", "removes", "conflicts")


@dataclass(frozen=True)
class OptionEntry:
    """One option of a pass.

    Attributes:
        name: As written in pipelines.
        type: What it takes, such as `'none' | 'qkv'`.
        default: As JSON; None for a required option, whose text is empty.
        doc: What it is for.
    """

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class PassEntry:
    """One pass.

    Attributes:
        name: In pipelines.
        summary: The first line of its docstring.
        doc: The rest of it.
        stages: What it accepts.
        produces: The stage it leaves programs in; None when it keeps theirs.
        requires: Facts it needs.
        provides: Facts that hold afterwards.
        removes: Facts that no longer do.
        conflicts: Facts it refuses.
        options: Its options, in order.
        origin: Module and class.
        schema: JSON Schema of its options.
    """

    name: str
    summary: str
    doc: str
    stages: list[str]
    produces: str | None
    requires: list[str]
    provides: list[str]
    removes: list[str]
    conflicts: list[str]
    options: list[OptionEntry]
    origin: str
    schema: dict[str, Any] = field(repr=False)


def catalogue(passes: Iterable[type[Pass]] | None = None, *, package: str | None = None) -> list[PassEntry]:
    """Describe passes.

    Args:
        passes: What to describe; every pass that can be loaded when None.
        package: Only those defined in this Python package.

    Returns:
        One entry per pass, by name.

    Raises:
        PipelineError: Two passes have one name.
    """
    known = registered_passes().values() if passes is None else passes
    chosen = [p for p in known if package is None or p.__module__.partition(".")[0] == package]
    return [_entry(p) for p in sorted(chosen, key=lambda p: p.name)]


def catalogue_json(entries: Iterable[PassEntry]) -> str:
    """The catalogue as a JSON object by pass name."""
    return json.dumps({entry.name: asdict(entry) for entry in entries}, indent=2, ensure_ascii=False) + "\n"


def catalogue_markdown(entries: Iterable[PassEntry]) -> str:
    """The catalogue as a page: one section per pass."""
    listed = list(entries)
    lines = [
        "# Passes",
        "",
        "Made from the passes by `autosp-ir passes --markdown`; do not edit.",
        "",
        "| pass | stage | does |",
        "|---|---|---|",
        *(f"| [`{e.name}`](#{e.name}) | {_stage(e)} | {_cell(e.summary)} |" for e in listed),
    ]
    for entry in listed:
        lines += ["", f"## {entry.name}", "", entry.summary]
        lines += ["", entry.doc] if entry.doc else []
        lines += ["", f"- stage: {_stage(entry)}"]
        stated = {name: getattr(entry, name) for name in _FACTS}
        lines += [f"- {name}: {', '.join(f'`{fact}`' for fact in facts)}" for name, facts in stated.items() if facts]
        if entry.options:
            lines += ["", "| option | type | default | |", "|---|---|---|---|", *map(_row, entry.options)]
    return "\n".join(lines) + "\n"


def _entry(pass_class: type[Pass]) -> PassEntry:
    summary, _, rest = inspect.cleandoc(pass_class.__doc__ or "").partition("\n")
    schema = pass_class.Options.model_json_schema()
    return PassEntry(
        name=pass_class.name,
        summary=summary,
        doc=rest.strip(),
        stages=[str(stage) for stage in pass_class.stages()],
        produces=None if pass_class.produces is None else str(pass_class.produces),
        **{name: sorted(getattr(pass_class, name)) for name in _FACTS},
        options=_options(pass_class, schema),
        origin=f"{pass_class.__module__}:{pass_class.__qualname__}",
        schema=schema,
    )


def _options(pass_class: type[Pass], schema: Mapping[str, Any]) -> list[OptionEntry]:
    entries = []
    for name, info in pass_class.Options.model_fields.items():
        described = schema.get("properties", {}).get(info.alias or name, {})
        default = "" if info.is_required() else json.dumps(described.get("default"), ensure_ascii=False)
        doc = " ".join((info.description or "").split())
        entries.append(OptionEntry(name.replace("_", "-"), _type(described, schema.get("$defs", {})), default, doc))
    return entries


def _type(described: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON Schema accepts, in a few words."""
    if "$ref" in described:
        return _type(definitions.get(str(described["$ref"]).rpartition("/")[2], {}), definitions)
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in described:
            return " | ".join(dict.fromkeys(_type(part, definitions) for part in described[choice]))
    if "enum" in described:
        return " | ".join(json.dumps(value) for value in described["enum"])
    if "const" in described:
        return json.dumps(described["const"])
    kind = str(described.get("type", "any"))
    if kind == "array":
        return f"list of {_type(described.get('items', {}), definitions)}"
    return {"null": "none"}.get(kind, kind)


def _stage(entry: PassEntry) -> str:
    return ", ".join(entry.stages) + (f" → {entry.produces}" if entry.produces else "")


def _row(option: OptionEntry) -> str:
    default = f"`{_cell(option.default)}`" if option.default else "required"
    return f"| `{option.name}` | `{_cell(option.type)}` | {default} | {_cell(option.doc)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


__all__ = ["OptionEntry", "PassEntry", "catalogue", "catalogue_json", "catalogue_markdown"]
