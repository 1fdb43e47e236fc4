"""Train a hierarchical neural ensemble: on ImageNet by the paper's recipe, or on any images that timm can read.

accelerate launch examples/train_imagenet.py --data-dir /path/to/imagenet          the paper's recipe
accelerate launch examples/train_imagenet.py --data-dir /path/to/images            a folder with train/ and validation/
accelerate launch examples/train_imagenet.py --dataset torch/cifar100 --data-dir DIR
accelerate launch examples/train_imagenet.py --dataset hfds/user/name | wds/name --data-dir DIR
python examples/train_imagenet.py --dataset fashion_mnist --data-dir DIR           its four idx files
accelerate launch examples/train_imagenet.py --data-dir DIR --backbone NAME --pretrained | --weights FILE   fine-tuning
python examples/train_imagenet.py                                                  a demo on a CPU, under two minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import tyro

import hierens
from hierens.plotting import plot_accuracy
from hierens.profiling import millions, table
from hierens.training.config import DataConfig, ModelConfig, TrainConfig, save_configs
from hierens.training.data import count_classes, create_loaders
from hierens.training.trainer import Trainer

SMALL_IMAGES = {"mean": (0.5,), "std": (0.25,), "crop_pct": 1.0, "workers": 0}


@dataclass(frozen=True)
class Run:
    """Everything that makes a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# Section 4.1 and supplement A: MobileNetV2 HNE, 150 epochs, batch 450, the cyclic rate halved at six epochs.
IMAGENET = Run(
    DataConfig(workers=8),
    ModelConfig(backbone="mobilenetv2_075", blocks=4),
    TrainConfig(
        output_dir="runs/imagenet",
        epochs=150,
        batch_size=450,
        val_batch_size=450,
        alpha=0.75,
        weight_decay=1e-5,
        schedule="cyclic_step",
        decay_epochs=(60, 90, 110, 125, 135, 145),
    ),
)
# Section 4.1: the CIFAR recipe.
CIFAR = Run(
    DataConfig(input_size=(3, 32, 32), augment="crop_flip", val_split="test", **SMALL_IMAGES | {"workers": 4}),
    ModelConfig(backbone="resnet20_cifar", blocks=4),
    TrainConfig(output_dir="runs/cifar"),
)
FASHION_MNIST = Run(
    DataConfig(dataset="fashion_mnist", input_size=(1, 32, 32), augment="crop_flip", pad=0, **SMALL_IMAGES),
    ModelConfig(backbone="resnet8_cifar", blocks=3),
    TrainConfig(output_dir="runs/fashion_mnist", epochs=6, optimizer="adamw", lr=4e-3, weight_decay=0.02),
)
DEMO = Run(
    DataConfig(dataset="digits", input_size=(1, 16, 16), augment="crop_flip", pad=1, hflip=0.0, **SMALL_IMAGES),
    ModelConfig(backbone="resnet8_cifar", backbone_args={"channels": [8, 16, 32]}, blocks=4),
    TrainConfig(output_dir="runs/demo", epochs=40, batch_size=64, lr=0.2, warmup_epochs=1, cpu=True),
)


def preset(dataset: str, data_dir: str) -> Run:
    """The recipe that fits the data."""
    if not dataset and not data_dir:
        return DEMO
    if dataset in ("digits", "fashion_mnist"):
        return DEMO if dataset == "digits" else FASHION_MNIST
    return CIFAR if "cifar" in dataset else IMAGENET


