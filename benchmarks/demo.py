"""The demo on several seeds, with and without co-distillation; writes docs/results/demo.md and demo.png.

python benchmarks/demo.py
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

import timm
import torch
import tyro

import hierens
from hierens.plotting import plot_accuracy
from hierens.profiling import millions, table
from hierens.training.presets import PRESETS
from hierens.training.run import train

OBJECTIVES = {"with co-distillation": "independent+hierarchical_codistillation", "labels only": "independent"}
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Settings:
    """What the benchmark takes."""

    seeds: int = 5
    """runs per objective"""
    threads: int = 2
    """CPU threads"""


def main(settings: Settings) -> None:
    """Train, tabulate, draw."""
    torch.set_num_threads(settings.threads)
    accuracies: dict[str, list[list[float]]] = {name: [] for name in OBJECTIVES}
    for seed in range(settings.seeds):
        for name, objective in OBJECTIVES.items():
            directory = f"runs/demo-seeds/{objective}-{seed}"
            demo = PRESETS["demo"]
            training = dataclasses.replace(demo.train, seed=seed, objective=objective, output_dir=directory)
            model, record = train(dataclasses.replace(demo, train=training))
            accuracy = record["accuracy"]
            accuracies[name].append(accuracy)
            print(f"seed {seed}, {name}: {', '.join(f'{value:.2f}' for value in accuracy)} %")
    RESULTS.mkdir(parents=True, exist_ok=True)
    means = {name: [statistics.mean(at) for at in zip(*runs, strict=True)] for name, runs in accuracies.items()}
    curves = {name: (model.macs(), mean) for name, mean in means.items()}
    plot_accuracy(curves, RESULTS / "demo.png", f"scikit-learn's digits, mean of {settings.seeds} runs")
    (RESULTS / "demo.md").write_text(page(settings, model, accuracies))


def page(settings: Settings, model: hierens.HierarchicalEnsemble, accuracies: dict[str, list[list[float]]]) -> str:
    """The results page."""
    rows = []
    for row in model.profile().rows:
        cells = []
        for runs in accuracies.values():
            values = [run[row.depth] for run in runs]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        rows.append((f"{row.depth}", f"{row.leaves}", millions(row.macs), millions(row.parameters), *cells))
    header = ("depth", "networks", "MACs", "parameters", *(f"{name} (%)" for name in accuracies))
    gains = [a[0] - b[0] for a, b in zip(*accuracies.values(), strict=True)]
    better = sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains), sum(gain < 0 for gain in gains)
    channels = ", ".join(map(str, model._model_args["backbone_args"]["channels"]))
    return f"""# The demo: scikit-learn's digits

What `make demo` trains, on {settings.seeds} seeds: eight networks of `resnet8_cifar` with
{channels} channels on 1,347 images of 8x8 pixels, tested on the 450 held out.
Mean and standard deviation over seeds; one test image is 0.22 %.

{table(header, rows)}

![Accuracy against multiply-accumulates](demo.png)

At depth 0 co-distillation was better in {better[0]} of {settings.seeds} runs, equal in {better[1]}, worse in
{better[2]} (mean difference {statistics.mean(gains):+.2f} %). The digits are easy: every depth is within a few images
of every other, and no more than that should be read into the curves. [Fashion-MNIST](fashion_mnist.md) is harder.

```bash
python benchmarks/demo.py --seeds {settings.seeds} --threads {settings.threads}
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}.
"""


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
