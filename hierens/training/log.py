"""log.jsonl: a record per line, whole lines only, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hierens.files import replacing, sync
from hierens.training.files import free_space


class JsonLines:
    """A file of JSON records that is appended to.

    What a full disk does not take is kept in memory and written with a later record.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def restart(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only some of the records that are there; a line that a kill cut short goes too."""
        self._waiting = []
        old = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = "".join(f"{line}\n" for line in old if (record := _parsed(line)) is not None and keep(record))
        with replacing(self.path) as new:
            new.write_text(kept)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, or keep it for later and say so if the disk is full."""
        self._waiting.append(json.dumps(record) + "\n")
        data = "".join(self._waiting).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if len(self._waiting) == 1:
                print(f"{self.path} cannot be written ({error.strerror}): {free_space(self.path)}. Its lines wait.")
        else:
            self._waiting = []

    def sync(self) -> None:
        """Write the lines through to the disk, so that a checkpoint is never newer than they are."""
        if self.path.exists():
            sync(self.path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
