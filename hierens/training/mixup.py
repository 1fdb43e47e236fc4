"""timm's mixup, cutmix and label smoothing, with random numbers that depend on the step alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from hierens.training.config import TrainConfig
from hierens.training.randomness import seeded


class Mixing:
    """Mixes a batch and its labels.

    Mixed images belong to two classes, so their targets are probabilities, which the supervised terms use. Distillation
    terms do not: their target is the full ensemble's prediction for the mixed image, not a mixture of its predictions
    for the original images.

    Args:
        config: `mixup`, `cutmix`, `mix_...` and `label_smoothing`.
        num_classes: of the targets.

    Raises:
        ValueError: a micro-batch to be mixed in pairs has an odd number of images (raised at the first batch).
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
            images: (N, C, H, W); unchanged.
            targets: class indices (N,).
            epoch: from 0.
            seed: of the random numbers.

        Returns:
            Images, and targets as probabilities (N, classes); both unchanged if nothing is mixed or smoothed.
        """
        if self.mixup is None or (self.off_epoch and epoch >= self.off_epoch):
            return images, self._smoothed(targets) if self.smoothing else targets
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix pair the images of a micro-batch: {len(images)} is odd.")
        with seeded(seed):
            mixed, soft = self.mixup(images.clone(), targets)
        return mixed, soft

    def _smoothed(self, targets: Tensor) -> Tensor:
        hard = F.one_hot(targets, self.num_classes).to(torch.float32)
        return hard * (1 - self.smoothing) + self.smoothing / self.num_classes
