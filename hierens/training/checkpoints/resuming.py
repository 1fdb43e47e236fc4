"""Checks a checkpoint against the run that will resume from it, before anything of the run is overwritten.

A manifest shows that files are unchanged, not who wrote them. Files of torch's format are therefore read without
unpickling (`weights_only`): only plain values and tensors. Whether the optimiser accepts its state is tried on tensors
without memory.
"""

from __future__ import annotations

import copy
import pickle
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils.other import load
from torch import Tensor, nn

from hierens.core.adaptive_base import AdaptiveBase
from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, read_json, short
from hierens.hub.saving import CONFIG
from hierens.hub.validate import check_types, read_header
from hierens.training.checkpoints.state import LARGEST

# What the optimiser's state and the averages depend on, and what decides which images an epoch has seen.
_FIXED = ("optimizer", "precision", "ema_decay")
_FIXED_WITHIN_AN_EPOCH = ("batch_size", "accumulation", "seed")


def check_config(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], within_an_epoch: bool) -> None:
    """Check that the settings that cannot change when a run resumes are the same.

    Args:
        folder: the checkpoint.
        before: its configuration.
        now: the configuration of the run.
        within_an_epoch: whether the checkpoint was written in the middle of an epoch.

    Raises:
        ValueError: one of them differs.
    """
    for name in (*_FIXED, *(_FIXED_WITHIN_AN_EPOCH if within_an_epoch else ())):
        was, new = before.get(name), now[name]
        if was != new and (name != "ema_decay" or None in (was, new)):
            _refuse(folder, name, was, new, "an epoch that is under way" if name in _FIXED_WITHIN_AN_EPOCH else "it")


def check_model(folder: Path, model: AdaptiveBase) -> None:
    """Check that the checkpoint's network was made with the same arguments as the model.

    Raises:
        ValueError: it was not.
        LoadError: its description cannot be read.
    """
    if not (folder / CONFIG).is_file():  # the comparison of tensors remains
        return
    content = read_json(folder / CONFIG, "the config of a hierens model")
    there = content if isinstance(content, dict) else {}
    before = _arguments(there.get("architecture"), there.get("model_args"))
    for name, new in _arguments(model.architecture, model.arguments()).items():
        if (was := before.get(name)) not in (None, new):
            _refuse(folder, name, was, new)


def _arguments(architecture: Any, arguments: Any) -> dict[str, Any]:
    """What a user chose of a network, by the names of flags and fields."""
    known = arguments if isinstance(arguments, Mapping) else {}
    found = {"method": architecture, "backbone": known.get("backbone")}
    for name, key in (("blocks", "branching"), ("exits", "kept")):
        if isinstance(parts := known.get(key), list):
            found[name] = len(parts)
    return found | {name: known.get(name) for name in ("branching", "members", "rank")}


def _refuse(folder: Path, name: str, was: Any, new: Any, what: str = "it") -> NoReturn:
    raise ValueError(
        f"{folder} was written with {name}={short(was)}, this run has {new!r}: {what} cannot resume with another "
        "value. Keep the value, or start anew with resume='never'."
    )


