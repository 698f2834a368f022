"""What every refusal owes its reader: the error class, the thing at fault, the source line, and a way out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from autosp_ir.errors import AutoSPError


@contextlib.contextmanager
def refused(error: type[AutoSPError], *words: str, source: str | None = None) -> Iterator[None]:
    """Expect an error of exactly this class.

    Args:
        error: The class.
        words: What the message must name.
        source: The file whose line the message must show, as `models.py:12` or as a path with a line number.
    """
    with pytest.raises(error) as raised:
        yield
    check_message(raised.value, error, *words, source=source)


def check_message(found: BaseException, error: type[AutoSPError], *words: str, source: str | None = None) -> None:
    """Check the class and the message of an error."""
    message = str(found)
    assert type(found) is error, f"{type(found).__name__}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    _, way_out, advice = message.partition("What you can do: ")
    assert way_out and len(advice.split()) >= 2, message
    if source is not None:
        line = re.compile(rf'{re.escape(source)}(?::|", line )\d+')
        assert line.search(message), message
