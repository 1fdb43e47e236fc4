"""How many branches of each level to run in one call: measured on the machine at hand, and remembered.

One call for all branches keeps every core busy where layers are small; one call per branch keeps feature maps in the
cache where they are large. Which wins depends on the level, the batch and the machine, and is found in a second or two.
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
from hierens.branches.any_level import AnyLevel
from hierens.branches.fused_layers import FusedConvolution
from hierens.core.atomic_files import replacing
from hierens.core.errors import first_line
from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, read_json, short
from hierens.core.modes import evaluating
from hierens.core.tree import nested_sizes
from hierens.core.version import __version__
from hierens.evaluation.profiling import call_ms, table
from hierens.models.level_tree import LevelTree

_REPEATS = 5  # rounds over all ways, interleaved
_SECONDS = 0.02  # that a way is run for in each round, at least once
_MOST_BYTES, _MOST, _LARGEST = 16 * 2**20, 10_000, 10**6  # of a file, of its lists, and of whole numbers in it


@dataclass(frozen=True)
class Measurement:
    """The ways to run some branches of a level, measured.

    Attributes:
        level: index; the head and the classifier come last.
        branches: how many ran.
        batch_size: images.
        milliseconds: median time, by how many branches ran in one call.

    Raises:
        ValueError: numbers that no measurement has, such as 0 branches in one call.
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
            raise ValueError("milliseconds must tell of at least one way to run the branches, got none.")

    @property
    def together(self) -> int:
        """The fastest way."""
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


@dataclass(frozen=True)
class Tuning:
    """What was measured on one machine for one model; printed, it is a table.

    Attributes:
        machine: device, threads, precision and versions.
        model: what identifies the model: its architecture, cuts and tree, and whether it is fused.
        size: (C, H, W) of the images.
        measurements: by level, branches and batch size.
    """

    machine: str
    model: str
    size: tuple[int, ...]
    measurements: tuple[Measurement, ...]

    def __str__(self) -> str:
        """One line for each measurement, with the chosen way and what the others took."""
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
    """Measure how many branches of each level to run in one call, and let the model do so from now on.

    It holds for inference in the executor `auto`. A batch or a number of branches that was not measured is run like the
    next larger one that was, or else like the largest.

    Args:
        model: best a fused one; it lies where it is to run, in the precision it is to run in.
        example: images (N, C, H, W); only their shape counts.
        depths: that will be used; all by default.
        batch_sizes: that will be used; the example's by default.
        file: JSON to remember in, for example `tuning.json` beside the model. What an earlier call measured there for
            this machine, model and image size is used instead of measuring again; other entries are kept.

    Returns:
        What was measured.

    Raises:
        ValueError: a depth out of range, a batch size below 1, images that the model does not take.
        LoadError: the file holds something else, or what the model cannot run.
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
            found = Tuning(*key, tuple(_measured(model, example[:1], counts, batches)))
        for module in model.modules():
            if isinstance(module, FusedConvolution):
                module.forget()
        if file is not None:
            _remember(file, found)
    try:
        apply(model, found)
    except ValueError as error:
        raise LoadError(f"{file} holds what this model cannot run: {error}") from error
    return found


def apply(model: LevelTree, tuning: Tuning) -> None:
    """Let a model's levels run as was found best.

    Raises:
        ValueError: it was measured on levels that the model does not have.
    """
    levels = model.all_levels()
    for m in tuning.measurements:
        if m.level >= len(levels) or m.branches > levels[m.level].branches:
            raise ValueError(
                f"the tuning is of another model: {m.branches} branches were measured in level {m.level}, and the "
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
                    yield Measurement(index, branches, batch, _ways(level, activations, parents, branches))
                activations = level(activations, parents)


def _ways(level: AnyLevel, x: Activations, parents: Sequence[int] | None, branches: int) -> dict[int, float]:
    """Milliseconds of each way to run some branches, in rounds over all ways, so that a disturbance hits all alike."""
    ways = [together for together in (2**i for i in range(20)) if together < branches] + [branches]
    times: dict[int, list[float]] = {together: [] for together in ways}
    planned, executor = level.plan, level.executor
    level.executor = "auto"
    try:
        for repeat in range(_REPEATS + 1):
            for together in ways:
                level.plan = {(branches, 1): together}
                milliseconds = call_ms(lambda: level(x, parents), x.first_tensor().device, _SECONDS)
                if repeat:  # the first round orders weights
                    times[together].append(milliseconds)
    finally:
        level.plan, level.executor = planned, executor
    return {together: statistics.median(values) for together, values in times.items()}


def _covered(model: LevelTree, tuning: Tuning, batches: Iterable[int]) -> set[tuple[int, int]]:
    """The numbers of leaves, and which of the batch sizes, for which every level that has a choice was measured."""
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
    """The processor's name where the system tells it."""
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
        records = read_json(Path(file), "what tune() writes", _MOST_BYTES)
        return [_tuning(record) for record in _list_of(records, dict, "tunings")]
    except LoadError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error).rstrip(".")
        raise LoadError(
            f"{file} does not hold what tune() writes ({reason}): name another file, or remove it."
        ) from error


def _tuning(record: dict[str, Any]) -> Tuning:
    for name in ("machine", "model"):
        if not isinstance(record[name], str):
            raise ValueError(f"{name} should be a text, got {short(record[name])}")
    size = tuple(_list_of(record["size"], int, "size"))
    found = _list_of(record["measurements"], dict, "measurements")
    measurements = tuple(
        Measurement(m["level"], m["branches"], m["batch_size"], _by_number(m["milliseconds"])) for m in found
    )
    return Tuning(record["machine"], record["model"], size, measurements)


def _list_of(value: Any, kind: type, name: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST or not all(type(item) is kind for item in value):
        raise ValueError(f"{name} should be a list of at most {_MOST} {kind.__name__}, got {short(value)}")
    return value


def _by_number(milliseconds: Any) -> dict[int, Any]:
    """Numbers are texts where they are keys of JSON."""
    if not isinstance(milliseconds, dict) or not all(re.fullmatch("[1-9][0-9]{0,6}", key) for key in milliseconds):
        raise ValueError(f"milliseconds should hold times by numbers of branches, got {short(milliseconds)}")
    return {int(together): value for together, value in milliseconds.items()}


def _remember(file: str | Path, new: Tuning) -> None:
    """Add what was measured to what the file holds by now: other processes may have added to it as well."""
    with replacing(file) as partial:
        known = {(t.machine, t.model, t.size): t for t in _read(file)}
        key = (new.machine, new.model, new.size)
        before = known[key].measurements if key in known else ()
        merged = {(m.level, m.branches, m.batch_size): m for m in (*before, *new.measurements)}
        known[key] = replace(new, measurements=tuple(merged.values()))
        partial.write_text(json.dumps([asdict(t) for t in known.values()], indent=1) + "\n")
