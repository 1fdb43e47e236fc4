"""The configuration of a training run: frozen dataclasses that can be written as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hierens.core.members import Kind, member_kinds


@dataclass(frozen=True)
class DataConfig:
    """The images and their preprocessing."""

    dataset: str = ""
    """`clothing`, `digits`, `fashion_mnist`; timm's `torch/..`, `hfds/..`, `hfids/..`, `wds/..`; empty for a folder"""
    data_dir: str = ""
    """folder of the data set; not needed for `clothing` and `digits`"""
    train_split: str = "train"
    """name of the training split (a sub-folder, for image folders; empty for data_dir itself)"""
    val_split: str = "validation"
    """name of the validation split"""
    input_size: tuple[int, int, int] = (3, 224, 224)
    """channels, height and width of the model's input; with one channel, images are read as greyscale"""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """mean of pixels in [0, 1], per channel or one value for all"""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """standard deviation of pixels in [0, 1], per channel or one value for all"""
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
    """centre crop at validation, as a fraction of the resized image"""
    interpolation: str = "bilinear"
    """interpolation when images are resized"""
    workers: int = 4
    """loader processes per training process"""
    num_samples: int | None = None
    """samples per epoch of a stream (`wds/`, `hfids/`) that does not state its length"""
    max_unreadable: float = 0.1
    """fraction of unreadable images above which the run stops; up to it, they are skipped and reported"""
    max_pixels: int = 89_478_485
    """height times width above which an image counts as unreadable; Pillow's own limit is twice the default"""

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}.")


