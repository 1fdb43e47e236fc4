"""Trains trees and a single U-Net of examples/train_segmentation.py; writes docs/results/segmentation.md.

python benchmarks/segmentation.py                          finished runs (docs/results/runs/segmentation) are kept
python benchmarks/segmentation.py --arms tree --seeds 0    only these, then the page if all arms have runs
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import numpy as np
import torch
import train_segmentation as example
import tyro
from comparison.differences import difference, over_last, verdict
from comparison.pages import machines
from comparison.records import machine, record_file, write_json
from matplotlib.figure import Figure

import hierens
from hierens.evaluation.metrics import as_record, ood_auroc
from hierens.evaluation.plotting import plot_cost
from hierens.evaluation.profiling import millions, table
from hierens.evaluation.reporting import Group
from hierens.evaluation.uncertainty import certainty, mutual_information
from hierens.objectives import Objective

RESULTS = ROOT / "docs" / "results"
STUDY = "segmentation"
BLOCKS, EPOCHS, IMAGES, TEST_IMAGES, SHOWN = 3, 4, 2000, 500, 6


@dataclass(frozen=True)
class Arm:
    """Networks that are trained in one way."""

    title: str
    blocks: int
    objective: str


ARMS = {
    "tree": Arm("tree, L_I + L_HD", BLOCKS, Objective.name),
    "labels": Arm("tree, labels only (L_I)", BLOCKS, "independent"),
    "single": Arm("single network", 1, "independent"),
}


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    arms: tuple[str, ...] = tuple(ARMS)
    """what to train: tree, labels, single"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the weights and the order of the images"""
    threads: int = 1
    """CPU threads"""


def main(settings: Settings) -> None:
    """Train what is missing, then write the page and its pictures."""
    torch.set_num_threads(settings.threads)
    for seed in settings.seeds:
        for arm in settings.arms:
            if not record_file(STUDY, arm, seed).is_file():
                print(f"{arm}, seed {seed}", flush=True)
                write_json(record_file(STUDY, arm, seed), trained(arm, seed, EPOCHS, IMAGES, TEST_IMAGES))
    groups = read_records()
    if ARMS.keys() == groups.keys():
        (RESULTS / "segmentation.md").write_text(page(groups, RESULTS))
        print(f"wrote {RESULTS / 'segmentation.md'}")


def trained(arm: str, seed: int, epochs: int, images: int, test_images: int) -> dict[str, Any]:
    """Train a network, and its record; the networks of `ARMS` differ in nothing else."""
    model = example.create_tree(ARMS[arm].blocks, seed)
    data = example.digits_over_photographs(True, images)
    seconds = example.train(model, Objective(ARMS[arm].objective), data, epochs, seed)
    test = example.digits_over_photographs(False, test_images)
    maps = evaluated_maps(model, test)
    return {
        "title": ARMS[arm].title,
        "seed": seed,
        "test_images": test_images,
        "training_images": images,
        "epochs": epochs,
        "seconds": seconds,
        "leaves": list(model.sizes),
        "macs": list(model.macs()),
        "parameters": list(model.parameter_counts()),
        "cuts": model.arguments()["at"],
        **as_record(example.evaluate(model, test)),
        "error_auroc": error_aurocs(maps, test[1]),
        "machine": machine(),
    } | ({"maps": {name: _packed(maps[name][:SHOWN]) for name in ("digit", "disagreement")}} if seed == 0 else {})


def _packed(maps: torch.Tensor) -> str:
    """Maps of values from 0 to 1, as hexadecimal digits of a byte per pixel."""
    return (255 * maps).round().byte().numpy().tobytes().hex()


def _unpacked(text: str) -> Any:
    """The maps (N, H, W)."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, example.SIDE, example.SIDE) / 255


@torch.no_grad()
def evaluated_maps(model: hierens.HierarchicalEnsemble, test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Maps of the full ensemble (N, H, W): the probability of a digit, its uncertainty, and the disagreement."""
    model.eval()
    leaf_logits = torch.cat([model(images, reduce=False) for images in test[0].split(100)])
    logits = leaf_logits.mean(1)
    return {
        "digit": logits.softmax(1)[:, 1],
        "uncertainty": 1 - certainty(logits, leaf_logits.argmax(2), "probability"),
        "disagreement": mutual_information(leaf_logits),
    }


def error_aurocs(maps: Mapping[str, torch.Tensor], labels: torch.Tensor) -> dict[str, float]:
    """How well two maps find wrong pixels: the probability that of a wrong and a correct one, the wrong is higher."""
    wrong = (maps["digit"] > 0.5).long() != labels
    return {name: ood_auroc(maps[name][~wrong], maps[name][wrong]) for name in ("uncertainty", "disagreement")}


def read_records() -> dict[str, Group]:
    """The finished runs of every arm, sorted by seed."""
    groups = {}
    for name, arm in ARMS.items():
        files = sorted(record_file(STUDY, name, 0).parent.glob("*.json"))
        if records := [json.loads(file.read_text()) for file in files]:
            groups[name] = Group(arm.title, records[0]["macs"], records)
    return groups


