"""What a training run is made of: frozen dataclasses that turn into JSON as they are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become tensors."""

    dataset: str = ""
    """`digits`, `fashion_mnist` or a name of timm's: `torch/cifar100`, `hfds/...`, `wds/...`; empty for a folder"""
    data_dir: str = ""
    """where the data set lies; `digits` needs none"""
    train_split: str = "train"
    """name of the training split (a sub-folder, for image folders)"""
    val_split: str = "validation"
    """name of the validation split"""
    input_size: tuple[int, int, int] = (3, 224, 224)
    """channels, height and width that the model sees; one channel reads the images as greyscale"""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """per channel, of pixels in [0, 1]; a single value serves every channel"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """per channel, of pixels in [0, 1]; a single value serves every channel"""
    augment: Literal["none", "crop_flip", "imagenet"] = "imagenet"
    """none: resize only; crop_flip: zero-pad, random crop and flip (CIFAR); imagenet: random resized crop and flip"""
    pad: int = 4
    """pixels of zero padding on each side before a `crop_flip` crop"""
    hflip: float = 0.5
    """probability of a horizontal flip"""
    color_jitter: float = 0.0
    """strength of timm's colour jitter (`imagenet` only); the paper uses none"""
    auto_augment: str | None = None
    """timm's auto-augment policy string, such as `rand-m9-mstd0.5` (`imagenet` only)"""
    random_erasing: float = 0.0
    """probability of timm's random erasing"""
    crop_pct: float = 0.875
    """centre crop at validation, as a share of the resized image"""
    interpolation: str = "bilinear"
    """how images are resized"""
    workers: int = 4
    """loader processes per training process"""


@dataclass(frozen=True)
class TrainConfig:
    """How a hierarchical ensemble is trained. Defaults are the paper's CIFAR recipe (section 4.1)."""

    output_dir: str = "runs/hierens"
    """checkpoints, log.jsonl and the final model land here"""
    epochs: int = 200
    """passes over the training set"""
    batch_size: int = 128
    """images per optimiser step, over all processes and accumulation steps together"""
    val_batch_size: int = 256
    """images per validation step, over all processes together"""
    accumulation: int = 1
    """micro-batches per optimiser step"""
    objective: str = "independent+hierarchical_codistillation"
    """the loss: see `hierens.objectives.Objective`"""
    alpha: float = 0.5
    """weight of the distillation term against the labels' (the paper: 0.5 on CIFAR, 0.75 on ImageNet)"""
    temperature: float = 2.0
    """softens the full ensemble's prediction into the teacher's"""
    optimizer: str = "sgd"
    """any optimiser name of timm's"""
    lr: float = 0.1
    """the schedule's highest learning rate"""
    momentum: float = 0.9
    """momentum, or the first beta of Adam-like optimisers"""
    weight_decay: float = 5e-4
    """on weights; biases and norms are spared, as timm does"""
    schedule: str = "cosine"
    """any scheduler name of timm's, or `cyclic_step` (ESPNetv2's, as the paper's ImageNet run uses)"""
    min_lr: float = 0.0
    """where the schedule ends"""
    warmup_epochs: int = 0
    """epochs of linear warm-up"""
    decay_epochs: tuple[int, ...] = ()
    """milestones of `multistep` and `cyclic_step`"""
    decay_rate: float = 0.5
    """factor at each milestone"""
    cycle_epochs: int = 5
    """length of one cycle of `cyclic_step`"""
    clip_grad: float | None = None
    """largest gradient norm; None clips nothing"""
    ema_decay: float | None = None
    """decay of an exponential moving average of the weights, evaluated and saved beside them; None keeps none"""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Accelerate's mixed precision"""
    channels_last: bool = True
    """memory format of images and convolutions"""
    sync_batchnorm: bool = True
    """batch norm sees the global batch when several processes train, so that their number does not change the result"""
    symmetry_noise: float = 0.01
    """relative weight noise that tells copy-initialised branches apart when training starts; 0 adds none"""
    seed: int = 0
    """of everything random: data order, augmentation, dropout"""
    checkpoint_steps: int = 500
    """optimiser steps between checkpoints; one is also written after every epoch"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay"""
    keep_best: bool = True
    """the checkpoint whose full ensemble validated best stays too, however old; `checkpoints/best` points to it"""
    resume: str = "auto"
    """`auto`: from output_dir's newest checkpoint if there is one; `never`; or a checkpoint's folder"""
    val_epochs: int = 1
    """epochs between validations; the last epoch is always validated"""
    log_steps: int = 20
    """optimiser steps between lines in log.jsonl and the trackers"""
    trackers: tuple[str, ...] = ()
    """experiment trackers by Accelerate's names: `tensorboard`, `wandb`, ..."""
    cpu: bool = False
    """train on the CPU even where an accelerator is to hand"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "val_batch_size", "accumulation", "checkpoint_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size counts all accumulation steps: {self.batch_size} does not divide by {self.accumulation}."
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which backbone becomes which tree."""

    backbone: str = "mobilenetv2_075"
    """any timm model name"""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm.create_model"""
    pretrained: bool = False
    """start from timm's pretrained weights, copied to every branch"""
    weights: str = ""
    """a file of pretrained weights under timm's names (.safetensors or .pth), in place of timm's own"""
    blocks: int = 4
    """blocks of the tree: 2^(blocks-1) networks"""
    init: Literal["copy", "reinit"] | None = None
    """copy: every branch starts as the backbone; reinit: every branch is drawn anew; by default copy if pretrained"""
    num_classes: int | None = None
    """classes to tell apart; by default as many as the data set names"""

    def __post_init__(self) -> None:
        if self.weights and not Path(self.weights).is_file():
            raise ValueError(f"weights: there is no file {self.weights}.")
        if self.warm and self.init == "reinit":
            raise ValueError("init='reinit' would throw the pretrained weights away: leave it out, or say 'copy'.")

    @property
    def warm(self) -> bool:
        """Whether the backbone comes with weights worth copying."""
        return self.pretrained or bool(self.weights)


def to_json(config: Any) -> dict[str, Any]:
    """Any of the configs above as plain JSON values.

    Examples:
        >>> to_json(ModelConfig(backbone="resnet18"))["backbone"]
        'resnet18'
    """
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def save_configs(path: str | Path, **configs: Any) -> None:
    """Write configs by name into one JSON file."""
    text = json.dumps({name: to_json(config) for name, config in configs.items()}, indent=2)
    Path(path).write_text(text + "\n")