@dataclass(frozen=True)
class TrainConfig:
    """The training of a hierarchical ensemble.

    Defaults are the paper's CIFAR recipe (section 4.1), except the objective, which was more accurate at every depth
    (docs/results/cifar100.md).
    """

    output_dir: str = "runs/hierens"
    """folder for checkpoints, log.jsonl and the final model"""
    epochs: int = 200
    """passes over the training set"""
    batch_size: int = 128
    """images per optimiser step, over all processes and accumulation steps together"""
    val_batch_size: int = 256
    """images per validation step, over all processes together"""
    accumulation: int = 1
    """micro-batches per optimiser step"""
    objective: str = "hierarchical+hierarchical_codistillation"
    """the loss: see `hierens.objectives.Objective`"""
    alpha: float = 0.5
    """weight of the distillation term, from 0 to 1 (HNE: 0.5 on CIFAR, 0.75 on ImageNet; one_for_all: 0.9)"""
    temperature: float = 2.0
    """temperature of the teacher's softmax in co-distillation"""
    temper_students: bool = False
    """use the temperature for the students of co-distillation as well, as Hinton et al. do; the paper does not"""
    standardize_logits: bool = False
    """standardise the logits of teacher and students before the temperature is applied (arXiv 2403.01427)"""
    mean_over_classes: bool = False
    """average the divergence of `one_for_all` over the classes, as its authors' code does, instead of summing it"""
    depth_weights: tuple[float, ...] = ()
    """weight of each depth in the hierarchical terms; equal by default"""
    alpha_warmup_epochs: int = 0
    """epochs over which alpha rises linearly from 0"""
    final_temperature: float | None = None
    """temperature at the end of training, reached linearly; None keeps `temperature`"""
    ema_teacher: bool = False
    """use the averaged weights (`ema_decay`) as the teacher of co-distillation"""
    gradient_equilibrium: bool = False
    """average the gradients of the leaves (or exits) in the branches (or blocks) that they share, instead of adding"""
    mixup: float = 0.0
    """timm's mixup alpha; 0 turns mixup off. docs/explanation/method.md describes the losses with mixed images"""
    cutmix: float = 0.0
    """timm's cutmix alpha; if `mixup` is on as well, one of the two is drawn for each batch"""
    mix_probability: float = 1.0
    """fraction of batches that are mixed"""
    mix_switch_probability: float = 0.5
    """fraction of mixed batches that use cutmix, if both are on"""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """draw the mixing ratio per batch, per pair or per image"""
    mix_off_epoch: int = 0
    """epoch from which nothing is mixed; 0: mix to the end"""
    label_smoothing: float = 0.0
    """fraction of each label that is spread over all classes"""
    optimizer: str = "sgd"
    """name of any timm optimiser"""
    lr: float = 0.1
    """the schedule's highest learning rate"""
    momentum: float = 0.9
    """momentum, or the first beta of Adam-like optimisers"""
    weight_decay: float = 5e-4
    """weight decay; none on biases and norms, as in timm"""
    layer_decay: float | None = None
    """factor of the learning rate per level, counted from the last; None: the same rate for all"""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimiser, such as `{"betas": [0.9, 0.95]}`"""
    schedule: str = "cosine"
    """name of any timm scheduler, or `cyclic_step` (ESPNetv2's, used in the paper's ImageNet run)"""
    schedule_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of `timm.scheduler.create_scheduler_v2`, such as `{"cycle_limit": 3}`"""
    min_lr: float = 0.0
    """learning rate at the end of the schedule"""
    warmup_epochs: int = 0
    """epochs of linear warm-up"""
    decay_epochs: tuple[int, ...] = ()
    """milestones of `multistep` and `cyclic_step`"""
    decay_rate: float = 0.5
    """factor at each milestone"""
    cycle_epochs: int = 5
    """length of one cycle of `cyclic_step`"""
    clip_grad: float | None = None
    """largest gradient norm, value or ratio, by `clip_mode`; None: no clipping"""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """norm: of all gradients together; value: of each number; agc: adaptive, per unit, relative to its weights"""
    freeze_levels: int = 0
    """levels of the tree, from the root, whose weights and statistics are frozen"""
    classifiers_only: bool = False
    """train the last linear layers and the embeddings of `collaborate` alone; all other weights and statistics are
    frozen"""
    unfreeze_epoch: int | None = None
    """epoch from which frozen levels are trained; None: never"""
    ema_decay: float | None = None
    """decay of an exponential moving average of the weights, which is evaluated and saved too; None: no average"""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Accelerate's mixed precision"""
    compile: bool = False
    """run training steps through torch.compile"""
    grad_checkpointing: bool = False
    """recompute each level's activations in the backward pass: less memory, about a third more work"""
    channels_last: bool = True
    """memory format of images and convolutions"""
    sync_batchnorm: bool = True
    """use the batch statistics of all processes, so that their number does not change the result"""
    symmetry_noise: float = 0.01
    """relative noise on the weights of branches that are copies of each other when training starts; 0: none"""
    symmetry_signs: bool = False
    """random signs for the scales of such branches of `rank1` instead, as in BatchEnsemble; to train from scratch"""
    seed: int = 0
    """seed of all random numbers: data order, augmentation, dropout"""
    checkpoint_steps: int = 500
    """optimiser steps between checkpoints; one is also written after every epoch"""
    keep_checkpoints: int = 2
    """number of newest checkpoints to keep"""
    keep_best: bool = True
    """also keep the checkpoint with the best accuracy of the full ensemble; `checkpoints/best` points to it"""
    resume: str = "auto"
    """`auto`: from the newest checkpoint in output_dir, if any; `never`; or a checkpoint's folder"""
    val_epochs: int = 1
    """epochs between validations; the last epoch is always validated"""
    log_steps: int = 20
    """optimiser steps between lines in log.jsonl and the trackers"""
    trackers: tuple[str, ...] = ()
    """experiment trackers that Accelerate supports: `tensorboard`, `wandb`, ..."""
    cpu: bool = False
    """train on the CPU even if an accelerator is available"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "val_batch_size", "accumulation", "checkpoint_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size counts all accumulation steps: {self.batch_size} is not divisible by {self.accumulation}."
            )
        if self.classifiers_only and (self.freeze_levels or self.unfreeze_epoch is not None):
            raise ValueError("classifiers_only freezes all levels to the end: omit freeze_levels and unfreeze_epoch.")
        if self.ema_teacher and self.ema_decay is None:
            raise ValueError("ema_teacher needs averaged weights: give ema_decay, such as 0.999.")
        if self.standardize_logits and not self.temper_students:
            raise ValueError("standardize_logits needs the temperature for students as well: set temper_students.")
        if self.mean_over_classes and "one_for_all" not in self.objective:
            raise ValueError("mean_over_classes is for one_for_all: set objective, or omit it.")
        for name in ("mixup", "cutmix", "label_smoothing", "freeze_levels", "alpha_warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True)
class TeacherConfig:
    """Distillation from another model, in addition to co-distillation."""

    teacher: str = ""
    """a timm model name, or the folder or Hub name of a saved model; empty for none"""
    teacher_weights: str = ""
    """file of the teacher's weights (.safetensors or .pth); by default timm's pretrained weights"""
    teacher_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm.create_model for the teacher"""
    teacher_share: float = 0.5
    """weight of the teacher in the loss, from 0 to 1; the objective has the rest"""
    teacher_temperature: float = 2.0
    """temperature of teacher and students"""
    teacher_of_exits: bool = False
    """use it in the objective `one_for_all` in place of the last exit, with that objective's alpha and temperature"""

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be from 0 to 1, got {self.teacher_share}.")
        if self.teacher_weights and not Path(self.teacher_weights).is_file():
            raise ValueError(f"teacher_weights: there is no file {self.teacher_weights}.")
        if self.teacher_of_exits and not self.teacher:
            raise ValueError("teacher_of_exits needs a teacher: give teacher, or omit it.")


