"""Trains the runs that have no record yet; interrupted runs are resumed."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gpu_steps.batches import DeviceImages, loader
from gpu_steps.packing import Split, read_joined
from torch.utils.data import TensorDataset

from comparison.recipes import configured, queue, study
from comparison.records import DEEP_ENSEMBLE, record_file, test_images, write_deep_ensemble, write_record
from comparison.views import TwoViews, TwoViewTrainer
from hierens.training.config import Run
from hierens.training.run import train
from hierens.training.trainer import Trainer


def train_missing(
    data: str,
    data_dir: str,
    runs: Path,
    only: Collection[str] = (),
    share: str = "0/1",
    seeds: Collection[int] = (),
    weights: str = "",
) -> None:
    """Train every row and seed that has no record.

    Args:
        data: name of the recipe.
        data_dir: folder of the images.
        runs: folder for checkpoints and logs.
        only: rows to train; all by default.
        share: `i/n` trains every n-th run, beginning with the i-th, so that n processes share the work.
        seeds: seeds to train; all by default.
        weights: file of pretrained weights: see `comparison.recipes.configured`.
    """
    turn, of = map(int, share.split("/"))
    single = study(data).single
    for row, seed in list(queue(data, only, seeds))[turn::of]:
        if study(data).rows[row].two_views:
            print(f"{row} reads images from memory: train it with --processes.", flush=True)
        elif not record_file(data, row, seed).is_file():
            for each in _with_start(data, row, seed, runs):
                folder = runs / data / each / f"{seed}"
                print(f"{each}, seed {seed}: {folder}", flush=True)
                run = configured(data, each, seed, data_dir, str(folder), weights)
                model, _ = train(run)
            print(f"wrote {write_record(run, model, data, row, test_images(run, data))}", flush=True)
        if row == single:
            _join_singles(data, runs, partial(test_images, configured(data, row, seed, data_dir, ""), data))


def train_in_memory(
    data: str, joined: Path, runs: Path, processes: int, executor: str, only: Collection[str] = ()
) -> None:
    """Train several runs at a time with the images in memory, on the GPU if available.

    A single process cannot launch kernels fast enough to use a GPU fully for such small networks, so several share it.

    Args:
        data: name of the recipe.
        joined: folder written by `benchmarks/gpu.py join`.
        runs: folder for checkpoints and logs.
        processes: number of processes that train at the same time.
        executor: executor of trees.
        only: rows to train; all by default.
    """
    missing = [(row, seed) for row, seed in queue(data, only) if not record_file(data, row, seed).is_file()]
    one = partial(_train_one, data, joined, runs, executor)
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used in forked processes
    with context.Pool(min(processes, max(len(missing), 1)), _start) as pool:
        for said in pool.imap_unordered(one, missing, chunksize=1):
            print(said, flush=True)
    run = configured(data, study(data).single, 0, "", "")
    _join_singles(data, runs, lambda: _in_memory(run, _images(joined)["test"]))


def _start() -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32, as on a CPU


def _train_one(data: str, joined: Path, runs: Path, executor: str, what: tuple[str, int]) -> str:
    """Train one run in a worker process and return a message."""
    row, seed = what
    try:
        images = _images(joined)
        for each in _with_start(data, row, seed, runs):
            run, model = _fit(data, images, runs, executor, each, seed)
        return f"wrote {write_record(run, model, data, row, _in_memory(run, images['test']))}"
    except Exception as error:  # the other runs continue
        return f"{row}, seed {seed} failed: {type(error).__name__}: {error}"


def _with_start(data: str, row: str, seed: int, runs: Path) -> tuple[str, ...]:
    """The row, after the row that it starts from if that has no trained model."""
    start = study(data).rows[row].start
    return (start, row) if start and not (runs / data / start / f"{seed}" / "model").is_dir() else (row,)


def _fit(data: str, images: Mapping[str, Split], runs: Path, executor: str, row: str, seed: int) -> tuple[Run, Any]:
    """Train one run with the images in memory."""
    run = configured(data, row, seed, "", str(runs / data / row / f"{seed}"))
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, cpu=not torch.cuda.is_available()))
    two = study(data).rows[row].two_views
    model, _ = train(run, _loaders(run, images, two), partial(_make_trainer, executor, two))
    return run, model


def _make_trainer(executor: str, two_views: bool, model: Any, *rest: Any) -> Trainer:
    """The trainer of a run, with the executor set if the model is a tree."""
    if hasattr(model, "set_executor"):
        model.set_executor(executor)
    return (TwoViewTrainer if two_views else Trainer)(model, *rest)


@cache
def _images(joined: Path) -> dict[str, Split]:
    """The images, read once per process."""
    return read_joined(joined)


def _loaders(run: Run, images: Mapping[str, Split], two_views: bool) -> tuple[Any, Any]:
    config, device = run.train, torch.device("cpu" if run.train.cpu else "cuda")
    training = (TwoViews if two_views else DeviceImages)(images["train"], run.data, device, config.seed, training=True)
    validation = DeviceImages(images["test"], run.data, device)
    return loader(training, config.batch_size, True), loader(validation, config.val_batch_size, False)


def _in_memory(run: Run, split: Split) -> TensorDataset:
    """Normalised images and labels."""
    images = DeviceImages(split, run.data, torch.device("cpu"))
    return TensorDataset(*images.__getitems__(range(len(images))))


def _join_singles(data: str, runs: Path, read_images: Callable[[], Any]) -> None:
    """Write the record of the deep ensemble if it does not exist and all of its networks are trained."""
    if record_file(data, DEEP_ENSEMBLE, 0).is_file():
        return
    if file := write_deep_ensemble(data, runs / data / study(data).single, read_images()):
        print(f"wrote {file}", flush=True)
