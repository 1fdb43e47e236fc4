"""What every network whose depth can be chosen offers, however it is built: trees and multi-exit networks alike.

It has leaves, which answer: a tree's networks, or the exits of a chain of blocks. Depth b asks the first `sizes[b]` of
them, and costs `macs()[b]`. Policies, calibration, metrics, losses, the trainer, profiles and the Hub need no more.
"""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hierens.core.labels import forget_labels
from hierens.core.model_info import ModelInfo
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step

_COUNTING = threading.Lock()


class AdaptiveBase(nn.Module, ABC):
    """A network whose depth is chosen when it is run; `hierens.Adaptive` adds what writes files and measures time.

    Attributes:
        levels: its parts in order, which training can freeze from the first.
        num_classes: number of classes.
        num_features: channels that the backbone's classifier reads.
        in_chans: image channels.
        pretrained_cfg: timm's description of the model and its preprocessing.
        gradient_equilibrium: whether shared parts get the mean, not the sum, of the gradients that the leaves behind
            them send; off by default. See `hierens.core.equilibrium`.
        grad_checkpointing: whether activations are computed again in the backward pass rather than kept.
    """

    architecture: ClassVar[str]
    """timm's entry point that makes it"""
    unit: ClassVar[str] = "networks"
    """what its leaves are called in tables"""
    symmetric: Any = False
    """whether any two leaves have the same weights"""
    levels: nn.ModuleList
    gradient_equilibrium: bool = False
    grad_checkpointing: bool = False
    num_classes: int
    pretrained_cfg: dict[str, Any]

    def __init__(self, info: ModelInfo) -> None:
        """A model without layers, under the names by which timm's tools read a record of it."""
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = info.num_classes, info.num_features, info.in_chans
        self.head_hidden_size, self.classifier_names = info.head_hidden_size, info.classifier_names
        self.pretrained_cfg = self.default_cfg = {**info.pretrained_cfg, "architecture": self.architecture}
        self._model_args, self._traits, self._no_weight_decay = info.model_args, info.traits, info.no_weight_decay
        self._macs: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def info(self) -> ModelInfo:
        """A copy of the model's record, for a model that is made of this one."""
        return ModelInfo(
            self.num_classes,
            self.num_features,
            self.head_hidden_size,
            self.in_chans,
            self.classifier_names,
            self.pretrained_cfg,
            self._model_args,
            self._no_weight_decay,
            self._traits,
        ).copy()

    # --- what a kind of network must say of itself ------------------------------------------------------------------

    @property
    @abstractmethod
    def prediction_weights(self) -> PredictionWeights:
        """How the leaves' logits become the predictions of every depth."""

    @abstractmethod
    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Logits (N, classes) of a depth, or (N, leaves, classes) of each leaf; nothing else is computed."""

    @abstractmethod
    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions that sharpen leaf by leaf; rows to go on with may be sent."""

    @abstractmethod
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> AdaptiveBase:
        """A model of its own with only what a depth (or the first `leaves`) needs."""

    @abstractmethod
    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates of the first leaves (all by default) for one image of size (C, H, W)."""

    @abstractmethod
    def parameter_counts(self) -> tuple[int, ...]:
        """Parameters that each depth reads."""

    @abstractmethod
    def backbone_parts(self) -> Iterator[nn.Module]:
        """The modules that hold the backbone's weights, each under its names."""

    # --- depths -----------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> tuple[int, ...]:
        """Leaves evaluated at depths 0, 1, ..."""
        return self.prediction_weights.sizes

    @property
    def leaves(self) -> int:
        """How many leaves there are."""
        return self.sizes[-1]

    @property
    def depths(self) -> int:
        """How many depths there are."""
        return len(self.sizes)

    def leaves_at(self, depth: int | None = None, leaves: int | None = None) -> int:
        """How many leaves a request runs: those of a depth, a plain number, or all.

        Raises:
            ValueError: both are given, or one is out of range.
        """
        if depth is not None and leaves is not None:
            raise ValueError(f"give depth or leaves, not both (got depth={depth}, leaves={leaves}).")
        if depth is not None and not 0 <= depth < self.depths:
            raise ValueError(f"depth must be from 0 to {self.depths - 1} for {self.leaves} leaves, got {depth}.")
        if leaves is not None and not 1 <= leaves <= self.leaves:
            raise ValueError(f"leaves must be from 1 to {self.leaves}, got {leaves}.")
        if depth is not None:
            return self.sizes[depth]
        return self.leaves if leaves is None else leaves

    # --- cost -------------------------------------------------------------------------------------------------------

    def macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Multiply-accumulates of every depth for one image of size (C, H, W).

        Examples:
            >>> import timm, hierens
            >>> model = hierens.hierensify(timm.create_model("resnet10t", num_classes=10), blocks=2)
            >>> len(model.macs((3, 64, 64))) == model.depths == 2
            True
        """
        return tuple(self.cost(leaves, size) for leaves in self.sizes)

    def _counted(
        self, size: tuple[int, ...] | None, count: Callable[[tuple[int, ...]], tuple[int, ...]]
    ) -> tuple[int, ...]:
        """MACs for one image of a size (C, H, W), by default that of the model's images, counted once."""
        size = tuple(size or self.pretrained_cfg["input_size"])
        if (known := self._macs.get(size)) is None:
            with _COUNTING:  # threads that ask for the same wait, rather than all count
                if (known := self._macs.get(size)) is None:
                    known = self._macs[size] = count(size)
        return known

    # --- a timm model to timm's tools -------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def break_symmetry(self, noise: float = 0.01, seed: int = 0) -> None:
        """Tell leaves with equal weights apart, where there are any."""

    def _count_classes(self, num_classes: int) -> None:
        """Note how many classes new classifiers have; names of other classes are forgotten."""
        if num_classes != self.num_classes:
            forget_labels(self)
        self.num_classes = num_classes
        self._macs.clear()

    def _prepared(self, x: Tensor) -> Tensor:
        """Images as the first block takes them."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (N, {self.in_chans}, H, W), got a tensor of shape {tuple(x.shape)}.")
        return x

    def _no_logits(self, x: Tensor, leaves: int, reduce: bool) -> Tensor:
        """What `forward` returns for a batch of no images, which many backbones cannot run."""
        return x.new_empty(0, *(() if reduce else (leaves,)), self.num_classes or self.head_hidden_size)

    def _walk_of_none(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """What `anytime` yields for such a batch."""
        logits = self._no_logits(x, 1, reduce=True)
        for leaves in range(1, self.leaves + 1):
            yield Step(leaves, logits, self.cost(leaves, tuple(x.shape[1:])), logits)

    # --- saving -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """Plain values from which timm's entry point makes the model again."""
        return {**self._model_args, "num_classes": self.num_classes, "in_chans": self.in_chans}

    def fold_norms(self) -> AdaptiveBase:
        """This model for inference, batch norms folded into the convolutions before them, where that can be done.

        Itself, changed, or another in its place: for copies that nobody else holds.
        """
        return self


def statistics_once(level: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """For gradient checkpointing: the recomputation must not move running statistics a second time."""

    @contextlib.contextmanager
    def restoring() -> Iterator[None]:
        kept = [(buffer, buffer.clone()) for buffer in level.buffers()]
        try:
            yield  # left by an exception once all that is needed has been recomputed
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    return lambda: (contextlib.nullcontext(), restoring())


def classifier_maker(old: nn.Module, features: int) -> Callable[[int], nn.Module]:
    """Makes linear classifiers like an old one, for other numbers of classes.

    Raises:
        ValueError: the old one is not linear.
    """
    if not isinstance(old, (nn.Linear, nn.Identity)):
        raise ValueError(f"only a linear classifier can be reset, not a {type(old).__name__}.")
    bias = old.bias is not None if isinstance(old, nn.Linear) else True

    def make(num_classes: int) -> nn.Module:
        layer = nn.Linear(features, num_classes, bias=bias)
        nn.init.uniform_(layer.weight, -1 / math.sqrt(features), 1 / math.sqrt(features))
        return layer

    return make
