"""The interface that trees, multi-exit networks and trees with exits share, and the steps of anytime predictions."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from hierens.core.predictions import PredictionWeights


@dataclass(frozen=True)
class Step:
    """One step of an anytime prediction.

    Attributes:
        leaves: networks (or exits) evaluated so far.
        logits: their combined prediction, (N, classes).
        macs: multiply-accumulates so far, per image.
        newest: logits of the leaf evaluated last, (N, classes).
    """

    leaves: int
    logits: Tensor
    macs: int
    newest: Tensor


@runtime_checkable
class AdaptiveModel(Protocol):
    """A network whose depth is chosen at run time; also a `torch.nn.Module`.

    Policies, calibration and metrics use nothing else of a model.

    Attributes:
        unit: the name of its leaves in tables.
        training: whether it is in training mode.
        num_classes: number of classes.
        pretrained_cfg: timm's description of the model and its preprocessing.
    """

    unit: ClassVar[str]
    training: bool
    num_classes: int
    pretrained_cfg: dict[str, Any]

    @property
    def prediction_weights(self) -> PredictionWeights:
        """How leaf logits become the prediction of each depth."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Leaves evaluated at depths 0, 1, ..."""

    @property
    def leaves(self) -> int:
        """Number of leaves."""

    @property
    def depths(self) -> int:
        """Number of depths."""

    def __call__(self, x: Tensor, depth: int | None = None, leaves: int | None = None, reduce: bool = True) -> Tensor:
        """Logits (N, classes) of a depth, or (N, leaves, classes) of each leaf; no other leaves are computed."""

    def anytime(self, x: Tensor) -> Generator[Step, Tensor | None, None]:
        """Predictions leaf by leaf; the indices of the images to continue with can be sent."""

    def leaves_at(self, depth: int | None = None, leaves: int | None = None) -> int:
        """Leaves that a call with these arguments evaluates."""

    def macs(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Multiply-accumulates of every depth for one image of size (C, H, W)."""

    def cost(self, leaves: int | None = None, size: tuple[int, ...] | None = None) -> int:
        """Multiply-accumulates of the first leaves for one image of size (C, H, W)."""

    def parameter_counts(self) -> tuple[int, ...]:
        """Parameters that each depth reads."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `torch.nn.Module`."""

    def train(self, mode: bool = True) -> Any:
        """See `torch.nn.Module`."""

    def modules(self) -> Iterator[nn.Module]:
        """See `torch.nn.Module`."""
