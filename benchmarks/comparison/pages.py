"""What results pages have in common: titles, and what they end with: how many runs there were, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group

TITLES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10 (JPEG copies)", "fashion_mnist": "Fashion-MNIST"}
"""what pages call a data set"""


def runs(groups: Mapping[str, Group]) -> str:
    """How many runs each row is a mean of."""
    return f"Runs: {', '.join(f'{group.name}: {len(group.records)}' for group in groups.values())}."


def machines(groups: Mapping[str, Group]) -> str:
    """On what the records were made."""
    found: list[dict[str, Any]] = [record["machine"] for group in groups.values() for record in group.records]
    keys = list(dict.fromkeys(key for machine in found for key in machine))
    seen = {tuple(str(machine.get(key, "")) for key in keys) for machine in found}
    return f"Trained on:\n\n{table(keys, sorted(seen))}"


def indented(text: str) -> str:
    """By four spaces, as an admonition holds it; for the place behind the first four."""
    return text.replace("\n", "\n    ").rstrip()
