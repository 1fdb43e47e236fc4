"""The output of commands: tables, and one JSON object for scripts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any


@contextmanager
def json_output(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """If wanted, everything printed in this context goes to stderr; the yielded function prints a record to stdout.

    Numbers that JSON cannot represent become null.
    """
    stdout = sys.stdout
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield lambda record: print(json.dumps(_plain(record), allow_nan=False), file=stdout)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, as Markdown if the output is not a terminal."""
    from hierens.evaluation.profiling import is_text, table

    rows = list(rows)
    if not sys.stdout.isatty():
        print(table(header, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*header, box=None, header_style="bold", pad_edge=False)
    for column, cells in zip(drawn.columns, zip(*rows, strict=True), strict=False):
        column.justify = "left" if is_text(cells) else "right"
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def print_to_stderr(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
