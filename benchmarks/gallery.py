"""Publishes finished runs as the trained models in models/, in the Hub's format; writes docs/gallery.md.

hierens train --preset digits
python benchmarks/paper.py --data fashion_mnist --data-dir DIR --only tree-distilled
python benchmarks/gallery.py --digits runs/digits --fashion-mnist RUN --data-dir DIR

Sections of models that are not named stay unchanged. benchmarks/clothing.py publishes its tree with the same functions.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import hierens
from hierens.evaluation.profiling import millions, table
from hierens.hub.cards import COLUMNS, PICTURE
from hierens.hub.saving import CARD, WEIGHTS
from hierens.inference.policies import Confidence
from hierens.models.adaptive import Adaptive
from hierens.training.data.loaders import create_datasets
from hierens.training.presets import load_run

CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


ORDER = ("clothing-tree", "digits-tree", "fashion-mnist-tree")  # of the sections of the page, by model folder
SECTION = re.compile(r"^## .*?`models/(.+?)`\n.*?(?=^## |^```bash)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """Finished runs, and the location of their test images."""

    digits: str = ""
    """output directory of a run on scikit-learn's digits"""
    fashion_mnist: str = ""
    """output directory of a run on Fashion-MNIST"""
    data_dir: str = ""
    """folder of Fashion-MNIST's idx files"""


@dataclass(frozen=True)
class Entry:
    """A model of the gallery.

    Attributes:
        name: name of its folder.
        dataset: the training data, as named in the card's metadata.
        label_names: names of the classes, in order.
        title: heading on the page.
        about: text about the data and the initial weights, for the page and the card.
        budget: mean cost that the policy is calibrated for, as a fraction of the full cost.
        chosen_by: the calibration images, in words.
        judged_on: the images that the policy is evaluated on, in words.
        base_model: the repository of the initial weights, if any.
    """

    name: str
    dataset: str
    label_names: Sequence[str]
    title: str
    about: str
    budget: float = 1 / 3
    chosen_by: str = "half of the test images"
    judged_on: str = "the other half"
    base_model: str | None = None


DIGITS = Entry(
    "digits-tree",
    "scikit-learn/digits",
    [*map(str, range(10))],
    "Digits",
    "Scikit-learn's scans of 8x8 pixels, enlarged to 16x16: 1,347 for training, 450 for testing.",
)
FASHION_MNIST = Entry(
    "fashion-mnist-tree",
    "zalando-datasets/fashion_mnist",
    CLOTHES,
    "Fashion-MNIST",
    "Photographs of clothes of 28x28 pixels: 60,000 for training, 10,000 for testing.",
)


def main(settings: Settings) -> None:
    """Publish the given runs, and write the page."""
    given = ((DIGITS, settings.digits), (FASHION_MNIST, settings.fashion_mnist))
    write_page({entry.name: publish_run(entry, Path(run), settings.data_dir) for entry, run in given if run})


def publish_run(entry: Entry, run: Path, data_dir: str) -> str:
    """Publish a run with its last validation results and a policy calibrated on half of the test images."""
    record = json.loads((run / "results.json").read_text())
    results = {title: record[field] for field, title in COLUMNS.items()}
    _, images = create_datasets(dataclasses.replace(load_run(run / "run.json").data, data_dir=data_dir))
    ours, others = (DataLoader(Subset(images, range(first, len(images), 2)), 500) for first in (0, 1))
    return publish(entry, hierens.from_pretrained(run / "model"), results, ours, others)


def publish(
    entry: Entry,
    model: Adaptive,
    results: dict[str, list[float]],
    choosing: DataLoader,
    judging: DataLoader,
    half: bool = False,
) -> str:
    """Save a model with its card and a policy.

    Args:
        entry: description of the model.
        model: the trained model.
        results: columns of the card's table, a value per depth.
        choosing: calibration images and labels for the policy.
        judging: other images, on which the policy is evaluated.
        half: store the weights as float16 (see `rounded`).

    Returns:
        Its section of the page.
    """
    directory = ROOT / "models" / entry.name
    policy = hierens.calibrate(model, choosing, model.macs()[-1] * entry.budget)
    model.save_pretrained(
        directory,
        results=results,
        policy=policy,
        name=f"models/{entry.name}",
        picture=True,
        license="apache-2.0",
        datasets=[entry.dataset],
        label_names=entry.label_names,
        base_model=entry.base_model,
    )
    if half:
        weights = {name: _halved(tensor) for name, tensor in load_file(directory / WEIGHTS).items()}
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    card = directory / CARD
    card.write_text(f"{card.read_text()}\n## Data\n\n{entry.about}\n")
    shutil.copy(directory / PICTURE, ROOT / "docs" / "results" / f"gallery-{entry.name}.png")
    return section(entry, model, results, *measured(policy, model, judging))