def draw_maps(record: Mapping[str, Any], path: Path) -> None:
    """Photographs, masks, predictions, errors and disagreement of the first test images, a row each."""
    images, masks = example.digits_over_photographs(False, record["test_images"])
    mean, std = (np.array(values) for values in (example.MEAN, example.STD))
    digit, disagreement = (_unpacked(record["maps"][name]) for name in ("digit", "disagreement"))
    columns = ("image", "mask", "probability of a digit", "errors", "disagreement of four networks (nats)")
    figure = Figure(figsize=(11, 2.15 * len(digit)), dpi=110, layout="constrained")
    panels = figure.subplots(len(digit), len(columns))
    for row, axes in enumerate(panels):
        shown = (
            (np.clip(images[row].permute(1, 2, 0).numpy() * std + mean, 0, 1), {}),
            (masks[row].numpy(), {"cmap": "gray", "vmin": 0, "vmax": 1}),
            (digit[row], {"cmap": "gray", "vmin": 0, "vmax": 1}),
            ((digit[row] > 0.5) != masks[row].numpy(), {"cmap": "Reds", "vmin": 0, "vmax": 1}),
            (disagreement[row], {"cmap": "magma", "vmin": 0, "vmax": float(disagreement.max())}),
        )
        for panel, (values, look) in zip(axes, shown, strict=True):
            picture = panel.imshow(values, **look)
            panel.set(xticks=[], yticks=[])
        figure.colorbar(picture, ax=axes[-1])
    for panel, title in zip(panels[0], columns, strict=True):
        panel.set_title(title, fontsize=9)
    figure.savefig(path)


def page(groups: Mapping[str, Group], folder: Path) -> str:
    """The results page; its pictures are written to a folder."""
    tree, labels, single = (groups[name] for name in ARMS)
    record, seeds = tree.records[0], len(tree.records)
    plot_cost(list(groups.values()), folder / "segmentation.png", "miou", "mIoU (%)")
    draw_maps(record, folder / "segmentation_maps.png")
    quality = [
        (group.name, f"{depth}", f"{leaves}", millions(macs), f"{miou:.2f} ± {spread:.2f}", f"{ece:.4f}", f"{info:.4f}")
        for group in groups.values()
        for depth, (leaves, macs, miou, spread, ece, info) in enumerate(
            zip(
                *(group.leaves, group.macs, group.mean("miou"), group.spread("miou"), group.mean("ece")),
                group.mean("mutual_information"),
                strict=True,
            )
        )
    ]
    between = {
        "tree, L_I + L_HD, minus tree, labels only": difference(tree, labels, "miou"),
        "tree, L_I + L_HD, minus single network": over_last(tree, single, "miou"),
        "tree, labels only, minus single network": over_last(labels, single, "miou"),
    }
    depths = [f"depth {depth}" for depth in range(len(tree.macs))]
    differences = [(name, *map(str, found), verdict(found)) for name, found in between.items()]
    found = [
        (g.name, *(f"{statistics.mean(r['error_auroc'][name] for r in g.records):.4f}" for name in _AUROCS))
        for g in (tree, labels)
    ]
    seconds = ", ".join(
        f"{g.name}: {statistics.median(r['seconds'] for r in g.records):.0f} s" for g in groups.values()
    )
    return f"""# Segmentation: digits over photographs

A whole segmentation network becomes a tree: a small U-Net of {millions(single.macs[0])} MACs, cut into {BLOCKS} blocks
before {" and ".join(f"`{cut}`" for cut in record["cuts"])}. Skip connections cross the cuts. The later blocks, which
contain the decoder, exist once per branch, so every network of the ensemble has a decoder of its own.

**The images are made, from real parts.** Two of scikit-learn's scanned digits (8x8 pixels, enlarged to
{example.SIZES.start} to {example.SIZES.stop - 1}) lie over one of the photographs of clothes in hierens (32x32 pixels).
A digit shows the texture of another photograph, which covers {100 * example.STRENGTH[0]:.0f} to
{100 * example.STRENGTH[1]:.0f} % of the photograph below, and Gaussian noise of {example.NOISE} of a pixel's range is
added. Every pixel has one of two classes, digit or photograph. {record["training_images"]:,} images are for training,
for {record["epochs"]} epochs; the {record["test_images"]:,} test images show other digits and other photographs. This
is a small problem with which depths can be compared, not a benchmark of segmentation.

Mean intersection over union (mIoU), and calibration error (ECE) and disagreement (mutual information of class and
network, in nats) of pixels: means over {seeds} seeds, mIoU with its standard deviation.

{table(("network", "depth", "networks", "MACs", "mIoU (%)", "pixel ECE", "disagreement"), quality)}

![mIoU against multiply-accumulates](segmentation.png)

Differences in mIoU, in points, paired by seed, with their standard errors over {seeds} seeds, on the same
{record["test_images"]:,} test images. "Holds" means more than twice the standard error at every depth:

{table(("difference", *depths, "holds"), differences)}

Seeds change the weights and the order of the images, but not the test images, so the standard errors do not cover other
images.

## Disagreement as a map of errors

The first {SHOWN} test images, with the tree trained by L_I + L_HD, seed {record["seed"]}, at full depth. Disagreement
is `hierens.evaluation.uncertainty.mutual_information(model(images, reduce=False))`, a map (N, H, W).

![Disagreement maps beside errors](segmentation_maps.png)

The probability that a wrong pixel has a higher value than a correct one (AUROC, means over seeds), for the disagreement
and for 1 minus the probability of the predicted class:

{table(("network, at full depth", "1 - probability", "disagreement"), found)}

## How to repeat it

```bash
python benchmarks/segmentation.py      # an arm and seed at a time; finished ones are kept
python examples/train_segmentation.py  # one tree
```

Median training time: {seconds}, with other work on the machine. {machines(groups)}
"""


_AUROCS = ("uncertainty", "disagreement")

if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
