"""Presets: named configurations of runs, whose fields flags and files can override."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hierens.core.errors import did_you_mean
from hierens.core.json_files import read_json, short
from hierens.training.config import DataConfig, ModelConfig, Run, TeacherConfig, TrainConfig, to_json

_Config = TypeVar("_Config")
_MOST_BYTES = 2**18  # of a YAML file, because its parser is slow
_SMALL_IMAGES: dict[str, Any] = {"mean": (0.5,), "std": (0.25,), "crop_pct": 1.0, "workers": 0}

_CIFAR100 = DataConfig(
    dataset="torch/cifar100",
    input_size=(3, 32, 32),
    augment="crop_flip",
    val_split="test",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    crop_pct=1.0,
)
_IMTA = TrainConfig(
    output_dir="runs/imta_stage1",
    epochs=300,
    batch_size=64,
    objective="independent",
    gradient_equilibrium=True,
    optimizer="momentum",
    lr=0.1,
    weight_decay=1e-4,
    schedule="multistep",
    decay_epochs=(150, 225),
    decay_rate=0.1,
)

# Ruiz & Verbeek, section 4.1. The results pages of the presets below were measured with it.
_PAPERS = "independent+hierarchical_codistillation"

PRESETS: dict[str, Run] = {
    # Ruiz & Verbeek, section 4.1 and supplement A: 150 epochs, batch 450, the cyclic rate halved at six epochs.
    "paper-imagenet": Run(
        DataConfig(workers=8),
        ModelConfig(backbone="hne_mobilenetv2_075"),
        TrainConfig(
            output_dir="runs/imagenet",
            epochs=150,
            batch_size=450,
            val_batch_size=450,
            objective=_PAPERS,
            alpha=0.75,
            weight_decay=1e-5,
            schedule="cyclic_step",
            decay_epochs=(60, 90, 110, 125, 135, 145),
        ),
    ),
    # Section 4.1
    "paper-cifar": Run(
        _CIFAR100,
        ModelConfig(backbone="hne_resnet50_cifar"),
        TrainConfig(output_dir="runs/cifar", objective=_PAPERS),
    ),
    "finetune": Run(
        DataConfig(auto_augment="rand-m6-mstd0.5-inc1", random_erasing=0.1, interpolation="bicubic"),
        ModelConfig(backbone="efficientnet_b0", pretrained=True, drop_path=0.1),
        TrainConfig(
            output_dir="runs/finetune",
            epochs=20,
            warmup_epochs=1,
            optimizer="adamw",
            lr=5e-4,
            weight_decay=0.02,
            layer_decay=0.7,
            label_smoothing=0.1,
            mixup=0.2,
            clip_grad=1.0,
            ema_decay=0.999,
        ),
    ),
    "fashion-mnist": Run(
        DataConfig(dataset="fashion_mnist", input_size=(1, 32, 32), augment="crop_flip", pad=0, **_SMALL_IMAGES),
        ModelConfig(backbone="resnet8_cifar", blocks=3),
        TrainConfig(
            output_dir="runs/fashion_mnist", objective=_PAPERS, epochs=6, optimizer="adamw", lr=4e-3, weight_decay=0.02
        ),
    ),
    # No augmentation, so that single networks overfit and the ensemble can improve on them.
    "demo": Run(
        DataConfig(dataset="clothing", input_size=(3, 32, 32), augment="none", **_SMALL_IMAGES),
        ModelConfig(backbone="resnet8_cifar", backbone_args={"channels": [8, 16, 32], "stem_stride": 2}, blocks=4),
        TrainConfig(
            output_dir="runs/demo",
            objective=_PAPERS,
            epochs=20,
            batch_size=64,
            optimizer="adamw",
            lr=4e-3,
            weight_decay=0.02,
            warmup_epochs=1,
            val_epochs=5,
            cpu=True,
        ),
    ),
    "digits": Run(
        DataConfig(dataset="digits", input_size=(1, 16, 16), augment="crop_flip", pad=1, hflip=0.0, **_SMALL_IMAGES),
        ModelConfig(backbone="resnet8_cifar", backbone_args={"channels": [8, 16, 32]}, blocks=4),
        TrainConfig(
            output_dir="runs/digits", objective=_PAPERS, epochs=40, batch_size=64, lr=0.2, warmup_epochs=1, cpu=True
        ),
    ),
    # The two stages of Li et al. (arXiv 1908.06294), as their code trains MSDNet on CIFAR.
    "imta-stage1": Run(_CIFAR100, ModelConfig(method="multi_exit", backbone="msdnet_cifar_7"), _IMTA),
    "imta-stage2": Run(
        _CIFAR100,
        ModelConfig(method="multi_exit", start="runs/imta_stage1/model", collaborate=True, new_classifiers=True),
        dataclasses.replace(
            _IMTA,
            output_dir="runs/imta_stage2",
            classifiers_only=True,
            objective="one_for_all",
            alpha=0.9,
            temperature=3.0,
            mean_over_classes=True,
        ),
        TeacherConfig(teacher="runs/imta_stage1/model", teacher_of_exits=True),
    ),
    # Li et al. (arXiv 1908.06294) on the digits: all three of their techniques, trained jointly.
    "demo-exits": Run(
        DataConfig(dataset="digits", input_size=(1, 16, 16), augment="crop_flip", pad=1, hflip=0.0, **_SMALL_IMAGES),
        ModelConfig(
            method="multi_exit",
            backbone="resnet8_cifar",
            backbone_args={"channels": [8, 16, 32]},
            exits=3,
            head="conv",
            collaborate=True,
        ),
        TrainConfig(
            output_dir="runs/demo_exits",
            epochs=40,
            batch_size=64,
            lr=0.05,
            warmup_epochs=1,
            cpu=True,
            objective="one_for_all",
            alpha=0.9,
            alpha_warmup_epochs=3,
            temperature=3.0,
            gradient_equilibrium=True,
        ),
    ),
}


def preset(name: str) -> Run:
    """A preset by name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}: choose {', '.join(PRESETS)}.")
    return PRESETS[name]