def check_data(folder: Path, before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Check that the data are read in the same order as before.

    Raises:
        ValueError: they are a stream that is divided over other processes or workers.
    """
    if before == now:
        return
    shown = [", ".join(f"{count} {name}" for name, count in data.items()) or "none" for data in (before, now)]
    raise ValueError(
        f"{folder} was written while the data were streamed to {shown[0]}, this run has {shown[1]}: the order of a "
        "stream depends on that. Use as many as before, or start anew with resume='never'."
    )


def check_sharding(folder: Path, before: bool, now: bool) -> None:
    """Check that a checkpoint was written with FSDP if the run uses it, and without otherwise.

    Raises:
        ValueError: it was not.
    """
    if before != now:
        was, new = ("with FSDP" if sharded else "without FSDP" for sharded in (before, now))
        raise ValueError(f"{folder} was written {was}, this run trains {new}: train as before, or with resume='never'.")


def check_weights(file: Path, model: nn.Module) -> None:
    """Check the names, shapes and types in a file of weights, from its header.

    Raises:
        ValueError: they are another model's.
    """
    header, own = read_header(file), model.state_dict()
    there, here = ({name: tuple(part.shape) for name, part in parts.items()} for parts in (header, own))
    if different := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        name = different[0]
        raise ValueError(
            f"{file} holds another model: {len(different)} of {len(here)} tensors differ, such as "
            f"{short(name, plain=True)} ({there.get(name, 'missing')} there, {here.get(name, 'missing')} here). Make "
            "the model as it was, or start anew with resume='never'."
        )
    check_types(own, header, file)


def check_states(folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
    """Check the contents of the files of torch's format.

    Args:
        folder: the checkpoint.
        optimizer: the one that will load optimizer.bin; None if its state is in another file.

    Raises:
        LoadError: a file is damaged, holds objects, or a state that the optimiser does not accept.
    """
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".pt")):
        state = _loaded(file)
        if file.name.startswith("random_states_"):
            _check_random_states(file, state)
        elif file.name == "optimizer.bin" and optimizer is not None:
            _check_optimizer(file, state, optimizer)


def _loaded(file: Path) -> Any:
    """The contents of a file of torch's format; tensors stay on the disk until they are used."""
    try:
        with zipfile.ZipFile(file) as records:
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise LoadError(f"{file} is damaged or was not written by torch.save ({first_line(error)}).") from error
    if packed:  # a small file could then need much memory
        raise LoadError(f"{file} is compressed, which torch.save never does.")
    try:
        return load(file, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{file} holds objects other than tensors and plain values, which hierens does not unpickle."
        ) from error
    except Exception as error:
        raise LoadError(f"{file} is damaged ({short(first_line(error), plain=True)}).") from error


def _check_random_states(file: Path, state: Any) -> None:
    """Accelerate ignores states that it cannot set, and the resumed run would then differ."""
    try:
        random.Random().setstate(state["random_state"])
        np.random.RandomState().set_state(state["numpy_random_seed"])
        torch.Generator().set_state(state["torch_manual_seed"])
    except Exception as error:
        raise LoadError(f"{file} holds no valid states of random generators ({_reason(error)}).") from error
    if not is_whole(state.get("step", 0), 0, LARGEST):
        raise LoadError(f"{file}: step must be a non-negative integer, got {short(state['step'])}.")


def _check_optimizer(file: Path, state: Any, optimizer: torch.optim.Optimizer) -> None:
    try:
        _try_step(optimizer, None)
    except Exception:
        return  # this optimiser cannot step on meta tensors, whatever its state
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), dict):
        raise LoadError(f"{file} holds no valid state of an optimiser, got {short(state)}.")
    try:
        _try_step(optimizer, dict(state))
    except Exception as error:
        name = type(optimizer).__name__
        raise LoadError(f"{file} holds a state that {name} does not accept ({_reason(error)}).") from error


def _try_step(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
    """Do a step with a copy of the optimiser, on meta tensors of the parameters' shapes."""
    meta = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    known: dict[int, Any] = {id(optimizer.state): type(optimizer.state)(dict)}
    trial = copy.deepcopy(optimizer, {**meta, **known})
    for fresh in meta.values():
        fresh.grad = torch.empty_like(fresh)
    if state is not None:
        trial.load_state_dict(state)
        for parameter, values in trial.state.items():
            if not isinstance(parameter, Tensor) or not isinstance(values, dict):
                raise ValueError(f"it has a state for {short(parameter)}, which is no parameter")
        for group in trial.param_groups:
            if wrong := next((name for name, value in group.items() if not _is_setting(name, value)), None):
                raise ValueError(f"{short(wrong, plain=True)} is {short(group[wrong])}")
    type(trial).step(trial)


def _is_setting(name: str, value: Any) -> bool:
    """Whether an optimiser's group may have this value: text, a boolean, finite numbers, or its parameters."""
    if name == "params" or value is None or isinstance(value, (bool, str)):
        return True
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return all(is_finite(number) or isinstance(number, (bool, Tensor)) for number in numbers)


def _reason(error: Exception) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    return short(text, plain=True)
