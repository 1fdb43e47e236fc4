"""Common parts of the results pages: titles, and the lists of runs and machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group

TITLES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10 (JPEG copies)", "fashion_mnist": "Fashion-MNIST"}
"""names of the data sets on pages"""


def runs(groups: Mapping[str, Group]) -> str:
    """The number of runs of each row."""
    return f"Runs: {', '.join(f'{group.name}: {len(group.records)}' for group in groups.values())}."


def machines(groups: Mapping[str, Group]) -> str:
    """The machines on which the records were made."""
    found: list[dict[str, Any]] = [record["machine"] for group in groups.values() for record in group.records]
    keys = list(dict.fromkeys(key for machine in found for key in machine))
    seen = {tuple(str(machine.get(key, "")) for key in keys) for machine in found}
    return f"Trained on:\n\n{table(keys, sorted(seen))}"


def indented(text: str) -> str:
    """Text for the body of an admonition: all lines but the first are indented by four spaces."""
    return text.replace("\n", "\n    ").rstrip()
