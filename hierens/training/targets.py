"""Checks the labels of training batches."""

from __future__ import annotations

import torch
from torch import Tensor

from hierens.core.labels import as_indices, out_of_range


class TargetCheck:
    """Checks that labels are classes of the model.

    On a CPU, a wrong label raises before the step. On an accelerator, reading the labels would wait for the device at
    every step. There, wrong labels are clamped, since an index out of range would end the process without naming the
    sample, and `look`, which is called before anything is logged or saved, raises.

    Args:
        num_classes: of the model.
        at_once: whether to check every batch at once; by default on CPUs.
    """

    def __init__(self, num_classes: int, at_once: bool | None = None) -> None:
        self.num_classes, self.at_once = num_classes, at_once
        self._unseen: list[tuple[str, Tensor]] = []

    def __call__(self, targets: Tensor, what: str) -> Tensor:
        """Labels in the form that the losses take.

        Args:
            targets: class indices (N,) of any integer type, or probabilities (N, classes).
            what: the batch, for the message.

        Returns:
            Class indices as int64; probabilities unchanged.

        Raises:
            ValueError: a label is not a class, or labels have another type.
        """
        if targets.is_floating_point() and targets.shape[1:] == (self.num_classes,):
            return targets
        targets = as_indices(targets, what)
        wrong = (targets < 0) | (targets >= self.num_classes)
        if targets.device.type == "cpu" if self.at_once is None else self.at_once:
            if wrong.any():
                position = int(wrong.nonzero()[0])
                raise out_of_range(position, int(targets[position]), self.num_classes, what)
            return targets
        first = wrong.to(torch.uint8).argmax()
        self._unseen.append((what, torch.stack([wrong.any().long(), first, targets.take(first)])))
        return targets.clamp(0, self.num_classes - 1)

    def look(self) -> None:
        """Check the labels since the last call. It waits for the device.

        Raises:
            ValueError: one of them is not a class.
        """
        if not self._unseen:
            return
        batches, found = zip(*self._unseen, strict=True)
        self._unseen = []
        for what, (wrong, position, label) in zip(batches, torch.stack(found).tolist(), strict=True):
            if wrong:
                raise out_of_range(position, label, self.num_classes, what)
