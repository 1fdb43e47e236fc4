"""`AdaptiveBase`: the base class of all networks whose depth is chosen at run time.

Its leaves are a tree's networks, or the exits of a chain of blocks. Depth b evaluates the first `sizes[b]` leaves and
costs `macs()[b]`. Policies, calibration, metrics, losses, the trainer, profiles and the Hub use only this interface.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from hierens.core.labels import forget_labels
from hierens.core.model_info import ModelInfo
from hierens.core.predictions import PredictionWeights
from hierens.core.protocol import Step
from hierens.core.tree import leaves_at

_CANNOT_TRACE = "cannot trace the choice of a depth: use model.export(directory, format='torch-export')."
_COUNTING = threading.RLock()  # a model may be printed while it is counted


class AdaptiveBase(nn.Module, ABC):
    """A network whose depth is chosen at run time; `hierens.Adaptive` adds saving, export and profiling.

    Attributes:
        levels: its parts in order; training can freeze the first ones.
        num_classes: number of classes.
        num_features: channels that the backbone's classifier reads.
        in_chans: image channels.
        pretrained_cfg: timm's description of the model and its preprocessing.
        gradient_equilibrium: whether shared parts receive the mean, not the sum, of the gradients of the leaves that
            use them; off by default. "all" in a multi-exit network scales all values that cross a cut, where True
            scales those that the exit reads, as IMTA's authors do in MSDNet. See `hierens.core.equilibrium`.
        grad_checkpointing: whether activations are recomputed in the backward pass instead of stored.
    """

    architecture: ClassVar[str]
    """the timm entry point that creates it"""
    unit: ClassVar[str] = "networks"
    """the name of its leaves in tables"""
    symmetric: Any = False
    """whether any two leaves have the same weights"""
    levels: nn.ModuleList
    gradient_equilibrium: bool | Literal["all"] = False
    grad_checkpointing: bool = False
    num_classes: int
    pretrained_cfg: dict[str, Any]

    def __init__(self, info: ModelInfo) -> None:
        """A model without layers, with the attributes that timm's tools read."""
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = info.num_classes, info.num_features, info.in_chans
        self.head_hidden_size, self.classifier_names = info.head_hidden_size, info.classifier_names
        self.pretrained_cfg = self.default_cfg = {**info.pretrained_cfg, "architecture": self.architecture}
        self._model_args, self._traits, self._no_weight_decay = info.model_args, info.traits, info.no_weight_decay
        self._stages = info.stages
        self._macs: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def info(self) -> ModelInfo:
        """A copy of the model's record, for a model derived from this one."""
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
            self._stages,
        ).copy()

    # --- abstract methods -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def prediction_weights(self) -> PredictionWeights:
        """How leaf logits are combined into the prediction of each depth."""

    @abstractmethod
    def forward(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Logits (N, classes) of a depth, or (N, leaves, classes) of each leaf; no other leaves are computed."""

    @abstractmethod
    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions leaf by leaf; the indices of the images to continue with can be sent."""

    @abstractmethod
    def at_depth(self, depth: int | None = None, *, leaves: int | None = None) -> AdaptiveBase:
        """A separate model with only the parts that a depth (or the first `leaves`) needs."""

    @abstractmethod
    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates of the first leaves (all by default) for one image of size (C, H, W)."""

    @abstractmethod
    def parameter_counts(self) -> tuple[int, ...]:
        """Parameters that each depth reads."""

    @abstractmethod
    def backbone_parts(self) -> Iterator[nn.Module]:
        """The modules that contain the backbone's weights, by the backbone's names."""

    # --- depths -----------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> tuple[int, ...]:
        """Leaves evaluated at depths 0, 1, ..."""
        return self.prediction_weights.sizes

    @property
    def leaves(self) -> int:
        """Number of leaves."""
        return self.sizes[-1]

    @property
    def depths(self) -> int:
        """Number of depths."""
        return len(self.sizes)

    def leaves_at(self, depth: int | None = None, leaves: int | None = None) -> int:
        """The number of leaves to run: see `hierens.core.tree.leaves_at`."""
        if isinstance(depth, fx.Proxy):
            raise ValueError(f"torch.fx {_CANNOT_TRACE}")
        return leaves_at(self.sizes, depth, leaves)

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

    def image_size(self, size: tuple[int, ...] | None = None) -> tuple[int, int, int]:
        """The size (C, H, W) of an image, by default that of `pretrained_cfg`.

        Raises:
            ValueError: it is no such size, or has other channels than the model's images.
        """
        found = self.pretrained_cfg["input_size"] if size is None else size
        listed = isinstance(found, (tuple, list)) and len(found) == 3
        if not listed or found[0] != self.in_chans or not all(hasattr(n, "__index__") and n > 0 for n in found):
            raise ValueError(f"size must be ({self.in_chans}, H, W), the model's channels first, got {found!r}.")
        channels, height, width = found
        return channels, height, width

    def _counted(
        self, size: tuple[int, ...] | None, count: Callable[[tuple[int, ...]], tuple[int, ...]]
    ) -> tuple[int, ...]:
        """MACs for one image of size (C, H, W), by default the model's; counted once per size."""
        size = self.image_size(size)
        if (known := self._macs.get(size)) is None:
            with _COUNTING:  # other threads wait instead of counting the same
                if (known := self._macs.get(size)) is None:
                    known = self._macs[size] = count(size)
        return known

    # --- the interface of timm's models -----------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level's activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def _run(self, level: nn.Module, *inputs: Any) -> Any:
        """Call a level, with gradient checkpointing if it is enabled."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(level, *inputs, use_reentrant=False, context_fn=_statistics_once(level))
        return level(*inputs)

    def break_symmetry(self, noise: float = 0.01, seed: int = 0, signs: bool = False) -> None:
        """Make leaves with equal weights different, if there are any."""

    def _count_classes(self, num_classes: int) -> None:
        """Set the number of classes of new classifiers; names of other classes are removed."""
        if num_classes != self.num_classes:
            forget_labels(self)
        self.num_classes = num_classes
        self._macs.clear()

    def _prepared(self, x: Tensor) -> Tensor:
        """Images in the layout of the first block.

        Raises:
            ValueError: they are not a floating-point tensor, or the shape does not fit the model.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            if isinstance(x, fx.Proxy):
                raise ValueError(f"torch.fx {_CANNOT_TRACE}")
            got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(
                f"expected images (N, {self.in_chans}, H, W) as a floating-point tensor, got {got}: prepare them with "
                "timm.data.create_transform(**timm.data.resolve_model_data_config(model))."
            )
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images (N, {self.in_chans}, H, W), got a tensor of shape {tuple(x.shape)}.")
        return x

    def _no_logits(self, x: Tensor, leaves: int, reduce: bool) -> Tensor:
        """The output of `forward` for an empty batch, which many backbones cannot run."""
        shape: Sequence[int] = (self.num_classes or self.head_hidden_size,)
        if not self._model_args.get("backbone"):  # not timm's: there may be logits for every pixel
            with torch.no_grad():
                shape = self.at_depth(leaves=1).eval()(x.new_zeros(1, *x.shape[1:])).shape[1:]
        return x.new_empty(0, *(() if reduce else (leaves,)), *shape)

    def _walk_of_none(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """The steps of `anytime` for an empty batch."""
        logits = self._no_logits(x, 1, reduce=True)
        for leaves in range(1, self.leaves + 1):
            yield Step(leaves, logits, self.cost(leaves, tuple(x.shape[1:])), logits)

    def __prepare_scriptable__(self) -> None:
        raise ValueError(f"TorchScript {_CANNOT_TRACE}")

    # --- saving -----------------------------------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """Plain values from which timm's entry point creates the model again."""
        return {**self._model_args, "num_classes": self.num_classes, "in_chans": self.in_chans}

    def fold_norms(self) -> AdaptiveBase:
        """Fold batch norms into the convolutions before them, where possible; for inference.

        Returns this model, changed, or another in its place. Call it on a copy that is not used elsewhere.
        """
        return self


def _statistics_once(level: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """A `context_fn` for gradient checkpointing: the recomputation does not update running statistics again."""

    @contextlib.contextmanager
    def restoring() -> Iterator[None]:
        kept = [(buffer, buffer.clone()) for buffer in level.buffers()]
        try:
            yield  # left by an exception when the recomputation is complete
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    return lambda: (contextlib.nullcontext(), restoring())


def linear_name(classifier: nn.Module) -> str | None:
    """The name of the linear layer in a classifier, "" if it is one itself; None if there is not exactly one."""
    names = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    return names[0] if len(names) == 1 else None


def linear_names(part: nn.Module, classifiers: Sequence[str]) -> list[str]:
    """The names of the linear layers in classifiers, which are given by their own names in a part of a model."""
    inner = {name: linear_name(part.get_submodule(name)) for name in classifiers}
    return [f"{name}.{own}" if own else name for name, own in inner.items()]


def mean_of_heads(pooled: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Pooled features; those of a distilled backbone, one for each of its classifiers, are averaged as timm does."""
    return torch.stack(pooled).mean(0) if isinstance(pooled, tuple) else pooled


def classifier_maker(old: nn.Module, features: int) -> Callable[[int], nn.Module]:
    """A function that creates classifiers like an old one, for other numbers of classes.

    Raises:
        ValueError: the old classifier does not have exactly one linear layer.
    """
    name = "" if isinstance(old, nn.Identity) else linear_name(old)
    if name is None:
        raise ValueError(f"only a classifier with one linear layer can be reset, not this {type(old).__name__}.")
    bias = getattr(old.get_submodule(name), "bias", True) is not None

    def make(num_classes: int) -> nn.Module:
        layer = nn.Linear(features, num_classes, bias=bias)
        nn.init.uniform_(layer.weight, -1 / math.sqrt(features), 1 / math.sqrt(features))
        if not name:
            return layer
        classifier = copy.deepcopy(old)  # a norm and a linear layer, for example
        for module in classifier.modules():
            if isinstance(module, _NormBase):
                module.reset_parameters()
        classifier.set_submodule(name, layer)
        return classifier

    return make
