"""Resident memory of this process, as reported by Linux."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def memory_mb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident memory now (VmRSS) or its maximum since `forget_peak` (VmHWM), in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def forget_peak() -> None:
    """Reset the maximum."""
    Path("/proc/self/clear_refs").write_text("5")
