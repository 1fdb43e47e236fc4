"""Measures how many branches of each level to run in one call on this machine, and stores the result in a file.

If layers are small, one call for all branches uses all cores; if feature maps are large, one call per branch keeps them
in the cache. Which is faster depends on the level, the batch and the machine. Measuring takes a second or two.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hierens.branches.activations import Activations
from hierens.branches.executor import AnyLevel
from hierens.branches.fused_layers import FusedConvolution
from hierens.core.atomic_files import replacing
from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, read_json, short
from hierens.core.modes import evaluating
from hierens.core.progress import with_progress
from hierens.core.tree import nested_sizes
from hierens.core.version import __version__
from hierens.evaluation.profiling import call_ms, table
from hierens.models.level_tree import LevelTree

_REPEATS = 5  # interleaved rounds over all choices
_SECONDS = 0.02  # for each choice in each round, at least one call
_MOST_BYTES, _MOST_ITEMS, _LARGEST = 16 * 2**20, 10_000, 10**6  # limits of a file, of its lists and of its numbers


@dataclass(frozen=True)
class Measurement:
    """Times of some branches of a level, for different numbers of branches per call.

    Attributes:
        level: index; the head and the classifier come last.
        branches: number of branches that were run.
        batch_size: number of images.
        milliseconds: median time, by the number of branches per call.

    Raises:
        ValueError: impossible numbers, such as 0 branches in one call.
    """

    level: int
    branches: int
    batch_size: int
    milliseconds: dict[int, float]

    def __post_init__(self) -> None:
        for name, least in (("level", 0), ("branches", 1), ("batch_size", 1)):
            if not is_whole(getattr(self, name), least, _LARGEST):
                got = short(getattr(self, name))
                raise ValueError(f"{name} must be a whole number from {least} to {_LARGEST}, got {got}.")
        for together, milliseconds in self.milliseconds.items():
            if not is_whole(together, 1, self.branches):
                raise ValueError(f"{short(together)} branches cannot run together: there are {self.branches}.")
            if not is_finite(milliseconds, 0):
                raise ValueError(f"milliseconds must be finite and not negative, got {short(milliseconds)}.")
        if not self.milliseconds:
            raise ValueError("milliseconds must hold at least one time, got none.")

    @property
    def together(self) -> int:
        """The fastest number of branches per call."""
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


@dataclass(frozen=True)
class Tuning:
    """The measurements for one model on one machine; prints as a table.

    Attributes:
        machine: device, threads, precision and versions.
        model: identifies the model by its architecture, cuts and tree, and whether it is fused.
        size: (C, H, W) of the images.
        measurements: one for each level, number of branches and batch size.
    """

    machine: str
    model: str
    size: tuple[int, ...]
    measurements: tuple[Measurement, ...]

    def __str__(self) -> str:
        """One line for each measurement, with the fastest number of branches per call and all times."""
        rows = [
            (
                f"{m.level}",
                f"{m.branches}",
                f"{m.batch_size}",
                f"{m.together}",
                ", ".join(f"{together}: {ms:.2f}" for together, ms in m.milliseconds.items()),
            )
            for m in self.measurements
        ]
        return table(("level", "branches", "batch", "together", "ms"), rows)


def tune(
    model: LevelTree,
    example: Tensor,
    depths: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    file: str | Path | None = None,
) -> Tuning:
    """Measure the fastest number of branches per call for each level, and set the model to use it.

    The setting applies to inference with the executor `auto`. A batch size or number of branches that was not measured
    uses the setting of the next larger one that was, or otherwise of the largest.

    Args:
        model: preferably a fused one, on the device and in the precision in which it will run.
        example: images (N, C, H, W); only their shape, device and data type are used.
        depths: that will be used; all by default.
        batch_sizes: that will be used; the example's by default.
        file: a JSON file for the results, for example `tuning.json` beside the model. If it holds measurements for this
            machine, model and image size, they are used instead of measuring again. Other entries are kept.

    Returns:
        The measurements.

    Raises:
        ValueError: a depth out of range, a batch size below 1, or images that the model does not take.
        LoadError: the file is not a tuning file, or is for other levels than the model's.
    """
    sizes = nested_sizes(model.tree.leaves)
    counts = sorted({model.tree.leaves_at(depth, None) for depth in (range(len(sizes)) if depths is None else depths)})
    batches = sorted({int(example.shape[0])} if batch_sizes is None else set(batch_sizes))
    if not batches or batches[0] < 1:
        raise ValueError(f"batch sizes must be at least 1, got {list(batch_sizes or ())}.")
    size = tuple(example.shape[1:])
    known = _read(file) if file is not None else []
    wanted = {(count, batch) for count in counts for batch in batches}
    key = (_machine(example), _identity(model), size)
    found = next((t for t in known if (t.machine, t.model, t.size) == key), None)
    if found is None or not wanted <= _covered(model, found, batches):
        with evaluating(model), torch.no_grad():
            measured = with_progress(_measured(model, example[:1], counts, batches), None, "tuning")
            found = Tuning(*key, tuple(measured))
        for module in model.modules():
            if isinstance(module, FusedConvolution):
                module.forget()
        if file is not None:
            _remember(file, found)
    try:
        apply(model, found)
    except ValueError as error:
        raise LoadError(f"{file} cannot be used: {error}") from error
    return found


def apply(model: LevelTree, tuning: Tuning) -> None:
    """Set the levels of a model to use the fastest numbers of branches per call.

    Raises:
        ValueError: the measurements are for levels that the model does not have.
    """
    levels = model.all_levels()
    for m in tuning.measurements:
        if m.level >= len(levels) or m.branches > levels[m.level].branches:
            raise ValueError(
                f"the tuning is for another model: {m.branches} branches were measured in level {m.level}, and the "
                f"model has {[level.branches for level in levels]} in its levels."
            )
    for index, level in enumerate(levels):
        level.plan = {(m.branches, m.batch_size): m.together for m in tuning.measurements if m.level == index}


def _measured(model: LevelTree, image: Tensor, counts: Iterable[int], batches: Iterable[int]) -> Iterable[Measurement]:
    levels, done = model.all_levels(), set[tuple[int, int, int]]()
    for batch in batches:
        x = model._prepared(image.expand(batch, -1, -1, -1).contiguous())
        for count in counts:
            activations = Activations([x])
            for index, level in enumerate(levels):
                inner = index < model.tree.levels
                branches = model.tree.width(index, count) if inner else count
                parents = [model.tree.parent(index, branch) for branch in range(branches)] if inner else None
                if (index, branches, batch) not in done and level.grouped and level.branches > 1:
                    done.add((index, branches, batch))
                    yield Measurement(index, branches, batch, _times(level, activations, parents, branches))
                activations = level(activations, parents)


def _times(level: AnyLevel, x: Activations, parents: Sequence[int] | None, branches: int) -> dict[int, float]:
    """Milliseconds by number of branches per call, in interleaved rounds, so that disturbances affect all alike."""
    choices = [together for together in (2**i for i in range(20)) if together < branches] + [branches]
    times: dict[int, list[float]] = {together: [] for together in choices}
    planned, executor = level.plan, level.executor
    level.executor = "auto"
    try:
        for repeat in range(_REPEATS + 1):
            for together in choices:
                level.plan = {(branches, 1): together}
                milliseconds = call_ms(lambda: level(x, parents), x.first_tensor().device, _SECONDS)
                if repeat:  # the first round also reorders weights
                    times[together].append(milliseconds)
    finally:
        level.plan, level.executor = planned, executor
    return {together: statistics.median(values) for together, values in times.items()}


def _covered(model: LevelTree, tuning: Tuning, batches: Iterable[int]) -> set[tuple[int, int]]:
    """The pairs of a number of leaves and a batch size for which every level with a choice was measured."""
    measured = {(m.level, m.branches, m.batch_size) for m in tuning.measurements}
    covered = set()
    for count in range(1, model.tree.leaves + 1):
        for batch in batches:
            needed = {
                (index, model.tree.width(index, count) if index < model.tree.levels else count, batch)
                for index, level in enumerate(model.all_levels())
                if level.grouped and level.branches > 1
            }
            if needed <= measured:
                covered.add((count, batch))
    return covered


def _machine(x: Tensor) -> str:
    if x.device.type == "cuda":
        device = torch.cuda.get_device_name(x.device)
    else:
        device = f"{x.device.type}, {_processor()}, {torch.get_num_threads()} threads"
    precision = str(x.dtype).removeprefix("torch.")
    return f"{device}, {precision}, torch {torch.__version__}, hierens {__version__}"


def _processor() -> str:
    """The name of the processor, if the system reports it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _identity(model: nn.Module) -> str:
    return json.dumps({"kind": type(model).__name__, **model._model_args}, sort_keys=True, default=str)  # type: ignore[dict-item]


