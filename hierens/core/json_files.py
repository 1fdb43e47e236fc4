"""Reads untrusted JSON files within limits.

Any invalid file raises a `LoadError` with a message of one line that names the file, also if it is too long or nested
too deeply for Python's parser.
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

MAX_BYTES = 4 * 2**20  # twice ImageNet-21k's names and descriptions; parsed JSON takes at most 30 times as much


def read_json(file: Path, what: str, most_bytes: int = MAX_BYTES, nan: bool = False) -> Any:
    """The value of a JSON file.

    Args:
        file: its path.
        what: what the file should contain, for messages: "the config of a hierens model".
        most_bytes: the largest size that is read.
        nan: whether NaN and infinities, which Python writes although they are not JSON, are allowed.

    Raises:
        LoadError: it cannot be read, is too long, or is not JSON.
    """
    try:
        if (size := file.stat().st_size) > most_bytes:
            raise LoadError(f"{file} is {size / 2**20:.0f} MB long: it is not {what}.")
        return parse_json(file.read_text(encoding="utf-8"), nan)
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror or first_line(error)}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, _InvalidJSONError) as error:
        reason = short(first_line(error), plain=True)
        raise LoadError(f"{file} is not valid JSON and cannot be read: {reason}.") from error


class _InvalidJSONError(ValueError):
    """Text that is not JSON, for reasons for which `json` raises other errors or none."""


def parse_json(text: str, nan: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """

    def constant(name: str) -> float:
        if not nan:
            raise _InvalidJSONError(f"it contains {name}")
        return float(name)

    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise _InvalidJSONError("it is nested too deeply") from error
    except ValueError as error:  # a number with thousands of digits
        raise _InvalidJSONError(first_line(error)) from error


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer (not True or 1.0) within bounds."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_finite(value: Any, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> bool:
    """Whether a value is a finite number (not True) within bounds."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(least <= value <= most)


def short(value: Any, plain: bool = False) -> str:
    """A value for an error message: at most about 200 characters on one line, however large it is.

    Args:
        value: any value.
        plain: show a string without quotes.
    """
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    # Line breaks and lone surrogates would break the line or the terminal's encoding.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value[:201]) if plain else brief.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
