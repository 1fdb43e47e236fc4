"""`hierens demo`: compares a tree that is trained on photographs with and without co-distillation, per depth."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from hierens.cli.command import Command
from hierens.cli.output import json_output, print_table
from hierens.cli.training import trained
from hierens.training.config import Run
from hierens.training.presets import preset

if TYPE_CHECKING:
    from torch import Tensor

    from hierens.models.adaptive import Adaptive

ARMS = {"with co-distillation": "independent+hierarchical_codistillation", "labels only": "independent"}
"""the objectives that the demo compares, by name"""


@dataclass(frozen=True)
class DemoSettings:
    """Photographs of clothes at 32x32 pixels, eight small networks."""

    output_dir: str = "runs/demo"
    """folder for models, results and the picture"""
    epochs: int = 20
    """passes over the 1,893 training images"""
    json: bool = False
    """print the results as one JSON object"""


def demo(arguments: Sequence[str]) -> None:
    """Train the preset `demo`, again with labels only, and compare the two."""
    settings = DEMO.parse(arguments)

    start = preset("demo")
    wanted = dataclasses.replace(start.train, output_dir=settings.output_dir, epochs=settings.epochs)
    run = dataclasses.replace(start, train=wanted)
    with json_output(settings.json) as write_json:
        first, second = ARMS
        print(first)
        record = trained(run, quiet=True)
        if record is not None:
            print(f"\n{second}")
            compared = compare_with_labels_only(run)
            if settings.json:
                write_json({**record, **compared})


def compare_with_labels_only(run: Run) -> dict[str, Any]:
    """Train a finished run again with labels only, and print the accuracies of both at every depth."""
    from hierens.evaluation.plotting import plot_accuracy
    from hierens.models.loading import from_pretrained
    from hierens.training.run import train as run_training

    directory = Path(run.train.output_dir) / "independent"
    train = dataclasses.replace(run.train, objective="independent", output_dir=str(directory))
    labels_only, record = run_training(dataclasses.replace(run, train=train))
    saved = Path(run.train.output_dir) / "model"
    model = from_pretrained(saved)
    ours, theirs = (_right_answers(one, run) for one in (model, labels_only))

    title = f"photographs of clothes, {len(ours):,} test images"
    print(f"\n{title}: accuracy (%)\n")
    print_table(*_compared(model, ours, theirs))
    curves = {
        name: (model.macs(), (100 * right.double().mean(0)).tolist())
        for name, right in zip(ARMS, (ours, theirs), strict=True)
    }
    picture = plot_accuracy(curves, Path(run.train.output_dir) / "accuracy.png", title)
    program = "hierens" if which("hierens") else f"{sys.executable} -m hierens"
    print(f"\ndifference: percentage points ± standard error (images); one run of each, seed {run.train.seed}")
    print(f"picture: {picture}\nnext: {program} predict {saved} IMAGE")
    return {
        "accuracy_without_distillation": record["accuracy"],
        "test_images": len(ours),
        "picture": str(picture),
    }


def _right_answers(model: Adaptive, run: Run) -> Tensor:
    """Which test images each depth classifies correctly, (images, depths)."""
    from torch.utils.data import DataLoader

    from hierens.evaluation.metrics import correct_predictions
    from hierens.training.data.loaders import create_held_out

    return correct_predictions(model, DataLoader(create_held_out(run.data), run.train.val_batch_size))


def _compared(model: Adaptive, ours: Tensor, theirs: Tensor) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: the cost of every depth, and its accuracy in both runs."""
    from hierens.evaluation.metrics import PairedDifference
    from hierens.evaluation.profiling import millions

    rows = []
    for depth, (networks, macs) in enumerate(zip(model.sizes, model.macs(), strict=True)):
        accuracy = [f"{100 * right[:, depth].double().mean():.2f}" for right in (ours, theirs)]
        difference = PairedDifference.of(ours[:, depth], theirs[:, depth])
        rows.append((f"{depth}", f"{networks}", millions(macs), *accuracy, f"{difference}"))
    return ("depth", "networks", "MACs", *ARMS, "difference"), rows


DEMO = Command(
    "demo",
    "train eight small networks on photographs of clothes, on the CPU, in a minute or two",
    DemoSettings,
    demo,
    examples=("hierens predict runs/demo/model IMAGE.png", "hierens profile runs/demo/model"),
)