def load_run(path: str | Path) -> Run:
    """A run from a YAML or JSON file: the output of `--print-config`, or the `run.json` that a run writes.

    Fields that the file does not give are those of the preset it names as `preset`, or else the defaults.

    Raises:
        ValueError: the file is missing or no YAML, or has a field that does not exist.
    """
    try:
        if Path(path).suffix == ".json":
            content = read_json(Path(path), "a configuration")
        elif Path(path).stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is longer than {_MOST_BYTES} bytes")
        else:
            content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no configuration: it must hold fields by name, grouped as data, model, train.")
    base = preset(str(content.pop("preset"))) if "preset" in content else Run()
    return _replaced(base, content, str(path))


def dump_run(run: Run) -> str:
    """A run as YAML, which `load_run` reads back."""
    return str(yaml.safe_dump(to_json(run), sort_keys=False))


def _replaced(config: _Config, values: Mapping[str, Any], where: str) -> _Config:
    """The config with some fields replaced; tuples and nested configs get their declared types."""
    known = get_type_hints(type(config))
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: there is no field {short(name)}{did_you_mean(str(name), known)}.")
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} must hold fields by name, got {short(value)}.")
            changed[name] = _replaced(current, value, f"{where}: {name}")
        elif isinstance(current, tuple) and isinstance(value, list):
            kind = get_args(known[name])[0]
            changed[name] = tuple(_value(part, kind, f"{where}: {name}") for part in value)
        else:
            changed[name] = _value(value, known[name], f"{where}: {name}")
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def _value(value: Any, declared: Any, where: str) -> Any:
    """A plain value, if it has the declared type."""
    if "float" in str(declared) and _is_number(value):
        return float(value)
    if not _fits(value, declared):
        allowed = declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")
        raise ValueError(f"{where} must be {allowed}, got {short(value)}.")
    return value


def _is_number(value: Any) -> bool:
    """Whether a value is a number, also in the form 1e-5, which is text in YAML 1.1."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _fits(value: Any, declared: Any) -> bool:
    kind, options = get_origin(declared), get_args(declared)
    if kind is Literal:
        return value in options
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in options)
    if declared is int:
        return type(value) is int
    return isinstance(value, kind or declared)