def _read(file: str | Path) -> list[Tuning]:
    if not Path(file).exists():
        return []
    try:
        records = read_json(Path(file), "a tuning file", _MOST_BYTES)
        return [_tuning(record) for record in _list_of(records, dict, "tunings")]
    except LoadError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error).rstrip(".")
        raise LoadError(
            f"{file} is not a file that tune() wrote ({reason}): choose another file, or remove it."
        ) from error


def _tuning(record: dict[str, Any]) -> Tuning:
    for name in ("machine", "model"):
        if not isinstance(record[name], str):
            raise ValueError(f"{name} should be a string, got {short(record[name])}")
    size = tuple(_list_of(record["size"], int, "size"))
    found = _list_of(record["measurements"], dict, "measurements")
    measurements = tuple(
        Measurement(m["level"], m["branches"], m["batch_size"], _by_number(m["milliseconds"])) for m in found
    )
    return Tuning(record["machine"], record["model"], size, measurements)


def _list_of(value: Any, kind: type, name: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ITEMS or not all(type(item) is kind for item in value):
        raise ValueError(f"{name} should be a list of at most {_MOST_ITEMS} {kind.__name__}, got {short(value)}")
    return value


def _by_number(milliseconds: Any) -> dict[int, Any]:
    """Times with the keys as numbers, which JSON stores as strings."""
    if not isinstance(milliseconds, dict) or not all(re.fullmatch("[1-9][0-9]{0,6}", key) for key in milliseconds):
        raise ValueError(f"milliseconds should hold times by numbers of branches, got {short(milliseconds)}")
    return {int(together): value for together, value in milliseconds.items()}


def _remember(file: str | Path, new: Tuning) -> None:
    """Merge measurements into the file as it is now, because other processes may have added to it as well."""
    with replacing(file) as partial:
        known = {(t.machine, t.model, t.size): t for t in _read(file)}
        key = (new.machine, new.model, new.size)
        before = known[key].measurements if key in known else ()
        merged = {(m.level, m.branches, m.batch_size): m for m in (*before, *new.measurements)}
        known[key] = replace(new, measurements=tuple(merged.values()))
        partial.write_text(json.dumps([asdict(t) for t in known.values()], indent=1) + "\n")
