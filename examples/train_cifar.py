"""Train the paper's CIFAR ensemble by its recipe: 16 networks, SGD, 200 epochs (Ruiz & Verbeek, section 4.1).

accelerate launch examples/train_cifar.py --data-dir DIR              CIFAR-100, of torchvision's layout
accelerate launch examples/train_cifar.py --data-dir DIR --dataset torch/cifar10
accelerate launch examples/train_cifar.py --data-dir DIR --small      half the channels: the paper's HNE_small
"""

from __future__ import annotations

import argparse
import sys

import tyro
from train_imagenet import Run, is_main, report, train

from hierens.training.config import DataConfig, ModelConfig, TrainConfig

# Of the training images, in [0, 1].
STATISTICS = {
    "torch/cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "torch/cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def recipe(dataset: str, small: bool) -> Run:
    """Section 4.1: SGD at 0.1 by a cosine, batches of 128, crop and flip, alpha 0.5, T 2.

    Raises:
        ValueError: another data set.
    """
    if dataset not in STATISTICS:
        raise ValueError(f"dataset must be one of {', '.join(STATISTICS)}, got {dataset!r}.")
    mean, std = STATISTICS[dataset]
    data = DataConfig(
        dataset, val_split="test", input_size=(3, 32, 32), mean=mean, std=std, augment="crop_flip", pad=4, crop_pct=1.0
    )
    name = "hne_resnet50_cifar_small" if small else "hne_resnet50_cifar"
    return Run(data, ModelConfig(backbone=name), TrainConfig(output_dir=f"runs/{dataset.split('/')[1]}"))


def main() -> None:
    """Train, and say what every depth costs and gives."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default="torch/cifar100")
    peek.add_argument("--small", action="store_true")
    known, flags = peek.parse_known_args()
    default = recipe(known.dataset, known.small)
    run = tyro.cli(tyro.conf.OmitArgPrefixes[Run], args=flags, default=default, description=__doc__)
    model, accuracy = train(run)
    if is_main():
        print(f"\n{report(model, accuracy)}\n\nmodel: {run.train.output_dir}/model")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
