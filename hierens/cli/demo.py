"""`hierens demo`: compares a tree that is trained on photographs with and without co-distillation, per depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
        record = trained(run, quiet=settings.json)
        if record is not None:
            compared = compare_with_labels_only(run)
            if settings.json:
                write_json({**record, **compared})


def compare_with_labels_only(run: Run) -> dict[str, Any]:
    """Train a finished run again with labels only, and print the accuracies of both at every depth."""
    from hierens.evaluation.plotting import plot_accuracy
    from hierens.models.loading import from_pretrained
    from hierens.training.run import train as run_training

    print("\nthe same again, with labels only")
    directory = Path(run.train.output_dir) / "independent"
    train = dataclasses.replace(run.train, objective="independent", output_dir=str(directory))
    labels_only, record = run_training(dataclasses.replace(run, train=train))
    model = from_pretrained(Path(run.train.output_dir) / "model")
    ours, theirs = (_right_answers(one, run) for one in (model, labels_only))

    print("\naccuracy (%)\n")
    print_table(*_compared(model, ours, theirs))
    print("\ngain over depth 0, of the same network\n")
    print_table(*_gained(ours, theirs))
    print(
        f"\nDifferences and gains: in percent of the {len(ours):,} test images ± standard error, paired image by image,"
        f"\nand in images. This is one run of each, of seed {run.train.seed}; docs/results/demo.md has five.\n"
    )
    curves = {
        name: (model.macs(), (100 * right.double().mean(0)).tolist())
        for name, right in zip(ARMS, (ours, theirs), strict=True)
    }
    title = f"photographs of clothes, {len(ours):,} test images"
    picture = plot_accuracy(curves, Path(run.train.output_dir) / "accuracy.png", title)
    print(f"picture: {picture}")
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


def _gained(ours: Tensor, theirs: Tensor) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: the gain of more networks over the first one, in both runs."""
    from hierens.evaluation.metrics import PairedDifference

    rows = [
        (f"{depth}", *(f"{PairedDifference.of(right[:, depth], right[:, 0])}" for right in (ours, theirs)))
        for depth in range(1, ours.shape[1])
    ]
    return ("depth", *ARMS), rows


DEMO = Command(
    "demo",
    "train eight small networks on photographs of clothes, on the CPU, in a minute or two",
    DemoSettings,
    demo,
    examples=("hierens predict runs/demo/model IMAGE.png", "hierens profile runs/demo/model"),
)
