"""GPU benchmark in named steps of at most eight minutes each; writes docs/results/runs/gpu/*.json.

python benchmarks/gpu.py speed                                # time of every depth with every way to run it
python benchmarks/gpu.py switching                            # cost of switching between depths
python benchmarks/gpu.py per-image                            # images that leave at different depths
python benchmarks/gpu.py light                                # trees whose members share weights
python benchmarks/gpu.py train-distilled-1 --data-dir DIR     # the paper's CIFAR network; then train-distilled-2, ...
python benchmarks/gpu.py train-labels-1 --data-dir DIR        # the same with labels only
python benchmarks/gpu.py train-msdnet-1 --data-dir DIR        # MSDNet with 7 blocks, by IMTA's recipe
python benchmarks/gpu.py report                               # writes docs/results/gpu.md from the existing results
python benchmarks/gpu.py pack --data-dir DIR                  # packs the images into small files
python benchmarks/gpu.py join                                 # decodes the packed files that exist
python benchmarks/gpu.py plan                                 # sets the epochs; by default train-distilled-1 does this

A step that runs out of time prints what is left. Run it again to continue.
"""

from __future__ import annotations

import time

START = time.monotonic()  # before torch is imported, so that a step's time includes the import

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro
from gpu_steps import page as pages
from gpu_steps import training
from gpu_steps.light import light
from gpu_steps.packing import Split, join, pack, read_folders, read_joined
from gpu_steps.per_image import per_image
from gpu_steps.records import Context, Deadline
from gpu_steps.speed_table import speed
from gpu_steps.switching import switching

ROOT = Path(__file__).parents[1]
TRAINING_STEP = re.compile(rf"train-({'|'.join(training.TRAININGS)})-([1-9]\d*)")
WITHOUT_GPU = ("pack", "join", "report")


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    step: tyro.conf.Positional[str]
    """speed, switching, per-image, light, plan, train-distilled-1, train-labels-1, ..., pack, join or report"""
    data_dir: str = ""
    """CIFAR-100 as train/CLASS/ and test/CLASS/; by default the images decoded by `join`"""
    packed: Path | None = None
    """folder of the files that `pack` writes and `join` reads; RUNS/packed by default"""
    results: Path | None = None
    """folder of the JSON files; docs/results/runs/gpu by default"""
    runs: Path | None = None
    """folder of checkpoints and images; runs/gpu by default"""
    page: Path | None = None
    """output of `report`; docs/results/gpu.md by default"""
    minutes: float = 8.0
    """maximum duration of a step"""
    tiny: bool = False
    """tests every step with a few tiny networks, also without a GPU; writes to runs/gpu-tiny"""
    precisions: tuple[str, ...] = ("bf16", "fp32")
    """precisions for `speed`: bf16, fp32 or tf32"""
    batch_sizes: tuple[int, ...] = field(default=())
    """images per call; by default 1 32 256 for `speed` and `light`, 1 32 for `switching`, 256 for `per-image`"""
    seconds: float = 0.4
    """duration of the rounds of one cell; at least three rounds are run"""
    train_steps: int = 3
    """number of steps of each training; determines the number of epochs when training starts"""
    epochs: int | None = None
    """number of epochs; by default as many as fit into the steps' time"""
    train_precision: str = "bf16"
    """mixed precision of training, as in Accelerate: bf16, fp16 or no"""
    updates: int | None = None
    """stop a training step after this number of updates instead of its time"""
    part_megabytes: float = 30.0
    """maximum size of a packed file"""


def main(settings: Settings) -> str:
    """Run a step.

    Returns:
        A description of the remaining work; empty if there is none.

    Raises:
        ValueError: the step is unknown, it needs a GPU and there is none, or data are missing.
    """
    steps = _steps(settings)
    if settings.step not in steps and not TRAINING_STEP.fullmatch(settings.step):
        raise ValueError(
            f"there is no step {settings.step!r}: choose {', '.join(steps)}, train-distilled-1, train-labels-1, ..."
        )
    if settings.step not in WITHOUT_GPU and not settings.tiny and not torch.cuda.is_available():
        raise ValueError(f"{settings.step} needs a GPU, and there is none; --tiny tests a step without one.")
    warnings.filterwarnings("ignore")
    left = (steps.get(settings.step) or _training(settings))()
    print(f"left: {left}" if left else "nothing is left", flush=True)
    return left


def context_of(settings: Settings) -> Context:
    """The folders and the deadline of a step; tiny steps do not write to the results."""
    runs = settings.runs or ROOT / "runs" / ("gpu-tiny" if settings.tiny else "gpu")
    usual = runs / "results" if settings.tiny else ROOT / "docs" / "results" / "runs" / "gpu"
    return Context(settings.results or usual, runs, settings.tiny, Deadline(60 * settings.minutes, START))


def _steps(settings: Settings) -> dict[str, Callable[[], str]]:
    context = context_of(settings)
    small = (1, 2) if settings.tiny else (1, 32)
    usual = small if settings.tiny else (*small, 256)
    packed = settings.packed or context.runs / "packed"
    page = settings.page or (context.runs / "gpu.md" if settings.tiny else ROOT / "docs" / "results" / "gpu.md")
    return {
        "speed": lambda: _cells(
            speed(context, settings.precisions, settings.batch_sizes or usual, settings.seconds), settings
        ),
        "switching": lambda: _cells(switching(context, settings.batch_sizes or small, settings.seconds), settings),
        "per-image": lambda: _cells(
            per_image(context, settings.batch_sizes or ((8,) if settings.tiny else (256,)), settings.seconds), settings
        ),
        "light": lambda: _cells(light(context, settings.batch_sizes or usual, settings.seconds), settings),
        "plan": lambda: str(training.make_plan(context, _images(settings, context), _shape(settings)) and ""),
        "pack": lambda: _pack(settings, packed),
        "join": lambda: ", ".join(join(packed, context.runs / "images")),
        "report": lambda: _said(f"wrote {pages.write(context.results, page)}"),
    }


def _training(settings: Settings) -> Callable[[], str]:
    name, number = TRAINING_STEP.fullmatch(settings.step).groups()  # type: ignore[union-attr]
    context = context_of(settings)
    read = partial(_images, settings, context)
    return lambda: training.train(context, name, int(number), read, _shape(settings))


def _images(settings: Settings, context: Context) -> dict[str, Split]:
    return read_folders(settings.data_dir) if settings.data_dir else read_joined(context.runs / "images")


def _shape(settings: Settings) -> training.Shape:
    return training.Shape(settings.train_steps, settings.epochs, settings.train_precision, settings.updates)


def _pack(settings: Settings, packed: Path) -> str:
    files = pack(read_folders(settings.data_dir), packed, settings.part_megabytes)
    return _said("\n".join(f"{file.stat().st_size / 1e6:6.2f} MB  {file}" for file in files))


def _cells(count: int, settings: Settings) -> str:
    return f"{count} cells: {settings.step} again" if count else ""


def _said(text: str) -> str:
    print(text)
    return ""


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
