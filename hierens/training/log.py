"""log.jsonl: a record per line, whole lines only, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hierens.core.atomic_files import replacing, sync
from hierens.core.json_files import is_whole, parse_json, short
from hierens.training.checkpoints.files import free_space

_LARGEST = 2**53  # of a step, or an epoch


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
        """Keep only some of the records that are there; a line that a kill cut short goes too.

        Other lines that are no records of a run are put aside in a file of their own.
        """
        self._waiting = []
        old = self.path.read_text(errors="replace") if self.path.exists() else ""
        *lines, last = old.split("\n")
        records = {line: record for line in (*lines, last) if (record := _parsed(line)) is not None}
        if foreign := [line for line in lines if line.strip() and line not in records]:
            aside = self.path.with_name(f"{self.path.name}.foreign")
            with aside.open("a") as file:
                file.writelines(f"{line}\n" for line in foreign)
            shown = f"{len(foreign)} lines that are no records of a run, such as {short(foreign[0])}"
            print(f"{self.path} had {shown}: they are put aside in {aside.name}.")
        kept = "".join(f"{line}\n" for line in (*lines, last) if line in records and keep(records[line]))
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
    """The record in a line; a run's have a step, and those of validations an epoch, by which to keep them."""
    try:
        record = parse_json(line, nan=True)
    except ValueError:
        return None
    if not isinstance(record, dict) or ("val_loss" in record and "epoch" not in record):
        return None
    numbered = all(is_whole(value, 0, _LARGEST) for value in (record.get("step"), record.get("epoch", 0)))
    return record if numbered else None
