"""Train what has no record yet, one run after the other; a run that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from comparison.recipes import configured, queue, study
from comparison.records import DEEP_ENSEMBLE, record_file, test_images, write_deep_ensemble, write_record
from hierens.training.run import train


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
        data_dir: where the images lie.
        runs: where runs keep checkpoints and logs.
        only: rows; all by default.
        share: `i/n` trains every n-th run, from the i-th on, so that n processes share the work.
        seeds: some seeds only; all by default.
        weights: a file of pretrained weights: see `comparison.recipes.configured`.
    """
    turn, of = map(int, share.split("/"))
    single = study(data).single
    for row, seed in list(queue(data, only, seeds))[turn::of]:
        if not record_file(data, row, seed).is_file():
            folder = runs / data / row / f"{seed}"
            print(f"{row}, seed {seed}: {folder}", flush=True)
            run = configured(data, row, seed, data_dir, str(folder), weights)
            model, _ = train(run)
            print(f"wrote {write_record(run, model, data, row)}", flush=True)
        if row == single and not record_file(data, DEEP_ENSEMBLE, 0).is_file():
            images = test_images(configured(data, row, seed, data_dir, ""), data)
            if file := write_deep_ensemble(data, runs / data / single, images):
                print(f"wrote {file}", flush=True)
