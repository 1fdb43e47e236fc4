"""Memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def memory_mb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident now, or at most since `forget_peak`, in MB of 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def forget_peak() -> None:
    """From here on the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
