"""Checkpoints: whole or not there, verified when read, kept by policy.

A checkpoint is a folder `checkpoints/step-...`, sealed by a manifest of its files' sizes and digests. The newest
`keep_checkpoints` stay, and the one with the best validation, to which the link `checkpoints/best` points. Each is a
model folder too, which `hierens.from_pretrained` reads (but for DeepSpeed's layout). Weights are
safetensors; the optimiser's state is torch's format, which Accelerate reads back with `weights_only`.

Nothing that was not written whole counts. What is damaged, and what is newer than the point from which a run goes on,
is renamed (`.damaged`, `.superseded`) and not looked at again: delete it when you like.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import short
from hierens.hub.saving import WEIGHTS, save_config
from hierens.hub.validate import check_types, read_header
from hierens.training.checkpoints.files import (
    PARTIAL,
    damage,
    free_space,
    noting_write_errors,
    publish,
    recover,
    remove,
    seal,
)
from hierens.training.checkpoints.resuming import check_states, read_trainer
from hierens.training.config import TrainConfig, to_json
from hierens.training.sharding import is_sharded, save_optimizer, save_weights
from hierens.training.sharding import load as load_sharded

_STATE, _BEST, _AVERAGE, _OPTIMIZER = "trainer.json", "best", "model_ema.safetensors", "optimizer_by_name.bin"
_Answer = TypeVar("_Answer")
# What a checkpoint's optimiser and averages cannot do without, and what decides which images an epoch has seen.
_FIXED = ("optimizer", "precision", "ema_decay")
_FIXED_WITHIN_AN_EPOCH = ("batch_size", "accumulation", "seed")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


@dataclass
class TrainState:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        epoch: the epoch to go on with.
        batch: micro-batches of it that are done.
        history: a record per validated epoch.
        unlogged: losses since the last line of the log.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    unlogged: list[float] = field(default_factory=list)


def save_checkpoint(
    accelerator: Accelerator,
    config: TrainConfig,
    state: TrainState,
    data: Mapping[str, int] | None = None,
    average: nn.Module | None = None,
) -> Path:
    """Write a checkpoint and remove those that the policy does not keep. Every process must call it.

    Args:
        accelerator: knows model, optimiser and what else was registered.
        config: goes into the checkpoint; its `keep_checkpoints` and `keep_best` are the policy.
        state: how far the run has come.
        data: what the order of the data depends on, if it depends on anything: see `data_signature`.
        average: the model with averaged weights, if there is one.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointWriteError: the disk did not take it; nothing half-written is left. On every process.
    """
    folder = Path(config.output_dir) / "checkpoints"
    final = folder / _name(state.step)
    partial = final.with_suffix(PARTIAL)
    if accelerator.is_main_process:
        remove(partial)
    accelerator.wait_for_everyone()
    model = _model(accelerator)
    with noting_write_errors() as problems, _plain_weights(accelerator):
        if is_sharded(model):
            partial.mkdir(parents=True, exist_ok=True)
            save_weights(model, partial / WEIGHTS, accelerator.is_main_process)
            save_optimizer(
                model, accelerator._optimizers[0].optimizer, partial / _OPTIMIZER, accelerator.is_main_process
            )
        else:
            accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not problems:
        with noting_write_errors() as problems:
            about = {"state": asdict(state), "config": to_json(config), "data": dict(data or {})}
            (partial / _STATE).write_text(json.dumps(about))
            save_config(model, partial)
            if average is not None:
                tensors = {name: tensor.cpu().contiguous() for name, tensor in average.state_dict().items()}
                save_file(tensors, partial / _AVERAGE)
            seal(partial)
            publish(partial, final)
    problem = first_problem(problems)
    if accelerator.is_main_process:
        if problem:
            remove(partial)
        else:
            _apply_policy(folder, config, state)
    accelerator.wait_for_everyone()
    if problem:
        raise CheckpointWriteError(f"{final} cannot be written ({problem}): {free_space(folder)}.")
    return final


def first_problem(problems: list[str]) -> str:
    """What kept any process from writing; empty if nothing did. Every process must call it."""
    return next(filter(None, gather_object(problems or [""])), "")


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint written last, unread."""
    return next(reversed(_checkpoints(Path(output_dir) / "checkpoints")), None)


