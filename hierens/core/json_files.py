"""JSON that others wrote, read within bounds: what is wrong with it is said in one line that names the file.

Whatever a file says is refused by a `LoadError`, never by what Python's parser happens to raise: files that are too
long or nested too deeply included.
"""

from __future__ import annotations

import json
import sys
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
from typing import Any

from hierens.core.errors import first_line
from hierens.core.fetching import LoadError

MOST_BYTES = 4 * 2**20  # ImageNet-21k's names and descriptions take less than half; parsed, it is 30 times that at most


def read_json(file: Path, what: str, most_bytes: int = MOST_BYTES, nan: bool = False) -> Any:
    """The value that a JSON file holds.

    Args:
        file: its path.
        what: the file should be, for messages: "the config of a hierens model".
        most_bytes: longest file that is read.
        nan: whether NaN and infinities, which Python writes and JSON does not have, are taken.

    Raises:
        LoadError: it cannot be read, is too long, or is no JSON.
    """
    try:
        if (size := file.stat().st_size) > most_bytes:
            raise LoadError(f"{file} is {size / 2**20:.0f} MB long: it is not {what}.")
        return parse_json(file.read_text(encoding="utf-8"), nan)
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror or first_line(error)}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, _NoJSONError) as error:
        reason = short(first_line(error), plain=True)
        raise LoadError(f"{file} is not valid JSON and cannot be read: {reason}.") from error


class _NoJSONError(ValueError):
    """What json says of text in other errors than its own."""


def parse_json(text: str, nan: bool = False) -> Any:
    """The value that a text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """

    def constant(name: str) -> float:
        if not nan:
            raise _NoJSONError(f"{name} is no JSON")
        return float(name)

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise _NoJSONError("it is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise _NoJSONError(first_line(error)) from error


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is a whole number (True and 1.0 are none) within bounds."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_finite(value: Any, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> bool:
    """Whether a value is a finite number (True is none) within bounds."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(least <= value <= most)


def short(value: Any, plain: bool = False) -> str:
    """A value in an error's sentence: however long or deep it is, not more than some words of it, on one line.

    Args:
        value: any value.
        plain: a text to be shown without quotes.
    """
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    # What does not print (line breaks, halves of surrogate pairs) could break the line, or the terminal's encoding.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value[:201]) if plain else brief.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
