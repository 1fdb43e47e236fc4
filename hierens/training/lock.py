"""One run at a time in an output folder: the second one is told, instead of both writing over each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"
_SECONDS = 0.5  # to wait for those who only look whether a run is there


@contextlib.contextmanager
def alone_in(output_dir: str | Path) -> Iterator[None]:
    """Hold an output folder for a run; the system gives it free if the process dies.

    Where the file system knows no locks, nothing is held and nobody is refused.

    Args:
        output_dir: of the run; made if missing.

    Raises:
        ValueError: another run holds it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=_SECONDS)
    except Timeout:
        raise ValueError(
            f"another run is writing to {output_dir}: wait until it ends, or choose another output_dir."
        ) from None
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def check_free(output_dir: str | Path) -> None:
    """Refuse a folder that another run holds before data and model are made, which can take minutes.

    Raises:
        ValueError: another run holds it.
    """
    first = os.environ.get("RANK", "0") == "0"  # of the processes of this run, of which one speaks for all
    if first and (Path(output_dir) / _LOCK).exists():
        with alone_in(output_dir):
            pass
