"""Options of a pass: from keyword arguments, from pipeline text, and back to text."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from autosp_ir.errors import ParseError, PipelineError
from autosp_ir.pipeline.spec import OptionText, Word, closest, excerpt, parse_spec

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_CONSTANTS = {"none": None, "true": True, "false": False}
# Rejections of the container rather than of what is in it: the next reading of the words says more.
_SHAPE_ERRORS = ("list_type", "tuple_type", "set_type", "frozen_set_type", "string_type")


def make_options(pass_name: str, model: type[BaseModel], fields: Mapping[str, Any]) -> BaseModel:
    """Validate options given as keyword arguments.

    Raises:
        PipelineError: An option is unknown, missing or has a wrong value.
    """
    for name in fields:
        _check_known(pass_name, model, name)
    try:
        return model(**fields)
    except ValidationError as error:
        raise PipelineError(_reason(pass_name, error.errors()[0]), hint=_help(pass_name, model)) from error


def read_options(
    pass_name: str, model: type[BaseModel], options: Sequence[OptionText], text: str, position: int
) -> BaseModel:
    """Validate options given as text; pydantic converts them.

    A word is read as the number, boolean or `none` it looks like where the field takes one, else as text; a lone
    word is a list of one where only a list fits.

    Args:
        pass_name: For messages.
        model: The pass's Options.
        options: What was written.
        text: The whole pipeline, for messages.
        position: Offset of the pass in it.

    Raises:
        PipelineError: An option is unknown, missing, doubled or has a wrong value; it shows where.
    """
    written: dict[str, OptionText] = {}
    for option in options:
        where = excerpt(text, option.position)
        _check_known(pass_name, model, option.name, where)
        field = option.name.replace("-", "_")
        if field in written:
            raise PipelineError(f"option {option.name!r} of {pass_name} is given twice at {where}", hint="give it once")
        written[field] = option
    try:
        return _validate(model, {f: list(_readings(o)) for f, o in written.items()}, {})
    except ValidationError as error:
        details = error.errors()[0]
        blamed = written.get(str(details["loc"][0])) if details["loc"] else None
        where = excerpt(text, blamed.position if blamed is not None else position)
        raise PipelineError(f"{_reason(pass_name, details)} at {where}", hint=_help(pass_name, model)) from error


def render_pass(pass_name: str, options: BaseModel, *, strict: bool = False) -> str:
    """Pipeline text of a pass: options that are not at their defaults.

    Args:
        pass_name: The pass.
        options: Its options.
        strict: Refuse values that text cannot say, instead of showing them.

    Raises:
        PipelineError: A value cannot be written, under `strict`.
    """
    parts = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if not field.is_required() and same_value(value, field.get_default(call_default_factory=True)):
            continue
        written = next((t for t in _writings(value) if _reads_back(options, name, value, t)), None)
        if written is None and strict:
            raise PipelineError(
                f"option {name!r} of {pass_name} is {value!r}, which pipeline text cannot say",
                hint="build the pipeline from Pass objects, or give the option a text form",
            )
        parts.append(f"{name.replace('_', '-')}={written if written is not None else repr(value)}")
    return f"{pass_name}{{{' '.join(parts)}}}" if parts else pass_name


def _check_known(pass_name: str, model: type[BaseModel], name: str, where: str | None = None) -> None:
    known = [f.replace("_", "-") for f in model.model_fields]
    if name.replace("_", "-") in known:
        return
    suffix = f" at {where}" if where else ""
    hint = closest(name, known) if known else f"{pass_name} takes no options"
    raise PipelineError(f"{pass_name} has no option {name!r}{suffix}", hint=hint)


def _reason(pass_name: str, details: Any) -> str:
    message = str(details["msg"])
    if not details["loc"]:
        return f"the options of {pass_name} do not go together: {message}"
    option = str(details["loc"][0]).replace("_", "-")
    if details["type"] == "missing":
        return f"{pass_name} needs the option {option!r}"
    return f"option {option!r} of {pass_name}: {message}, got {details['input']!r}"


def _help(pass_name: str, model: type[BaseModel]) -> str:
    lines = [
        f"{name.replace('_', '-')}{f': {field.description}' if field.description else ''}"
        for name, field in model.model_fields.items()
    ]
    return f"the options of {pass_name} are " + "; ".join(lines) if lines else f"{pass_name} takes no options"


def _natural(word: Word) -> Any:
    if word.quoted:
        return word.text
    if word.text in _CONSTANTS:
        return _CONSTANTS[word.text]
    if _INT.fullmatch(word.text):
        return int(word.text)
    return float(word.text) if _FLOAT.fullmatch(word.text) or word.text in ("inf", "-inf") else word.text


def _readings(option: OptionText) -> Iterator[Any]:
    """What the words may mean, the most natural first."""
    natural = [_natural(w) for w in option.words]
    literal = [w.text for w in option.words]
    if option.is_list:
        yield from (natural, literal)
    else:
        yield from (natural[0], natural, literal[0], literal)


def _validate(model: type[BaseModel], readings: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]) -> BaseModel:
    """Validate, taking the next reading of each field that is rejected until one fits or none is left."""
    turn = dict.fromkeys(readings, 0)
    first: ValidationError | None = None
    while True:
        try:
            return model.model_validate({**fixed, **{f: readings[f][turn[f]] for f in readings}})
        except ValidationError as error:
            rejected = {str(e["loc"][0]) for e in error.errors() if e["loc"]}
            if first is None or first.errors()[0]["type"] in _SHAPE_ERRORS:
                first = error
            retry = [f for f in rejected if f in turn and turn[f] + 1 < len(readings[f])]
            if not retry:
                raise first from None
            for name in retry:
                turn[name] += 1


def _writings(value: Any) -> Iterator[str]:
    """Candidate texts of a value, the plainest first."""
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
        for quote in (False, True):
            joined = ",".join(_word(i, quote) for i in items)
            yield joined
            yield f"{joined},"
        return
    yield _word(value, quote=False)
    yield _word(value, quote=True)


def _word(value: Any, quote: bool) -> str:
    if isinstance(value, enum.Enum):
        return _word(value.value, quote)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, float) else str(value)
    return json.dumps(text) if quote and not isinstance(value, int | float) else text


def _reads_back(options: BaseModel, name: str, value: Any, written: str) -> bool:
    try:
        (element,) = parse_spec(f"p{{{name}={written}}}")
        (option,) = element.options
        others = {f: getattr(options, f) for f in type(options).model_fields if f != name}
        read = _validate(type(options), {name: list(_readings(option))}, others)
    except (ParseError, ValidationError, ValueError):
        return False
    return same_value(getattr(read, name), value)


def same_value(a: Any, b: Any) -> bool:
    """Equal and of the same types: 1, 1.0 and True are three options."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