def choose_checkpoint(output_dir: str | Path, resume: str, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `resume` means, verified.

    Args:
        output_dir: of the run.
        resume: `auto`, the newest that is whole, where damaged ones are put aside; `never`; or a checkpoint's folder.
        say: told what was found damaged.

    Raises:
        ValueError: the folder named is no checkpoint, or a damaged one.
    """
    folder = Path(output_dir) / "checkpoints"
    chosen = None
    if resume not in ("auto", "never"):
        chosen = Path(resume)
        if not (chosen / _STATE).is_file():
            raise ValueError(
                f"{resume} is no checkpoint (it has no {_STATE}): give a folder like checkpoints/step-000000500."
            )
        if wrong := defect(chosen):
            raise ValueError(
                f"the checkpoint {resume} is damaged: {wrong}. Give another one, or resume from 'auto', the newest "
                "that is whole."
            )
        chosen = chosen.resolve()  # `best` may come to mean another
    recover(folder, "step-*")
    if resume == "auto":
        for candidate in reversed(_checkpoints(folder)):
            wrong = defect(candidate)
            if wrong is None:
                chosen = candidate
                break
            say(f"the checkpoint {candidate} is damaged: {wrong}. {_put_aside(candidate, '.damaged')}")
    return chosen


def start_from(output_dir: str | Path, chosen: Path | None, say: Callable[[str], None] = print) -> None:
    """Put aside what is newer than the checkpoint that a run goes on from: what it does next takes its place.

    Args:
        output_dir: of the run.
        chosen: the checkpoint, None for a new start.
        say: told what was put aside.
    """
    folder = Path(output_dir) / "checkpoints"
    newer = [other for other in _checkpoints(folder) if chosen is None or other.name > chosen.name]
    for other in newer:
        say(f"the checkpoint {other} is newer than where this run starts. {_put_aside(other, '.superseded')}")
    if not (folder / _BEST).exists():
        (folder / _BEST).unlink(missing_ok=True)  # it pointed to one of those


def defect(folder: Path) -> str | None:
    """What keeps a run from going on from a checkpoint: damage, or weights or statistics that are not finite."""
    if wrong := damage(folder):
        return wrong
    for file in sorted(folder.glob("*.safetensors")):
        # What holds no weights is named when they are loaded.
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                values = tensors.get_tensor(name)
                if not bool((values if values.itemsize > 1 else values.double()).isfinite().all()):
                    return f"{name} in {file.name} is not finite"
    return None


def last_good_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint without a defect, whose last validation gave finite numbers."""
    for folder in reversed(_checkpoints(Path(output_dir) / "checkpoints")):
        if defect(folder) is None:
            history = read_trainer(folder / _STATE, TrainState)[0].history
            if not history or score(history[-1]) > -math.inf:
                return folder
    return None


def score(record: Mapping[str, Any]) -> float:
    """By what one validation is better than another: its accuracy, but below any other if a number is not finite."""
    values = [value for entry in record.values() for value in (entry if isinstance(entry, list) else [entry])]
    lost = any(isinstance(value, float) and not math.isfinite(value) for value in values)
    return -math.inf if lost else float(record["accuracy"][-1])


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    config: TrainConfig,
    data: Mapping[str, int] | None = None,
    average: nn.Module | None = None,
) -> TrainState:
    """Put weights, optimiser and averages back, say how far the run had come, and print what was configured otherwise.

    The number of processes may be another than before, unless the data depend on it.

    Raises:
        ValueError: the checkpoint is of another model, optimiser, or order of the data.
        LoadError: a file of it is damaged or holds something else.
    """
    state, before, data_before = read_trainer(folder / _STATE, TrainState)
    now = to_json(config)
    _check_data(folder, data_before, dict(data or {}), state)
    fixed = (*_FIXED, *(_FIXED_WITHIN_AN_EPOCH if state.batch else ()))
    for name in fixed:
        was, new = before.get(name), now[name]
        if was != new and (name != "ema_decay" or None in (was, new)):
            where = "an epoch that is under way" if name in _FIXED_WITHIN_AN_EPOCH else "it"
            raise ValueError(
                f"{folder} was written with {name}={short(was)}, this run has {new!r}: {where} cannot go on with "
                "another. Keep it, or start anew with resume='never'."
            )
    model = _model(accelerator)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:  # which has a layout of its own
        _check_weights(folder / WEIGHTS, model)
    if average is not None:
        _check_weights(folder / _AVERAGE, average)
    _check_layout(accelerator, folder)
    check_states(folder, None if is_sharded(model) else accelerator._optimizers[0].optimizer)
    try:
        if is_sharded(model):
            load_sharded(model, accelerator._optimizers[0].optimizer, folder / WEIGHTS, folder / _OPTIMIZER)
        else:
            with _plain_weights(accelerator):
                accelerator.load_state(str(folder))
        if average is not None:
            average.load_state_dict(load_file(folder / _AVERAGE))
    except Exception as error:  # each library has errors of its own
        raise LoadError(f"{folder} does not fit this run: {short(first_line(error), plain=True)}") from error
    names = [name for name in now if now[name] != before.get(name) and name not in ("output_dir", "resume")]
    if names:
        changes = ", ".join(f"{name} {short(before.get(name))} -> {now[name]!r}" for name in names)
        accelerator.print(f"changed since {folder}: {changes}")
    return state


