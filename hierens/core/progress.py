"""Progress bars of long steps, shown only inside `progress_bars()`: in the program, and in Python on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

_Item = TypeVar("_Item")
_SHOWN = ContextVar("_SHOWN", default=False)


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[None]:
    """Show progress bars while this context lasts, on stderr if it is a terminal. They need rich (`hierens[train]`).

    Conversion, `tune` and `export` show one.

    Examples:
        >>> import timm, hierens
        >>> with progress_bars():
        ...     model = hierens.hierensify(timm.create_model("resnet8_cifar"), blocks=2)
    """
    before = _SHOWN.get()
    _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.set(before)


def with_progress(items: Iterable[_Item], total: int | None, what: str) -> Iterator[_Item]:
    """The items, with a progress bar if `progress_bars` asks for it; none inside another, or in further processes.

    Args:
        items: the steps.
        total: their number, if it is known.
        what: the text before the bar.
    """
    if not _SHOWN.get() or not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    with progress_bars(False):
        yield from track(items, what, total, console=Console(stderr=True), transient=True, refresh_per_second=4)