@dataclass(frozen=True)
class ModelConfig:
    """The network: a backbone and its conversion to a tree or a multi-exit network."""

    backbone: str = "mobilenetv2_075"
    """any timm model name; ensembles such as `hne_mobilenetv2_075` keep their own blocks"""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm.create_model"""
    pretrained: bool = False
    """start from timm's pretrained weights, copied to every branch"""
    weights: str = ""
    """file of pretrained weights with timm's names (.safetensors or .pth), instead of timm's own"""
    method: Literal["hne", "multi_exit", "hne_exits"] = "hne"
    """a tree of networks, one network with exits, or a tree with exits"""
    blocks: int = 4
    """blocks of the tree: 2^(blocks-1) networks"""
    branching: tuple[int, ...] = ()
    """children per branch and level instead of a binary tree, such as `1 1 1 8`; sets `blocks`"""
    members: tuple[Kind, ...] = ()
    """what branches share: `full` nothing, `rank1` and `lora` the dense layers' weights; one kind, or one per level"""
    rank: int | None = None
    """rank of `lora`"""
    exits: int | None = None
    """exits of a multi-exit network: 4, or those of the backbone itself"""
    head: Literal["pool", "conv"] = "pool"
    """heads of early exits: global pooling and a linear layer, or two convolutions before that"""
    collaborate: bool = False
    """each exit also receives an embedding of the previous exit's logits"""
    boosted: bool = False
    """add the logits of the exit before to those of each exit, without a gradient to them (arXiv 2211.16726)"""
    exit_weights: str = ""
    """weights of an ensemble of exits: `uniform`, `linear_rising`, `linear_falling`, `geometric_rising`,
    `geometric_falling`; empty: each exit predicts alone"""
    learn_weights: bool = False
    """train the weights of the exits, starting from `exit_weights`"""
    exit_average: Literal["logits", "probabilities"] = "logits"
    """what the weights of the exits average"""
    start: str = ""
    """a saved model (a folder, or a name on the Hub) to start from instead of a backbone"""
    new_classifiers: bool = False
    """replace the classifiers of the saved model by new ones"""
    drop_path: float | None = None
    """largest drop-path rate of the backbone's residual branches"""
    dropout: float | None = None
    """dropout rate before the classifier"""
    init: Literal["copy", "reinit"] | None = None
    """copy: branches are copies of the backbone; reinit: they are initialised anew; by default copy if pretrained"""
    num_classes: int | None = None
    """number of classes; by default that of the data set"""

    def __post_init__(self) -> None:
        if self.weights and not Path(self.weights).is_file():
            raise ValueError(f"weights: there is no file {self.weights}.")
        of_exits = ("collaborate", "boosted", "exit_weights", "learn_weights")
        only = ("branching", "members", "rank", "init") if self.method == "multi_exit" else of_exits
        given = [name for name in only if getattr(self, name)]
        given += ["exit_average"] if self.method != "multi_exit" and self.exit_average != "logits" else []
        given += ["head"] if self.method == "hne" and self.head != "pool" else []
        if given:
            raise ValueError(f"method {self.method!r} has no {' and no '.join(given)}: leave it out, or change method.")
        member_kinds(self.sharing, self.rank, len(self.branching) or self.blocks)
        if self.new_classifiers and not self.start:
            raise ValueError("new_classifiers replaces those of a saved model: give start, or omit it.")
        if self.warm and self.init == "reinit":
            raise ValueError("init='reinit' would discard the pretrained weights: leave it out, or use 'copy'.")

    @property
    def sharing(self) -> Kind | tuple[Kind, ...]:
        """The argument `members` of `hierens.hierensify`."""
        return self.members if len(self.members) > 1 else (*self.members, "full")[0]

    @property
    def warm(self) -> bool:
        """Whether the backbone has pretrained weights."""
        return self.pretrained or bool(self.weights)


@dataclass(frozen=True)
class Run:
    """The whole configuration of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


def to_json(config: Any) -> dict[str, Any]:
    """One of the configs above as plain JSON values.

    Examples:
        >>> to_json(ModelConfig(backbone="resnet18"))["backbone"]
        'resnet18'
    """
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))
