"""Mixup, cutmix and label smoothing: timm's, drawing the same for a step however the run came to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from hierens.training.config import TrainConfig
from hierens.training.randomness import random_numbers_of


class Mixing:
    """Turns a batch and its labels into what the objective takes.

    Mixed images belong to two classes, so their targets are probabilities. The supervised terms take those; the
    distilled terms never see them: their teacher is what the full ensemble says of the very image that was mixed, so
    that small ensembles learn its answer there, not a mixture of its answers elsewhere.

    Args:
        config: `mixup`, `cutmix`, `mix_...` and `label_smoothing`.
        num_classes: that targets are spread over.

    Raises:
        ValueError: a micro-batch of an odd number of images that are mixed in pairs, found when the first one comes.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.smoothing, self.num_classes, self.off_epoch = config.label_smoothing, num_classes, config.mix_off_epoch
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mix_probability,
                switch_prob=config.mix_switch_probability,
                mode=config.mix_mode,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (N, C, H, W); not changed.
            targets: class indices (N,).
            epoch: from 0.
            seed: of what is drawn.

        Returns:
            Images, and targets as probabilities (N, classes); both as they came if there is nothing to do.
        """
        if self.mixup is None or (self.off_epoch and epoch >= self.off_epoch):
            return images, self._smoothed(targets) if self.smoothing else targets
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix pair the images of a micro-batch: {len(images)} is odd.")
        with random_numbers_of(seed):
            mixed, soft = self.mixup(images.clone(), targets)
        return mixed, soft

    def _smoothed(self, targets: Tensor) -> Tensor:
        hard = F.one_hot(targets, self.num_classes).to(torch.float32)
        return hard * (1 - self.smoothing) + self.smoothing / self.num_classes
