"""Trains a small ensemble on Fashion-MNIST on a CPU; writes docs/results/fashion_mnist.md.

python benchmarks/fashion_mnist.py --data-dir /folder/of/idx/files
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

import timm
import torch
import tyro

import hierens
from hierens.cli import results_table
from hierens.evaluation.plotting import plot_accuracy
from hierens.training.config import to_json
from hierens.training.presets import PRESETS
from hierens.training.run import Run, train

RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str
    """folder with the four idx files"""
    epochs: int = 6
    """passes over the 60,000 training images"""
    threads: int = 2
    """CPU threads"""
    seed: int = 0
    """random seed"""


def main(settings: Settings) -> None:
    """Train, then write the page and the figure."""
    torch.set_num_threads(settings.threads)
    run = configure(settings)
    model, record = train(run)
    RESULTS.mkdir(parents=True, exist_ok=True)
    title = "Fashion-MNIST, four networks of resnet8_cifar"
    plot_accuracy(
        {"hierarchical co-distillation": (model.macs(), record["accuracy"])}, RESULTS / "fashion_mnist.png", title
    )
    (RESULTS / "fashion_mnist.md").write_text(page(settings, run, results_table(model, record)))
    print(f"wrote {RESULTS / 'fashion_mnist.md'}")


def configure(settings: Settings) -> Run:
    """The preset for Fashion-MNIST with the given settings."""
    recipe = PRESETS["fashion-mnist"]
    directory = f"runs/fashion_mnist/{settings.epochs}-epochs-seed-{settings.seed}"
    training = dataclasses.replace(
        recipe.train, epochs=settings.epochs, seed=settings.seed, output_dir=directory, cpu=True
    )
    return dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, data_dir=settings.data_dir), train=training
    )


def speed(run: Run) -> str:
    """Images per second while training, from the run's log."""
    lines = (Path(run.train.output_dir) / "log.jsonl").read_text().splitlines()
    rates = sorted(record["images_per_s"] for record in map(json.loads, lines) if "images_per_s" in record)
    return f"Training ran at {rates[len(rates) // 2]} images per second (median)."


def page(settings: Settings, run: Run, report: str) -> str:
    """The results page."""
    shown = json.dumps({name: to_json(getattr(run, name)) for name in ("model", "train")}, indent=2)
    return f"""# Fashion-MNIST

Trained on all 60,000 training images, padded from 28x28 to 32x32 and randomly flipped. Accuracies are those on the
10,000 test images after the last epoch. A tree of three blocks and four networks of `resnet8_cifar`,
{settings.epochs} epochs of hierarchical co-distillation, one seed, on a CPU with {settings.threads} threads.
Latencies are for one image in eager mode.

![Accuracy against multiply-accumulates](fashion_mnist.png)

{report}

{speed(run)}
With one seed, small differences are not significant.

## How to repeat it

```bash
python benchmarks/fashion_mnist.py --data-dir DIR --epochs {settings.epochs} --seed {settings.seed}
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {os.cpu_count()} cores.

??? note "The configuration of the last run"

    ```json
    {shown.replace(chr(10), chr(10) + "    ").replace(settings.data_dir, "DIR")}
    ```
"""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
