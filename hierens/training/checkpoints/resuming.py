"""What a checkpoint's files say, looked at before anything of a run is overwritten with it.

A manifest shows that files are as they were written, not who wrote them. So the values of `trainer.json` are checked,
and every file of torch's format is read without unpickling (`weights_only`): plain values and tensors alone. Whether
the optimiser can go on with its state is tried on tensors without memory.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.other import load
from torch import Tensor

from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, read_json, short

_State = TypeVar("_State")
_MOST_BYTES = 32 * 2**20  # of trainer.json: its history has a record for each epoch, with a value for each leaf
_MOST, _LARGEST = 10**6, 2**53  # records and losses, steps and epochs


def read_trainer(file: Path, state: type[_State]) -> tuple[_State, dict[str, Any], dict[str, int]]:
    """How far a run had come, how it was configured, and what the order of its data depends on.

    Args:
        file: trainer.json.
        state: the dataclass of how far a run has come; its fields are whole numbers and lists.

    Raises:
        LoadError: fields are missing or unknown, or have values of other types.
    """
    about = read_json(file, "what a checkpoint holds", _MOST_BYTES, nan=True)  # a run's losses may have been NaN
    if not isinstance(about, dict) or not all(isinstance(about.get(key), dict) for key in ("state", "config", "data")):
        raise LoadError(f"{file} holds no state, config and data: it is not what a checkpoint holds.")
    found, fields = about["state"], [field.name for field in dataclasses.fields(state)]  # type: ignore[arg-type]
    if wrong := sorted(set(fields) ^ found.keys()):
        raise LoadError(f"{file} has a state of other fields, such as {short(wrong[0])}: allowed are {fields}.")
    for name, value in found.items():
        if isinstance(getattr(state, name, None), int) and not is_whole(value, 0, _LARGEST):
            raise LoadError(f"{file}: {name} should be a whole number, not negative, got {short(value)}.")
    for name, fits, what in (
        ("history", _is_record, "records of validated epochs"),
        ("unlogged", lambda loss: isinstance(loss, float), "losses"),
    ):
        values = found[name]
        listed = isinstance(values, list) and len(values) <= _MOST
        wrong = [value for value in values if not fits(value)][:1] if listed else [values]
        if wrong:
            raise LoadError(f"{file}: {name} should be a list of {what}, got {short(wrong[0])}.")
    for name, value in about["data"].items():
        if not is_whole(value, 0, _LARGEST):
            raise LoadError(f"{file}: data should hold whole numbers, got {short(value)} for {short(name)}.")
    return state(**found), about["config"], about["data"]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not all(is_whole(record.get(key), 0, _LARGEST) for key in ("epoch", "step")):
        return False
    accuracy = record.get("accuracy")
    return isinstance(accuracy, list) and bool(accuracy) and all(map(_is_real, accuracy))


def _is_real(value: Any) -> bool:
    return is_finite(value) or (isinstance(value, float) and not math.isfinite(value))


def check_states(folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
    """See that the files of torch's format hold what they should.

    Args:
        folder: the checkpoint.
        optimizer: that will go on with the state in optimizer.bin; None if it lies elsewhere.

    Raises:
        LoadError: one is damaged, holds objects, or what the optimiser cannot go on with.
    """
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".pt")):
        state = _loaded(file)
        if file.name.startswith("random_states_"):
            _check_random_states(file, state)
        elif file.name == "optimizer.bin" and optimizer is not None:
            _check_optimizer(file, state, optimizer)


def _loaded(file: Path) -> Any:
    """What a file of torch's format holds; tensors stay on the disk until they are looked at."""
    try:
        with zipfile.ZipFile(file) as records:
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise LoadError(f"{file} is damaged or no file that torch.save wrote ({first_line(error)}).") from error
    if packed:  # a small file could become a large one in memory
        raise LoadError(f"{file} is compressed, as torch.save writes no file.")
    try:
        return load(file, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{file} holds something other than tensors and plain values: hierens does not unpickle it."
        ) from error
    except Exception as error:
        raise LoadError(f"{file} is damaged ({short(first_line(error), plain=True)}).") from error


def _check_random_states(file: Path, state: Any) -> None:
    """Accelerate passes over states that it cannot set, and the run would not be the same."""
    try:
        random.Random().setstate(state["random_state"])
        np.random.RandomState().set_state(state["numpy_random_seed"])
        torch.Generator().set_state(state["torch_manual_seed"])
    except Exception as error:
        raise LoadError(f"{file} holds no states of random numbers ({_reason(error)}).") from error
    if not is_whole(state.get("step", 0), 0, _LARGEST):
        raise LoadError(f"{file}: step should be a whole number, got {short(state['step'])}.")


def _check_optimizer(file: Path, state: Any, optimizer: torch.optim.Optimizer) -> None:
    try:
        _try_step(optimizer, None)
    except Exception:
        return  # an optimiser that takes no steps without memory, whatever its state
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), dict):
        raise LoadError(f"{file} holds no state of an optimiser, got {short(state)}.")
    try:
        _try_step(optimizer, dict(state))
    except Exception as error:
        name = type(optimizer).__name__
        raise LoadError(f"{file} holds a state that {name} cannot go on with ({_reason(error)}).") from error


def _try_step(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
    """A step of a copy of the optimiser over parameters of the same shapes that have no memory."""
    instead = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    known: dict[int, Any] = {id(optimizer.state): type(optimizer.state)(dict)}
    trial = copy.deepcopy(optimizer, {**instead, **known})
    for fresh in instead.values():
        fresh.grad = torch.empty_like(fresh)
    if state is not None:
        trial.load_state_dict(state)
        for parameter, values in trial.state.items():
            if not isinstance(parameter, Tensor) or not isinstance(values, dict):
                raise ValueError(f"it has a state of {short(parameter)}, which is no parameter")
        for group in trial.param_groups:
            if wrong := next((name for name, value in group.items() if not _is_setting(name, value)), None):
                raise ValueError(f"{short(wrong, plain=True)} is {short(group[wrong])}")
    type(trial).step(trial)


def _is_setting(name: str, value: Any) -> bool:
    """Whether a value is one that groups of an optimiser have beside their parameters: nothing but finite numbers."""
    if name == "params" or value is None or isinstance(value, (bool, str)):
        return True
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return all(is_finite(number) or isinstance(number, (bool, Tensor)) for number in numbers)


def _reason(error: Exception) -> str:
    what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    return short(what, plain=True)