def rounded(model: Adaptive) -> Adaptive:
    """Round the weights to half precision, but keep them in float32: what a file with float16 weights loads as.

    Raises:
        ValueError: a weight is too large for half precision.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            if not bool(_halved(tensor).isfinite().all()):
                raise ValueError(
                    f"{name} has values up to {float(tensor.abs().max()):.3g}: half precision ends at 65504."
                )
            tensor.copy_(_halved(tensor))
    return model


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def measured(policy: Confidence, model: Adaptive, batches: DataLoader) -> tuple[float, float, float]:
    """The accuracy of a policy and of all networks (percent), and the mean MACs of the policy."""
    right, all_right, macs = [], [], []
    for x, labels in batches:
        answer = policy(model, x)
        right.append(answer.logits.argmax(-1) == labels)
        macs.append(answer.macs.double())
        with torch.no_grad():
            all_right.append(model(x).argmax(-1) == labels)
    accuracy, of_all = (100 * torch.cat(found).double().mean().item() for found in (right, all_right))
    return accuracy, of_all, torch.cat(macs).mean().item()


def section(
    entry: Entry, model: Adaptive, results: dict[str, list[float]], accuracy: float, of_all: float, macs: float
) -> str:
    """The section of a model on the page."""
    rows = [
        (f"{depth}", f"{leaves}", millions(cost), millions(count), *(f"{v[depth]:.2f}" for v in results.values()))
        for depth, (leaves, cost, count) in enumerate(
            zip(model.sizes, model.macs(), model.parameter_counts(), strict=True)
        )
    ]
    size = (ROOT / "models" / entry.name / "model.safetensors").stat().st_size / 1e6
    return f"""## {entry.title}: `models/{entry.name}`

{entry.about}
{model.leaves} networks of `{model.arguments()["backbone"]}` in a tree, {size:.1f} MB.

{table(("depth", model.unit, "MACs", "parameters", *results), rows)}

![Accuracy against multiply-accumulates](results/gallery-{entry.name}.png)

The policy in the folder was calibrated on {entry.chosen_by} for a mean cost of {100 * entry.budget:.0f} % of the full
cost. On {entry.judged_on} it takes {millions(macs)} MACs on average ({100 * macs / model.macs()[-1]:.0f} %) and reaches
an accuracy of {accuracy:.2f} %. All networks together reach {of_all:.2f} % on these images.
"""


def write_page(sections: Mapping[str, str]) -> Path:
    """Write the page, with these sections (by model name) in place of the existing ones."""
    file = ROOT / "docs" / "gallery.md"
    file.write_text(page(read_sections(file.read_text()) | dict(sections)))
    return file


def read_sections(text: str) -> dict[str, str]:
    """The sections of the page, by model name."""
    return {match[1]: match[0].rstrip() + "\n" for match in SECTION.finditer(text)}


def page(sections: Mapping[str, str]) -> str:
    """The whole page."""
    shown = [name for name in ORDER if name in sections]
    return f"""# Trained models

The repository contains these small trained models, each with its model card and a policy, in the format of
[the Hub](how-to/hub.md). The clothes are trained with L_H + L_HD, the others with the paper's objective, L_I + L_HD.
Accuracies are those on the test images after the last epoch.

```python
import hierens
from hierens.inference.policies import load_policy

model = hierens.from_pretrained("models/{shown[0]}")
policy = load_policy("models/{shown[0]}")  # every image exits at the first confident prediction
model.pretrained_cfg["label_names"]
```

{chr(10).join(sections[name] for name in shown)}
```bash
# Train and publish the models:
python benchmarks/clothing.py train --data-dir DIR --only tree
python benchmarks/clothing.py publish --data-dir DIR
hierens train --preset digits
python benchmarks/paper.py --data fashion_mnist --data-dir DIR --only tree-distilled
python benchmarks/gallery.py --digits runs/digits --data-dir DIR \\
    --fashion-mnist runs/comparison/fashion_mnist/tree-distilled/0
```
"""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
