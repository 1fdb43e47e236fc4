"""How far a run has come, and its file `trainer.json` in a checkpoint.

A manifest shows that a file is unchanged, not who wrote it, so the values in the file are checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, read_json, short

STATE = "trainer.json"
LARGEST = 2**53  # steps and epochs
_MOST_BYTES = 32 * 2**20  # of trainer.json: its history has a record per epoch, with a value per leaf
_MOST = 10**6  # records and losses


@dataclass
class TrainState:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        epoch: the epoch to continue with.
        batch: micro-batches of that epoch that are done.
        history: a record per validated epoch.
        unlogged: losses since the last line of the log.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    unlogged: list[float] = field(default_factory=list)


def score(record: Mapping[str, Any]) -> float:
    """The accuracy by which validations are compared, or -infinity if any number in the record is not finite."""
    values = [value for entry in record.values() for value in (entry if isinstance(entry, list) else [entry])]
    lost = any(isinstance(value, float) and not math.isfinite(value) for value in values)
    return -math.inf if lost else float(record["accuracy"][-1])


def read_state(file: Path) -> tuple[TrainState, dict[str, Any], dict[str, int]]:
    """The state of a run, its configuration, and what the order of its data depends on, from `trainer.json`.

    Raises:
        LoadError: fields are missing or unknown, or have values of other types.
    """
    content = read_json(file, "the state of a run", _MOST_BYTES, nan=True)  # losses may have been NaN
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("state", "config", "data")):
        raise LoadError(f"{file} has no state, config and data: it is not the state of a run.")
    found, known = content["state"], [entry.name for entry in fields(TrainState)]
    if wrong := sorted(set(known) ^ found.keys()):
        raise LoadError(f"{file}: the fields of the state must be {known}; unknown or missing: {short(wrong[0])}.")
    for name in ("step", "epoch", "batch"):
        if not is_whole(found[name], 0, LARGEST):
            raise LoadError(f"{file}: {name} must be a non-negative integer, got {short(found[name])}.")
    for name, fits, what in (
        ("history", _is_record, "records of validated epochs"),
        ("unlogged", lambda loss: isinstance(loss, float), "losses"),
    ):
        values = found[name]
        listed = isinstance(values, list) and len(values) <= _MOST
        wrong = [value for value in values if not fits(value)][:1] if listed else [values]
        if wrong:
            raise LoadError(f"{file}: {name} must be a list of {what}, got {short(wrong[0])}.")
    for name, value in content["data"].items():
        if not is_whole(value, 0, LARGEST):
            raise LoadError(f"{file}: the values of data must be integers, got {short(value)} for {short(name)}.")
    return TrainState(**found), content["config"], content["data"]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not all(is_whole(record.get(key), 0, LARGEST) for key in ("epoch", "step")):
        return False
    accuracy = record.get("accuracy")
    return isinstance(accuracy, list) and bool(accuracy) and all(map(_is_real, accuracy))


def _is_real(value: Any) -> bool:
    return is_finite(value) or (isinstance(value, float) and not math.isfinite(value))
