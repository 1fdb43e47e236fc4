"""The labels of training batches: one that is no class of the model's is named before it does harm."""

from __future__ import annotations

import torch
from torch import Tensor

from hierens.core.labels import as_indices, out_of_range


class TargetCheck:
    """Lets labels through that are classes of the model.

    On a CPU a wrong one raises before the step. On an accelerator, looking at values would wait for the device at every
    step: there wrong labels are clamped, since an index out of range would end the process without a word on the
    sample, and `look`, called before anything is logged or saved, raises.

    Args:
        num_classes: of the model.
        at_once: whether to look at every batch; by default on CPUs.
    """

    def __init__(self, num_classes: int, at_once: bool | None = None) -> None:
        self.num_classes, self.at_once = num_classes, at_once
        self._unseen: list[tuple[str, Tensor]] = []

    def __call__(self, targets: Tensor, what: str) -> Tensor:
        """Labels as the losses take them.

        Args:
            targets: class indices (N,) of any type of whole numbers, or probabilities (N, classes).
            what: the batch, for the message.

        Returns:
            Class indices as int64; probabilities as they are.

        Raises:
            ValueError: a label that is no class, or labels of another type.
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
        """See that no label since the last look was wrong. Waits for the device.

        Raises:
            ValueError: one was.
        """
        if not self._unseen:
            return
        batches, found = zip(*self._unseen, strict=True)
        self._unseen = []
        for what, (wrong, position, label) in zip(batches, torch.stack(found).tolist(), strict=True):
            if wrong:
                raise out_of_range(position, label, self.num_classes, what)
