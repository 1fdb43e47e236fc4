"""Common parts of the steps: JSON file, time limit, and tables that are measured cell by cell."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison.records import machine as processor_and_versions

from hierens.core.errors import first_line

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
SAME = ("device", "torch", "hierens")  # equal for all rows of a table


class Deadline:
    """The time limit of a step.

    Args:
        seconds: duration of the step.
        start: `time.monotonic()` at the start of the process.
    """

    def __init__(self, seconds: float, start: float | None = None) -> None:
        self.seconds, self.start = seconds, time.monotonic() if start is None else start

    def left(self) -> float:
        """Remaining seconds."""
        return self.start + self.seconds - time.monotonic()

    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start


@dataclass(frozen=True)
class Context:
    """Folders and time limit of a step.

    Attributes:
        results: folder of the steps' JSON files.
        runs: folder of checkpoints and of images.
        tiny: whether networks and data are tiny, to test the step.
        deadline: time limit of this process.
    """

    results: Path
    runs: Path
    tiny: bool
    deadline: Deadline

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Record:
    """A step's JSON file, which `write` replaces atomically.

    Args:
        context: folders and time limit.
        step: the name of the step and of the file.
        go_on: keep the results of an earlier call of this step, on the same device and with the same versions.

    Raises:
        ValueError: the existing results are from another device or other versions.
    """

    def __init__(self, context: Context, step: str, go_on: bool = False) -> None:
        self.context, self.file = context, context.results / f"{step}.json"
        before = read(context.results, step) if go_on else None
        now = machine()
        if before is not None and (other := [key for key in SAME if before["machine"][key] != now[key]]):
            key = other[0]
            raise ValueError(
                f"{self.file} was measured with {key} {before['machine'][key]!r}, but here it is {now[key]!r}: a table "
                "must not mix them. Move the file away to measure again, or use another folder with --results."
            )
        self._before_s = 0.0 if before is None else float(before["wall_s"])
        self.content: dict[str, Any] = before or {"step": step, "tiny": context.tiny}
        self.content["machine"] = now

    def write(self, **changes: Any) -> Path:
        """Apply changes and write the file."""
        self.content |= changes
        self.content["wall_s"] = self._before_s + self.context.deadline.passed()
        return write_whole(self.file, json.dumps(rounded(self.content), indent=1) + "\n")

    def note_clocks(self) -> None:
        """Record the clocks under load; when the record was created, the device was idle."""
        if "clocks" in self.content["machine"]:
            self.content["machine"]["clocks"] = clocks()


def read(results: Path, step: str) -> dict[str, Any] | None:
    """The results of a step, or None."""
    file = results / f"{step}.json"
    return json.loads(file.read_text()) if file.is_file() else None


@dataclass(frozen=True)
class Cell:
    """One row of a table.

    Attributes:
        name: unique name in its table.
        reserve: remaining seconds that are required to start it.
        measure: returns the row.
    """

    name: str
    reserve: float
    measure: Callable[[], dict[str, Any]]


def fill(record: Record, cells: Sequence[Cell]) -> int:
    """Measure the missing cells of a record, in order, until the time is used up.

    The row of a cell that fails contains the error.

    Returns:
        The number of cells that remain.
    """
    rows: list[dict[str, Any]] = record.content.setdefault("rows", [])
    done = {row["cell"] for row in rows}
    waiting = [cell for cell in cells if cell.name not in done]
    while waiting and record.context.deadline.left() > waiting[0].reserve:
        cell = waiting.pop(0)
        try:
            row = cell.measure()
        except Exception as error:  # out of memory, or a way that this device does not support
            row = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if the device has failed: later results would be wrong
                torch.cuda.empty_cache()
        rows.append({"cell": cell.name, **row})
        record.write(left=len(waiting))
        print(f"{record.context.deadline.passed():5.0f} s  {cell.name}: {row.get('failed', 'measured')}", flush=True)
    record.note_clocks()
    record.write(left=len(waiting))
    return len(waiting)


def measure(record: Record, cases: Iterable[tuple[str, float, Callable[[], dict[str, Any]]]]) -> int:
    """As `fill`, for the names, reserves in seconds and measurements of cells; tiny cells need little time."""
    least = 0.5 if record.context.tiny else math.inf
    return fill(record, [Cell(name, min(reserve, least), call) for name, reserve, call in cases])


def machine() -> dict[str, Any]:
    """Device, clocks if the driver reports them, processor and versions."""
    found = {"device": "CPU", **processor_and_versions()}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {
            "device": about.name,
            "memory_gb": about.total_memory / 1e9,
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "clocks": clocks(),
        }
    return found


def clocks() -> dict[str, str]:
    """Current clocks, power limit and driver; empty if nvidia-smi fails."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def write_whole(file: Path, text: str) -> Path:
    """Write a file atomically, under a temporary name first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    os.replace(partial, file)
    return file


def rounded(value: Any) -> Any:
    """Round floats to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
