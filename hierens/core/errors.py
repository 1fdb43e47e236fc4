"""Parts of error messages: summaries of other libraries' errors, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion of the closest known name, to append to a clause; empty if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}" if close else ""
