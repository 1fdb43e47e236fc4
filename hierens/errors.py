"""What errors of other libraries say, in one line for ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
