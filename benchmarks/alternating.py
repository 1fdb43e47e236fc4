"""Times of several ways to run something, measured in alternation: a change of the machine affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Run = Callable[[], Any]


def alternating(ways: Mapping[str, Sequence[Run]], rounds: int, skipped: int) -> dict[str, list[list[float]]]:
    """Milliseconds of every way and depth in each round.

    Args:
        ways: by name, a function for each depth.
        rounds: in each, every function is called once.
        skipped: first rounds that are left out.
    """
    taken: dict[str, list[list[float]]] = {name: [[] for _ in each] for name, each in ways.items()}
    for _ in range(rounds):
        for name, each in ways.items():
            for depth, run in enumerate(each):
                start = time.perf_counter()
                run()
                taken[name][depth].append(1e3 * (time.perf_counter() - start))
    return {name: [times[skipped:] for times in each] for name, each in taken.items()}
