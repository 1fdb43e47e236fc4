"""Trained models that travel: finished runs into models/, in the Hub's layout, with cards; writes docs/gallery.md.

hierens train --preset demo
python benchmarks/paper.py --data fashion_mnist --data-dir DIR --only tree-distilled
python benchmarks/gallery.py --digits runs/demo --fashion-mnist RUN --data-dir DIR
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

import torch
import tyro
from torch.utils.data import DataLoader, Subset

import hierens
from hierens.adaptive import Adaptive
from hierens.cards import COLUMNS, PICTURE
from hierens.policies import Confidence
from hierens.profiling import millions, table
from hierens.training.data import create_datasets
from hierens.training.presets import load_run

CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass(frozen=True)
class Settings:
    """Finished runs, and where their test images lie."""

    digits: str
    """output directory of a run on scikit-learn's digits"""
    fashion_mnist: str
    """output directory of a run on Fashion-MNIST"""
    data_dir: str
    """folder of Fashion-MNIST's idx files"""


@dataclass(frozen=True)
class Entry:
    """A model of the gallery."""

    name: str
    run: str
    dataset: str
    label_names: Sequence[str]
    title: str
    about: str


def main(settings: Settings) -> None:
    """Publish both runs and write the page."""
    digits = Entry(
        "digits-tree",
        settings.digits,
        "scikit-learn/digits",
        [*map(str, range(10))],
        "Digits",
        "Scikit-learn's scans of 8x8 pixels, enlarged to 16x16: 1,347 to learn from, 450 to test on.",
    )
    clothes = Entry(
        "fashion-mnist-tree",
        settings.fashion_mnist,
        "zalando-datasets/fashion_mnist",
        CLOTHES,
        "Fashion-MNIST",
        "Photographs of clothes of 28x28 pixels: 60,000 to learn from, 10,000 to test on.",
    )
    sections = [publish(entry, settings.data_dir) for entry in (digits, clothes)]
    (ROOT / "docs" / "gallery.md").write_text(page(sections))


def publish(entry: Entry, data_dir: str) -> str:
    """Save a run's model with its card, and a policy that half of the test images chose; its part of the page."""
    directory, run = ROOT / "models" / entry.name, Path(entry.run)
    model = hierens.from_pretrained(run / "model")
    record = json.loads((run / "results.json").read_text())
    results = {title: record[field] for field, title in COLUMNS.items()}
    _, images = create_datasets(dataclasses.replace(load_run(run / "run.json").data, data_dir=data_dir))
    ours, others = (DataLoader(Subset(images, range(first, len(images), 2)), 500) for first in (0, 1))
    policy = hierens.calibrate(model, ours, model.macs()[-1] / 3)
    model.save_pretrained(
        directory,
        results=results,
        policy=policy,
        name=f"models/{entry.name}",
        picture=True,
        license="apache-2.0",
        datasets=[entry.dataset],
        label_names=entry.label_names,
    )
    shutil.copy(directory / PICTURE, ROOT / "docs" / "results" / f"gallery-{entry.name}.png")
    return section(entry, model, results, *measured(policy, model, others))


def measured(policy: Confidence, model: Adaptive, batches: DataLoader) -> tuple[float, float, float]:
    """On images that did not choose a policy: its accuracy, that of all networks (percent), and its mean MACs."""
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
    """What the page says of a model."""
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

With the policy beside it, which half of the test images chose for a third of the full cost, the other half take
{millions(macs)} MACs in the mean ({100 * macs / model.macs()[-1]:.0f} %) for an accuracy of {accuracy:.2f} %;
all networks give {of_all:.2f} % on these.
"""


def page(sections: Sequence[str]) -> str:
    """The gallery."""
    return f"""# Trained models

Small enough to travel with the repository, each with its card and a policy, as [the Hub](how-to/hub.md) takes them.
Both are trained by the paper's objective; figures are of the test images after the last epoch.

```python
import hierens
from hierens.policies import load_policy

model = hierens.from_pretrained("models/digits-tree")
policy = load_policy("models/digits-tree")  # every image leaves once its answer is sure enough
model.pretrained_cfg["label_names"]
```

{chr(10).join(sections)}
```bash
hierens train --preset demo
python benchmarks/paper.py --data fashion_mnist --data-dir DIR --only tree-distilled
python benchmarks/gallery.py --digits runs/demo --data-dir DIR \\
    --fashion-mnist runs/comparison/fashion_mnist/tree-distilled/0
```
"""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