def resolve_checkpoint(accelerator: Accelerator, config: TrainConfig) -> Path | None:
    """`choose_checkpoint`, done by the main process for all; every process raises what it raises."""
    return agreed(accelerator, lambda: choose_checkpoint(config.output_dir, config.resume))


def agreed(accelerator: Accelerator, work: Callable[[], _Answer]) -> _Answer:
    """What the main process finds, for all; if that raises a ValueError, every process does."""
    answer: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def _check_data(folder: Path, before: dict[str, int], now: dict[str, int], state: TrainState) -> None:
    if before == now:
        return
    shown = [", ".join(f"{count} {name}" for name, count in data.items()) or "none" for data in (before, now)]
    raise ValueError(
        f"{folder} was written while the data were streamed to {shown[0]}, this run has {shown[1]}: the order of a "
        "stream depends on that. Use as many as before, or start anew with resume='never'."
    )


def _check_weights(file: Path, model: nn.Module) -> None:
    """Names, shapes and types alone, so that another architecture is named before anything is overwritten."""
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


def _check_layout(accelerator: Accelerator, folder: Path) -> None:
    before, now = (folder / _OPTIMIZER).is_file(), is_sharded(_model(accelerator))
    if before != now:
        was, new = ("with FSDP" if sharded else "without FSDP" for sharded in (before, now))
        raise ValueError(f"{folder} was written {was}, this run trains {new}: train as before, or with resume='never'.")


def _apply_policy(folder: Path, config: TrainConfig, state: TrainState) -> None:
    found = _checkpoints(folder)
    kept = set(found[-config.keep_checkpoints :])
    there = [record for record in state.history if (folder / _name(record["step"])).is_dir()]
    validated = [record for record in there if score(record) > -math.inf]
    if config.keep_best and validated:
        best = folder / _name(max(validated, key=score)["step"])
        kept.add(best)
        with contextlib.suppress(OSError):  # not every file system has links
            link = folder / f"{_BEST}.new"
            link.unlink(missing_ok=True)
            link.symlink_to(best.name, target_is_directory=True)
            link.replace(folder / _BEST)
    for old in found:
        if old not in kept:
            remove(old)


def _model(accelerator: Accelerator) -> Any:
    """The model itself, without Accelerate's wrapping."""
    return accelerator.unwrap_model(accelerator._models[0])


def _put_aside(folder: Path, suffix: str) -> str:
    aside = folder.with_suffix(suffix)
    remove(aside)
    folder.rename(aside)
    return f"It is put aside as {aside.name}."


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)


def _name(step: int) -> str:
    return f"step-{step:09d}"


@contextlib.contextmanager
def _plain_weights(accelerator: Accelerator) -> Iterator[None]:
    """Weights go under the model's own names inside, whatever Accelerate has wrapped it in: any number of processes."""

    def save(models: list[Any], weights: list[Any], directory: str) -> None:
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models[: len(weights)]]

    def load(models: list[Any], directory: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    hooks = accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
