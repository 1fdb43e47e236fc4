"""Training with different crops and flips for the two halves of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_steps.batches import DeviceImages
from torch import Tensor

from hierens.training.trainer import Trainer


class TwoViews(DeviceImages):
    """Batches of images (N, 2 C, H, W): two augmentations of each, stacked along the channels."""

    def __init__(self, split: Any, config: Any, device: torch.device, seed: int, training: bool) -> None:
        self.second = DeviceImages(split, config, device, seed + 1_000_003, training)
        super().__init__(split, config, device, seed, training)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the following batches."""
        super().set_epoch(epoch)
        self.second.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch of both views, and labels (N,)."""
        images, labels = super().__getitems__(indices)
        return torch.cat([images, self.second.__getitems__(indices)[0]], 1), labels


class TwoViewTrainer(Trainer):
    """Trains the first half of the leaves, below the first branch of level 1, on one view and the rest on the other.

    Both views pass through the whole tree, and half of each result is discarded. This costs twice as much as splitting
    the batch at level 1 and gives the same gradients. Running statistics include both views.
    """

    def leaf_logits(self, images: Tensor) -> Tensor:
        """Leaf logits (N, leaves, classes)."""
        both = [super(TwoViewTrainer, self).leaf_logits(view) for view in images.chunk(2, 1)]
        half = both[0].shape[1] // 2
        return torch.cat([both[0][:, :half], both[1][:, half:]], 1)
