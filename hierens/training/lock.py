"""Locks an output folder, so that two runs cannot overwrite each other's files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"
_SECONDS = 0.5  # to wait for processes that only check whether the folder is locked


@contextlib.contextmanager
def lock_folder(output_dir: str | Path) -> Iterator[None]:
    """Lock an output folder for a run; the operating system releases the lock if the process dies.

    If the file system has no locks, nothing is locked.

    Args:
        output_dir: of the run; created if missing.

    Raises:
        ValueError: another run has locked it.
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


def check_unlocked(output_dir: str | Path) -> None:
    """Check that a folder is not locked, before data and model are created, which can take minutes.

    Raises:
        ValueError: another run has locked it.
    """
    first = os.environ.get("RANK", "0") == "0"  # one process of a run checks for all
    if first and (Path(output_dir) / _LOCK).exists():
        with lock_folder(output_dir):
            pass
