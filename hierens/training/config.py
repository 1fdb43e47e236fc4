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
    """`clothing`, `digits`, `fashion_mnist`; timm's `torch/..`, `hfds/..`, `hfids/..`, `wds/..`; empty for a folder"""
    data_dir: str = ""
    """where the data set lies; `clothing` and `digits` need none"""
    train_split: str = "train"
    """name of the training split (a sub-folder, for image folders; empty for data_dir itself)"""
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
    num_samples: int | None = None
    """samples per epoch of a stream (`wds/`, `hfids/`) that does not say how many it has"""
    max_unreadable: float = 0.1
    """largest share of images that may be unreadable before the run stops; up to it they are skipped and reported"""
    max_pixels: int = 89_478_485
    """height times width above which an image is unreadable, by its header; Pillow itself opens twice the default"""

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}.")


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
    """weight of the distillation term against the labels' (HNE: 0.5 on CIFAR, 0.75 on ImageNet; one_for_all: 0.9)"""
    temperature: float = 2.0
    """softens the full ensemble's prediction into the teacher's"""
    temper_students: bool = False
    """temper the students of co-distillation as well, as Hinton et al. do; the paper does not"""
    standardize_logits: bool = False
    """standardise the logits of teacher and students before they are tempered (arXiv 2403.01427)"""
    depth_weights: tuple[float, ...] = ()
    """what each depth's ensemble counts in the hierarchical terms; all the same by default"""
    alpha_warmup_epochs: int = 0
    """epochs over which alpha rises linearly from 0, while the ensemble has little to teach"""
    final_temperature: float | None = None
    """reached linearly from `temperature` at the end of training; None keeps it"""
    ema_teacher: bool = False
    """co-distil from the average of the weights (`ema_decay`) in place of the weights themselves"""
    gradient_equilibrium: bool = False
    """every branch (or block) gets the mean, not the sum, of the gradients of the leaves (or exits) behind it"""
    mixup: float = 0.0
    """timm's mixup alpha; 0 mixes nothing. docs/explanation/method.md says what the losses mean then"""
    cutmix: float = 0.0
    """timm's cutmix alpha; with `mixup` as well, one of the two is drawn for each batch"""
    mix_probability: float = 1.0
    """share of batches that are mixed"""
    mix_switch_probability: float = 0.5
    """share of mixed batches that get cutmix, if both are on"""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """whether one amount is drawn for a batch, for each pair or for each image"""
    mix_off_epoch: int = 0
    """mix nothing from this epoch on; 0 mixes to the end"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes"""
    optimizer: str = "sgd"
    """any optimiser name of timm's"""
    lr: float = 0.1
    """the schedule's highest learning rate"""
    momentum: float = 0.9
    """momentum, or the first beta of Adam-like optimisers"""
    weight_decay: float = 5e-4
    """on weights; biases and norms are spared, as timm does"""
    layer_decay: float | None = None
    """factor of the learning rate per level, counted from the last one; None uses one rate for all"""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimiser, as `{"betas": [0.9, 0.95]}`"""
    schedule: str = "cosine"
    """any scheduler name of timm's, or `cyclic_step` (ESPNetv2's, as the paper's ImageNet run uses)"""
    schedule_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of `timm.scheduler.create_scheduler_v2`, as `{"cycle_limit": 3}`"""
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
    """largest gradient norm, value or ratio, by `clip_mode`; None clips nothing"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """norm: of all gradients together; value: of each number; agc: adaptive, per unit, relative to its weights"""
    freeze_levels: int = 0
    """levels of the tree, from the root, whose weights and statistics stay as they are"""
    unfreeze_epoch: int | None = None
    """epoch from which frozen levels are trained after all; None: never"""
    ema_decay: float | None = None
    """decay of an exponential moving average of the weights, evaluated and saved beside them; None keeps none"""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Accelerate's mixed precision"""
    compile: bool = False
    """run training steps through torch.compile"""
    grad_checkpointing: bool = False
    """recompute each level's activations in the backward pass: less memory, about a third more work"""
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
        if self.ema_teacher and self.ema_decay is None:
            raise ValueError("ema_teacher needs an average of the weights: give ema_decay, such as 0.999.")
        if self.standardize_logits and not self.temper_students:
            raise ValueError("standardize_logits tempers teacher and students alike: set temper_students as well.")
        for name in ("mixup", "cutmix", "label_smoothing", "freeze_levels", "alpha_warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True)
class TeacherConfig:
    """Another model to learn from, beside co-distillation."""

    teacher: str = ""
    """a timm model name, or the folder or Hub name of a saved model; empty for none"""
    teacher_weights: str = ""
    """a file of the teacher's weights (.safetensors or .pth); without one they are timm's pretrained ones"""
    teacher_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm.create_model for the teacher"""
    teacher_share: float = 0.5
    """the teacher's part of the loss; the rest is the objective's"""
    teacher_temperature: float = 2.0
    """softens teacher and students"""

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be from 0 to 1, got {self.teacher_share}.")
        if self.teacher_weights and not Path(self.teacher_weights).is_file():
            raise ValueError(f"teacher_weights: there is no file {self.teacher_weights}.")


@dataclass(frozen=True)
class ModelConfig:
    """Which backbone becomes which tree, or which multi-exit network."""

    backbone: str = "mobilenetv2_075"
    """any timm model name; one that is an ensemble by itself, such as `hne_mobilenetv2_075`, keeps its own blocks"""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm.create_model"""
    pretrained: bool = False
    """start from timm's pretrained weights, copied to every branch"""
    weights: str = ""
    """a file of pretrained weights under timm's names (.safetensors or .pth), in place of timm's own"""
    method: Literal["hne", "multi_exit", "hne_exits"] = "hne"
    """a tree of networks, one network with exits, or a tree with exits"""
    blocks: int = 4
    """blocks of the tree: 2^(blocks-1) networks"""
    branching: tuple[int, ...] = ()
    """children per branch and level in place of a binary tree, as `1 1 1 8`; sets `blocks`"""
    exits: int = 4
    """exits of a multi-exit network, the last one counted"""
    head: Literal["pool", "conv"] = "pool"
    """heads of early exits: global pooling and a linear layer, or two convolutions before that"""
    collaborate: bool = False
    """each exit also sees an embedding of the logits of the one before"""
    exit_weights: str = ""
    """weights of an ensemble of the exits so far: `uniform`, `linear_rising`, `linear_falling`, `geometric_rising`,
    `geometric_falling`; empty: each exit answers alone"""
    learn_weights: bool = False
    """train the weights of the exits, beginning with `exit_weights`"""
    start: str = ""
    """a saved model (a folder, or a name on the Hub) to go on from, in place of a backbone"""
    drop_path: float | None = None
    """largest drop-path rate of the backbone's residual branches"""
    dropout: float | None = None
    """dropout rate before the classifier"""
    init: Literal["copy", "reinit"] | None = None
    """copy: every branch starts as the backbone; reinit: every branch is drawn anew; by default copy if pretrained"""
    num_classes: int | None = None
    """classes to tell apart; by default as many as the data set names"""

    def __post_init__(self) -> None:
        if self.weights and not Path(self.weights).is_file():
            raise ValueError(f"weights: there is no file {self.weights}.")
        only = (
            ("branching", "init") if self.method == "multi_exit" else ("collaborate", "exit_weights", "learn_weights")
        )
        given = [name for name in only if getattr(self, name)]
        given += ["head"] if self.method == "hne" and self.head != "pool" else []
        if given:
            raise ValueError(f"method {self.method!r} has no {' and no '.join(given)}: leave it out, or change method.")
        if self.warm and self.init == "reinit":
            raise ValueError("init='reinit' would throw the pretrained weights away: leave it out, or say 'copy'.")

    @property
    def warm(self) -> bool:
        """Whether the backbone comes with weights worth copying."""
        return self.pretrained or bool(self.weights)


@dataclass(frozen=True)
class Run:
    """Everything that makes a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


def to_json(config: Any) -> dict[str, Any]:
    """Any of the configs above as plain JSON values.

    Examples:
        >>> to_json(ModelConfig(backbone="resnet18"))["backbone"]
        'resnet18'
    """
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))
