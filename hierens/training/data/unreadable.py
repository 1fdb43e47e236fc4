"""Counts images that cannot be read, in loader workers, and reports them in the main process.

One damaged file must neither end a long run nor go unnoticed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import get_worker_info

_KEPT = 100  # names per worker and pass; more are only counted
_NAME_BYTES = 400
_IN_A_ROW = 200
_ENOUGH = 1000  # reads after which the fraction is checked before a pass is over


class UnreadableImageError(ValueError):
    """One image cannot be read. It is skipped and counted."""


class UnreadableDataError(ValueError):
    """Too much of the data cannot be read."""


class Unreadable:
    """Counts the samples that one pass over the data read, and those that it could not read, with their names.

    Loader workers write the counts and the main process reads them, in shared memory with a row per worker.

    Args:
        workers: loader processes; 0 reads in the main process.
        limit: the largest accepted fraction of unreadable samples.
    """

    def __init__(self, workers: int = 0, limit: float = 0.1) -> None:
        self.limit = limit
        self._counts = torch.zeros(max(workers, 1), 2, dtype=torch.int64).share_memory_()
        self._names = torch.zeros(max(workers, 1), _KEPT, _NAME_BYTES, dtype=torch.uint8).share_memory_()
        self._in_a_row = 0

    def start(self) -> None:
        """Reset the counts for a new pass."""
        self._counts.zero_()
        self._in_a_row = 0

    def count_read(self) -> None:
        """Count a sample that was read."""
        self._counts[_worker(), 0] += 1
        self._in_a_row = 0

    def count_skipped(self, reason: object) -> None:
        """Count a sample that could not be read; `reason` names it.

        Raises:
            UnreadableDataError: too many in a row could not be read.
        """
        row, skipped = _worker(), int(self._counts[_worker(), 1])
        if skipped < _KEPT:
            # Python's representation of an open file is not informative, and differs in every epoch.
            name = " ".join(re.sub(r"<_io\.[^>]*>", "", str(reason)).split()).encode()[:_NAME_BYTES]
            self._names[row, skipped] = 0
            self._names[row, skipped, : len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
        self._counts[row, 1] += 1
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            raise UnreadableDataError(f"{_IN_A_ROW} images in a row cannot be read; the last: {reason}.")

    @property
    def counts(self) -> tuple[int, int, list[str]]:
        """Of this process and its workers: samples read, samples that could not be read, names of the first of them."""
        read, skipped = self._counts.sum(0).tolist()
        rows = zip(self._names, self._counts[:, 1].tolist(), strict=True)
        kept = [bytes(name.tolist()) for names, count in rows for name in names[: min(count, _KEPT)]]
        return read, skipped, [name.rstrip(b"\0").decode(errors="ignore") for name in kept]


def check_readable(loader: Any, part: str, over: bool = False) -> tuple[int, int, list[str]]:
    """The counts of the current pass over a loader's data, summed over processes. Every process must call it.

    Args:
        loader: its `dataset.unreadable` has the counts; without it, the result is empty.
        part: the data's name, for the message.
        over: whether the pass is over, so that the fraction is checked however few were read.

    Raises:
        UnreadableDataError: a larger fraction than the limit cannot be read.
    """
    unreadable = getattr(loader.dataset, "unreadable", None)
    if unreadable is None:
        return 0, 0, []
    read, skipped, names = zip(*gather_object([unreadable.counts]), strict=True)
    total, bad, first = sum(read) + sum(skipped), sum(skipped), [name for some in names for name in some]
    if bad > unreadable.limit * total and (over or total >= _ENOUGH):
        raise UnreadableDataError(
            f"{bad} of {total} {part} images cannot be read, more than max_unreadable={unreadable.limit:g} allows; "
            f"the first: {first[0]}."
        )
    return sum(read), bad, first


def report_unreadable(accelerator: Accelerator, loader: Any, part: str, epoch: int, file: Path) -> dict[str, Any]:
    """Print how many images a finished pass skipped, and add their names to a file. Every process must call it.

    Args:
        accelerator: prints in the main process.
        loader: of the pass.
        part: `training` or `validation`.
        epoch: from 1, for the message.
        file: for the names of unreadable images and the reasons, a line each.

    Returns:
        Fields for the log, none if all images could be read.

    Raises:
        UnreadableDataError: a larger fraction than the limit cannot be read.
    """
    read, skipped, names = check_readable(loader, part, over=True)
    if not skipped:
        return {}
    accelerator.print(
        f"epoch {epoch}: {skipped} unreadable {part} images were skipped, first: {names[0]} (more in {file})"
    )
    if accelerator.is_main_process:
        known = set(file.read_text().splitlines()) if file.exists() else set()
        with file.open("a") as lines:
            lines.writelines(f"{name}\n" for name in dict.fromkeys(names) if name not in known)
    return {f"unreadable_{part}": skipped, f"read_{part}": read}


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id
