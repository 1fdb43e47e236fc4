"""The log of a run: `log.jsonl`, a file of whole lines also after a kill or on a full disk, and experiment trackers."""

from __future__ import annotations

import atexit
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hierens.core.atomic_files import replacing, sync
from hierens.core.json_files import is_whole, parse_json, short
from hierens.training.checkpoints.files import free_space
from hierens.training.data.unreadable import report_unreadable

_LARGEST = 2**53  # of a step, or an epoch


class RunLog:
    """Writes the records of a run to `log.jsonl` and to the experiment trackers. Every process must call its methods.

    Args:
        accelerator: owns the trackers; its main process writes the file.
        output_dir: of the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str | Path) -> None:
        self.accelerator = accelerator
        self.file = JsonLines(Path(output_dir) / "log.jsonl")

    def start(self, config: dict[str, Any]) -> None:
        """Show a run's configuration in the trackers."""
        self.accelerator.init_trackers("hierens", config=_flat(config))

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, whose `step` is that of the trackers."""
        if self.accelerator.is_main_process:
            self.file.append(record)
        self.accelerator.log(_flat(record), step=record["step"])

    def report_unreadable(self, loader: Any, part: str, epoch: int, step: int) -> None:
        """Report the images that a pass could not read: see `hierens.training.data.unreadable.report_unreadable`."""
        names = self.file.path.with_name("unreadable.txt")
        if counts := report_unreadable(self.accelerator, loader, part, epoch, names):
            self.append({"epoch": epoch, "step": step, **counts})

    def sync(self) -> None:
        """Flush the file to the disk."""
        if self.accelerator.is_main_process:
            self.file.sync()

    def end(self) -> None:
        """Accelerate's `end_training`, but keep the process group, since the processes may train again."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        atexit.unregister(_leave_process_group)
        atexit.register(_leave_process_group)


class JsonLines:
    """A file of JSON records to which records are appended.

    Records that do not fit on a full disk stay in memory and are written with a later record.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def restart(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only some of the records, and drop a line that a kill cut short.

        Lines that are not records of a run are moved to a file of their own.
        """
        self._waiting = []
        old = self.path.read_text(errors="replace") if self.path.exists() else ""
        *lines, last = old.split("\n")
        records = {line: record for line in (*lines, last) if (record := _parsed(line)) is not None}
        if foreign := [line for line in lines if line.strip() and line not in records]:
            aside = self.path.with_name(f"{self.path.name}.foreign")
            with aside.open("a") as file:
                file.writelines(f"{line}\n" for line in foreign)
            shown = f"{len(foreign)} lines that are not records of a run, such as {short(foreign[0])}"
            print(f"{self.path} had {shown}: they were moved to {aside.name}.")
        kept = "".join(f"{line}\n" for line in (*lines, last) if line in records and keep(records[line]))
        with replacing(self.path) as new:
            new.write_text(kept)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; if the disk is full, keep it for later and print this."""
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
                print(f"{self.path} cannot be written ({error.strerror}): {free_space(self.path)}. Its lines are kept.")
        else:
            self._waiting = []

    def sync(self) -> None:
        """Flush the lines to the disk, so that a checkpoint is never newer than they are."""
        if self.path.exists():
            sync(self.path)


def _parsed(line: str) -> dict[str, Any] | None:
    """The record in a line, if it has a step and, for a validation, an epoch."""
    try:
        record = parse_json(line, nan=True)
    except ValueError:
        return None
    if not isinstance(record, dict) or ("val_loss" in record and "epoch" not in record):
        return None
    numbered = all(is_whole(value, 0, _LARGEST) for value in (record.get("step"), record.get("epoch", 0)))
    return record if numbered else None


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Plain values only, as trackers need: a list or dictionary becomes an entry per item."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat |= {f"{name}/{position}": item for position, item in enumerate(value)}
        elif isinstance(value, dict):
            flat |= _flat({f"{name}/{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
