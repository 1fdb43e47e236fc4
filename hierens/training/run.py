"""Runs a configuration: creates data, backbone, tree, teacher and trainer, and returns the trained model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from hierens.core.atomic_files import replacing
from hierens.core.labels import name_labels
from hierens.hub.validate_config import unusable
from hierens.models.adaptive import Adaptive
from hierens.models.conversion import hierensify, multi_exit, tree_with_exits
from hierens.models.loading import from_pretrained
from hierens.training.config import Run, to_json
from hierens.training.data.loaders import class_names, count_classes, create_loaders
from hierens.training.lock import check_unlocked
from hierens.training.sharding import is_sharded
from hierens.training.trainer import Trainer

__all__ = ["Run", "create_ensemble", "create_teacher", "train"]


def train(
    run: Run, loaders: tuple[Any, Any] | None = None, make_trainer: Callable[..., Trainer] = Trainer
) -> tuple[Adaptive, dict[str, Any]]:
    """Train as configured.

    Args:
        run: the configuration.
        loaders: for training and validation, instead of those of `run.data`; they yield (images (N, C, H, W), targets
            (N,)) in batches of the sizes in `run.train`.
        make_trainer: `Trainer`, a subclass, or another callable with its arguments that returns one.

    Returns:
        The model, on the CPU, and the record of its last validation: `accuracy` per depth in percent, and the other
        fields of `hierens.evaluation.metrics.LeafEvaluation`.

    Raises:
        ValueError: the configuration is wrong in any way; raised before the first step.
    """
    config, output = run.train, Path(run.train.output_dir)
    check_unlocked(output)
    micro_batch = config.batch_size // config.accumulation
    train_loader, val_loader = loaders or create_loaders(
        run.data, micro_batch, config.val_batch_size, config.seed, config.cpu
    )
    names = class_names(train_loader.dataset)
    model = create_ensemble(run, run.model.num_classes or count_classes(train_loader.dataset), names)
    teacher = create_teacher(run, model.num_classes)
    trainer = make_trainer(model, config, train_loader, val_loader, teacher, run.teacher)
    history = trainer.fit(begun=lambda: _write(output / "run.json", to_json(run)))
    model = from_pretrained(output / "model") if is_sharded(trainer.model) else trainer.ensemble.cpu().eval()
    if trainer.accelerator.is_main_process:
        results = {"macs": list(model.macs()), "leaves": list(model.sizes), **history[-1]}
        _write(output / "results.json", results)
    return model, history[-1]


def _write(file: Path, content: dict[str, Any]) -> None:
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def create_ensemble(run: Run, num_classes: int, names: Sequence[str] | None = None) -> Adaptive:
    """The configured tree or multi-exit network: a saved model, or a new one with pretrained or random weights.

    Args:
        run: the configuration.
        num_classes: number of classes.
        names: of the classes, which are saved with the model.

    Raises:
        ValueError: timm cannot create the backbone; the backbone cannot be cut so; the saved model does not fit; there
            are more names than classes.
    """
    model = _load(run, num_classes) if run.model.start else _create(run, num_classes)
    preprocessing = ("input_size", "mean", "std", "crop_pct", "interpolation")
    model.pretrained_cfg.update({key: getattr(run.data, key) for key in preprocessing})
    if names:
        name_labels(model, names)
    if wrong := unusable("input_size", run.data.input_size, model.in_chans):
        raise ValueError(f"a model with this input_size could not be loaded again: {wrong}.")
    return model


def _load(run: Run, num_classes: int) -> Adaptive:
    """The saved model to start from, with new classifiers if asked for or if the number of classes differs."""
    config = run.model
    torch.manual_seed(run.train.seed)
    model: Any = from_pretrained(config.start)
    if model.in_chans != run.data.input_size[0]:
        raise ValueError(f"{config.start} takes {model.in_chans} channels, input_size has {run.data.input_size[0]}.")
    if model.architecture != config.method:
        raise ValueError(f"{config.start} was made by another method: use method={model.architecture!r}.")
    if config.new_classifiers or model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    if config.boosted and not model.boosted:
        raise ValueError(f"{config.start} is not boosted: omit boosted, or start from a backbone.")
    if config.collaborate and not model.collaborate:
        model = model.with_collaboration()
    return model


def _create(run: Run, num_classes: int) -> Adaptive:
    config = run.model
    source = {"pretrained_cfg_overlay": {"file": config.weights}} if config.weights else {}
    rates = {"drop_path_rate": config.drop_path, "drop_rate": config.dropout}
    torch.manual_seed(run.train.seed)  # pretrained or not, the classifier may be new
    try:
        backbone = timm.create_model(
            config.backbone,
            pretrained=config.warm,
            num_classes=num_classes,
            in_chans=run.data.input_size[0],
            **source,
            **{name: rate for name, rate in rates.items() if rate is not None},
            **config.backbone_args,
        )
    except Exception as error:
        weights = f" with the weights in {config.weights}" if config.weights else ""
        raise ValueError(f"timm cannot create {config.backbone}{weights}: {error}") from error
    if isinstance(backbone, Adaptive):  # hne_...: already a tree
        if backbone.architecture != config.method:
            raise ValueError(f"{config.backbone} has another method: use method={backbone.architecture!r}.")
        return backbone
    if config.warm and backbone.num_classes != backbone.pretrained_cfg["num_classes"]:
        # With few classes, some timm networks initialise a classifier with such large weights that the first steps
        # destroy much of the pretrained weights: EfficientNet's for 10 classes are 11 times larger than these.
        backbone.reset_classifier(backbone.num_classes)
    if config.method == "multi_exit":
        return multi_exit(
            backbone,
            config.exits,
            head=config.head,
            collaborate=config.collaborate,
            weights=config.exit_weights or None,
            learn_weights=config.learn_weights,
            average=config.exit_average,
            boosted=config.boosted,
        )
    tree: dict[str, Any] = {
        "branching": config.branching or None,
        "members": config.sharing,
        "rank": config.rank,
        "init": config.init or ("copy" if config.warm else "reinit"),
        "seed": run.train.seed,
    }
    if config.method == "hne_exits":
        return tree_with_exits(backbone, config.blocks, head=config.head, **tree)
    return hierensify(backbone, config.blocks, **tree)


def create_teacher(run: Run, num_classes: int) -> nn.Module | None:
    """The external teacher, if there is one.

    Raises:
        ValueError: it cannot be loaded, or has another number of classes.
    """
    config = run.teacher
    if not config.teacher:
        return None
    try:
        if Path(config.teacher).is_dir() or "/" in config.teacher.removeprefix("hf-hub:"):
            teacher: Any = from_pretrained(config.teacher)
        else:
            source = {"pretrained_cfg_overlay": {"file": config.teacher_weights}} if config.teacher_weights else {}
            teacher = timm.create_model(config.teacher, pretrained=True, **source, **config.teacher_args)
    except Exception as error:
        raise ValueError(f"the teacher {config.teacher} cannot be loaded: {error}") from error
    if teacher.num_classes != num_classes:
        raise ValueError(f"the teacher has {teacher.num_classes} classes, the data set has {num_classes}.")
    return teacher
