"""The pipeline grammar: text such as `canonicalize,ulysses{fuse=qkv}` to names and words, with positions.

    pipeline := [ pass ("," pass)* ]
    pass     := name [ "{" (option (whitespace option)*)? "}" ]
    option   := name "=" [ word ("," word)* [","] ]
    word     := a JSON string in double quotes, or characters other than whitespace , = { } and "

Whitespace around a pass is ignored. An option without a word is an empty list; a comma makes a list.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from autosp_ir.errors import ParseError

DEFAULT_PIPELINE = "canonicalize,pad-tokens,token-partition,ulysses,differentiate,remat,grad-sync,lower-comm"
"""What `parallelize` runs."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BARE = re.compile(r'[^\s,={}"]+')
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Word:
    """One value as written; a quoted word is text whatever it looks like."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class OptionText:
    """An option as written.

    Args:
        name: As written, kebab- or snake-case.
        words: Its values.
        is_list: Whether a comma, or nothing, made it a list.
        position: Offset in the pipeline's text.
    """

    name: str
    words: tuple[Word, ...]
    is_list: bool
    position: int = 0


@dataclass(frozen=True)
class PassText:
    """A pass as written, with its offset in the pipeline's text."""

    name: str
    options: tuple[OptionText, ...] = ()
    position: int = 0


def closest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" sentence, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name.replace("_", "-"), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose one of {', '.join(names)}" if names else "there is none to choose from"


def place(text: str, position: int) -> tuple[int, int]:
    """1-based line and column of an offset."""
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


def excerpt(text: str, position: int) -> str:
    """The line of text at an offset, with a caret under it."""
    line, column = place(text, position)
    lines = text.split("\n")  # as `place` counts them
    return f"line {line}, column {column}\n  {lines[line - 1]}\n  {' ' * (column - 1)}^"


def parse_spec(text: str) -> list[PassText]:
    """Parse pipeline text; names are not looked up.

    Raises:
        ParseError: The text is malformed; it names line and column.
    """
    return _Parser(text).pipeline()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def pipeline(self) -> list[PassText]:
        self.space()
        passes: list[PassText] = []
        if self.at == len(self.text):
            return passes
        while True:
            passes.append(self.element())
            self.space()
            if self.at == len(self.text):
                return passes
            if not self.take(","):
                self.fail("a comma or the end of the pipeline")
            self.space()

    def element(self) -> PassText:
        position = self.at
        name = self.name("a pass name")
        return PassText(name, self.options() if self.take("{") else (), position)

    def options(self) -> tuple[OptionText, ...]:
        options: list[OptionText] = []
        self.space()
        while not self.take("}"):
            if options and not self.text[self.at - 1].isspace():
                self.fail("a space before the next option, or '}'")
            options.append(self.option())
            self.space()
        return tuple(options)

    def option(self) -> OptionText:
        position = self.at
        name = self.name("an option name or '}'")
        if not self.take("="):
            self.fail(f"'=' after the option name {name!r}")
        words: list[Word] = []
        comma = False
        while (word := self.word()) is not None:
            words.append(word)
            if not self.take(","):
                return OptionText(name, tuple(words), comma, position)
            comma = True
        return OptionText(name, tuple(words), True, position)

    def word(self) -> Word | None:
        if self.text.startswith('"', self.at):
            try:
                value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                self.at = error.pos
                self.fail(f"a JSON string ({error.msg})")
            return Word(str(value), quoted=True)
        found = _BARE.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return Word(found.group())

    def name(self, wanted: str) -> str:
        found = _NAME.match(self.text, self.at)
        if found is None:
            self.fail(wanted)
            return ""
        self.at = found.end()
        return found.group()

    def space(self) -> None:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def fail(self, wanted: str) -> None:
        line, column = place(self.text, self.at)
        got = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        raise ParseError(
            f"expected {wanted}, got {got}\n" + excerpt(self.text, self.at).partition("\n")[2],
            line=line,
            column=column,
            hint="write pipelines like 'canonicalize,ulysses{fuse=qkv}'; options are separated by spaces",
        )
