"""Train the networks that the results pages compare, and write a record of each under docs/results/runs.

python benchmarks/compare.py --data cifar100 --data-dir DIR                    everything that has no record yet
python benchmarks/compare.py --data-dir DIR --only tree-labels tree-distilled  some rows

A run that was stopped goes on where it was. `benchmarks/paper.py` and `benchmarks/exits.py` write the pages from the
records alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from comparison.train import train_missing


@dataclass(frozen=True)
class Settings:
    """What the benchmark takes."""

    data: Literal["cifar100", "cifar10", "fashion_mnist"] = "cifar100"
    """the recipe; benchmarks/comparison/recipes.py holds them"""
    data_dir: str = ""
    """folder with `train` and `test`, a folder per class in each; for Fashion-MNIST the idx files"""
    runs: Path = Path("runs/comparison")
    """folder for checkpoints and logs"""
    only: tuple[str, ...] = ()
    """rows; all by default"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th, so that n processes share the work"""
    threads: int = 1
    """CPU threads"""


def main(settings: Settings) -> None:
    """Train what is missing."""
    torch.set_num_threads(settings.threads)
    train_missing(settings.data, settings.data_dir, settings.runs, settings.only, settings.share)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
