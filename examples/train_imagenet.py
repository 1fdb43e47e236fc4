"""Trains a hierarchical neural ensemble on ImageNet with the paper's recipe, or on any images that timm can read.

pip install -e ".[train]"                                                          what it needs
accelerate launch examples/train_imagenet.py --data-dir /path/to/imagenet          the paper's recipe
accelerate launch examples/train_imagenet.py --data-dir /path/to/images            a folder with train/ and validation/
accelerate launch examples/train_imagenet.py --dataset torch/cifar100 --data-dir DIR
accelerate launch examples/train_imagenet.py --dataset hfds/user/name | wds/name --data-dir DIR
python examples/train_imagenet.py --dataset fashion_mnist --data-dir DIR           its four idx files
accelerate launch examples/train_imagenet.py --preset finetune --data-dir DIR --backbone NAME | --weights FILE
python examples/train_imagenet.py                                                  photographs of clothes, on a CPU

The data determine the recipe, unless --preset or --config is given; --print-config prints it.
"""

from __future__ import annotations

import argparse
import sys

from hierens import cli
from hierens.training.config import Run
from hierens.training.presets import PRESETS

BUILT_IN = {"clothing": "demo", "digits": "digits", "fashion_mnist": "fashion-mnist"}


def recipe(dataset: str, data_dir: str) -> Run:
    """The recipe that fits the data."""
    if not dataset and not data_dir:
        return PRESETS["demo"]
    if dataset in BUILT_IN:
        return PRESETS[BUILT_IN[dataset]]
    return PRESETS["paper-cifar" if "cifar" in dataset else "paper-imagenet"]


def main() -> None:
    """Choose a recipe by the data, apply the flags, train, and print the cost and accuracy of every depth."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default="")
    peek.add_argument("--data-dir", default="")
    known, _ = peek.parse_known_args()
    cli.train(sys.argv[1:], recipe(known.dataset, known.data_dir), description=__doc__)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