def create_ensemble(run: Run, num_classes: int) -> hierens.HierarchicalEnsemble:
    """The tree as configured: from pretrained weights copied to every branch, or with branches drawn anew."""
    config = run.model
    source = {"pretrained_cfg_overlay": {"file": config.weights}} if config.weights else {}
    torch.manual_seed(run.train.seed)  # pretrained or not, the classifier may be new
    try:
        backbone = timm.create_model(
            config.backbone,
            pretrained=config.warm,
            num_classes=num_classes,
            in_chans=run.data.input_size[0],
            **source,
            **config.backbone_args,
        )
    except Exception as error:
        weights = f" with the weights in {config.weights}" if config.weights else ""
        raise ValueError(f"timm cannot make {config.backbone}{weights}: {error}") from error
    if config.warm and backbone.num_classes != backbone.pretrained_cfg["num_classes"]:
        # Some of timm's networks draw a classifier so wide, when made for few classes, that the first steps undo much
        # of what the pretrained weights know: EfficientNet's for 10 classes is 11 times wider than this.
        backbone.reset_classifier(backbone.num_classes)
    if isinstance(backbone, hierens.HierarchicalEnsemble):  # hne_resnet50_cifar and its like are trees as they come
        model = backbone
    else:
        init = config.init or ("copy" if config.warm else "reinit")
        model = hierens.hierensify(backbone, config.blocks, init=init, seed=run.train.seed)
    preprocessing = ("input_size", "mean", "std", "crop_pct", "interpolation")
    model.pretrained_cfg.update({key: getattr(run.data, key) for key in preprocessing})
    return model


def train(run: Run) -> tuple[hierens.HierarchicalEnsemble, list[float]]:
    """Train as configured; the model and its accuracy (%) per depth."""
    micro_batch = run.train.batch_size // run.train.accumulation
    train_loader, val_loader = create_loaders(
        run.data, micro_batch, run.train.val_batch_size, run.train.seed, run.train.cpu
    )
    model = create_ensemble(run, run.model.num_classes or count_classes(train_loader.dataset))
    trainer = Trainer(model, run.train, train_loader, val_loader)
    if trainer.accelerator.is_main_process:
        output = Path(run.train.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        save_configs(output / "run.json", data=run.data, model=run.model, train=run.train)
    history = trainer.fit()
    return trainer.ensemble.cpu().eval(), history[-1]["accuracy"]


def report(model: hierens.HierarchicalEnsemble, accuracy: list[float]) -> str:
    """The table of depths."""
    rows = [
        (f"{r.depth}", f"{r.leaves}", millions(r.macs), millions(r.parameters), f"{r.latency_ms:.2f}", f"{a:.2f}")
        for r, a in zip(model.profile().rows, accuracy, strict=True)
    ]
    return table(("depth", "networks", "MACs", "parameters", "latency (ms)", "accuracy (%)"), rows)


def main() -> None:
    """Choose a recipe by the data, let flags change it, train, and say what every depth costs and gives."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default="")
    peek.add_argument("--data-dir", default="")
    known, _ = peek.parse_known_args()
    run = tyro.cli(tyro.conf.OmitArgPrefixes[Run], default=preset(known.dataset, known.data_dir), description=__doc__)
    demo = not known.dataset and not known.data_dir
    start = time.perf_counter()
    model, accuracy = train(run)
    if model.training or not is_main():
        return
    print(f"\n{report(model, accuracy)}\n")
    curves = {run.train.objective: (model.macs(), accuracy)}
    if demo:
        curves["independent"] = compare_without_distillation(run, accuracy)
    picture = plot_accuracy(
        curves, Path(run.train.output_dir) / "accuracy.png", title=f"{run.data.dataset or 'validation'}"
    )
    print(f"trained in {time.perf_counter() - start:.0f} s; model: {run.train.output_dir}/model, picture: {picture}")


def compare_without_distillation(run: Run, accuracy: list[float]) -> tuple[tuple[int, ...], list[float]]:
    """The same run with labels alone, for what distillation gives the small depths."""
    directory = f"{run.train.output_dir}/independent"
    plain = dataclasses.replace(
        run, train=dataclasses.replace(run.train, objective="independent", output_dir=directory)
    )
    model, without = train(plain)
    print(f"\naccuracy at depth 0: {accuracy[0]:.2f} % with co-distillation, {without[0]:.2f} % without\n")
    return model.macs(), without


def is_main() -> bool:
    """Whether this process speaks for all."""
    from accelerate import PartialState

    return PartialState().is_main_process


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
