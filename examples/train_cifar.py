"""Trains the paper's CIFAR ensemble with its recipe: 16 networks, SGD, 200 epochs (Ruiz & Verbeek, section 4.1).

pip install -e ".[train]"                                             what it needs
accelerate launch examples/train_cifar.py --data-dir DIR              CIFAR-100, in torchvision's format
accelerate launch examples/train_cifar.py --data-dir DIR --dataset torch/cifar10
accelerate launch examples/train_cifar.py --data-dir DIR --small      half the channels: the paper's HNE_small
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from hierens import cli
from hierens.training.presets import preset
from hierens.training.run import Run

# Mean and standard deviation of the training images, scaled to [0, 1].
STATISTICS = {
    "torch/cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "torch/cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def recipe(dataset: str, small: bool) -> Run:
    """The preset `paper-cifar` for a data set and a width.

    Raises:
        ValueError: the data set is unknown.
    """
    if dataset not in STATISTICS:
        raise ValueError(f"dataset must be one of {', '.join(STATISTICS)}, got {dataset!r}.")
    run, (mean, std) = preset("paper-cifar"), STATISTICS[dataset]
    return replace(
        run,
        data=replace(run.data, dataset=dataset, mean=mean, std=std),
        model=replace(run.model, backbone=run.model.backbone + ("_small" if small else "")),
        train=replace(run.train, output_dir=f"runs/{dataset.split('/')[1]}"),
    )


def main() -> None:
    """Train, and print the cost and accuracy of every depth."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default="torch/cifar100")
    peek.add_argument("--small", action="store_true")
    known, flags = peek.parse_known_args()
    cli.train(flags, recipe(known.dataset, known.small), description=__doc__)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
