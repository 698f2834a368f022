"""Tokens of IR text, each with its position, made as the parser asks for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from autosp_ir.errors import ParseError

_TOKEN = re.compile(
    r"""
      (?P<blank>[ \t\r]+)
    | (?P<comment>\#[^\n]*)
    | (?P<newline>\n)
    | (?P<value>%\w+)
    | (?P<name>[^\W\d]\w*(?:\.\w+)*)
    | (?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<quoted>`[^`\n]+`)
    | (?P<mark>->|//|\*\*|\.\.\.|[()\[\]{},:=*+\-/@])
    """,
    re.VERBOSE,
)
_CLOSING = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text.

    Args:
        kind: value, name, number, string, quoted, mark, newline or end.
        text: The characters.
        line: 1-based.
        column: 1-based.
    """

    kind: str
    text: str
    line: int
    column: int

    def __str__(self) -> str:
        return {"newline": "the end of the line", "end": "the end of the text"}.get(self.kind, f"`{self.text}`")


class Lexer:
    """Splits text into tokens. A line break inside brackets is no token.

    Args:
        text: The text.
        line: Number of its first line.

    Attributes:
        comments: Comments met so far, by line, without the `#`.
    """

    def __init__(self, text: str, line: int = 1) -> None:
        self._text = text
        self._line = line
        self.comments: dict[int, str] = {}

    def tokens(self) -> Iterator[Token]:
        """The tokens; after the last one, `end` for ever.

        Raises:
            ParseError: A character belongs to no token, or a bracket is not closed.
        """
        start, position, open_brackets, content = 0, 0, list[Token](), False
        while position < len(self._text):
            match = _TOKEN.match(self._text, position)
            column = position - start + 1
            if match is None:
                raise self._unknown(position, column)
            kind, text = str(match.lastgroup), match.group()
            position = match.end()
            if kind == "newline":
                if content and not open_brackets:
                    yield Token(kind, text, self._line, column)
                    content = False
                self._line, start = self._line + 1, position
                continue
            if kind == "comment":
                self.comments[self._line] = text[1:].strip()
            if kind in ("blank", "comment"):
                continue
            content = True
            token = Token(kind, text, self._line, column)
            yield token
            _track(token, open_brackets)
        if open_brackets:
            first = open_brackets[-1]
            raise ParseError(f"`{first.text}` is never closed", line=first.line, column=first.column)
        while True:
            yield Token("end", "", self._line, position - start + 1)

    def _unknown(self, position: int, column: int) -> ParseError:
        character = self._text[position]
        if character == '"':
            return ParseError("the string is not closed on this line", line=self._line, column=column)
        return ParseError(f"unexpected character {character!r}", line=self._line, column=column)


def _track(token: Token, open_brackets: list[Token]) -> None:
    if token.kind != "mark":
        return
    if token.text in _CLOSING.values():
        open_brackets.append(token)
    elif open_brackets and open_brackets[-1].text == _CLOSING.get(token.text):
        open_brackets.pop()  # a closing bracket that fits none is the parser's to refuse


__all__ = ["Lexer", "Token"]
