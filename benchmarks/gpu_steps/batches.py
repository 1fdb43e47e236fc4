"""Images in the memory of the training device, so that data loading does not limit the speed.

A data set of small images fits into the memory of any GPU. Crops and flips are those of `crop_flip` in
hierens.training.data.loaders. They are drawn for a whole epoch from the seed and the epoch, and applied to batches on
the device. As in hierens, the augmentation of a sample depends only on (seed, epoch, sample).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpu_steps.packing import Split
from hierens.training.config import DataConfig
from hierens.training.randomness import seed_of


def _nothing(*_: Any) -> None:
    pass


class DeviceImages(Dataset[Any]):
    """Images as bytes on a device, where batches are cropped, flipped and normalised.

    Args:
        split: the images, in the model's input size.
        config: mean, std, pad and hflip of `crop_flip`.
        device: device of the images.
        seed: seed of the augmentation.
        training: whether to augment; otherwise images are only normalised.
        before_batch: called before every batch.
        before_epoch: called before every epoch with its number, from 0.
    """

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        device: torch.device,
        seed: int = 0,
        training: bool = False,
        before_batch: Callable[[], None] = _nothing,
        before_epoch: Callable[[int], Any] = _nothing,
    ) -> None:
        images = torch.from_numpy(split.images).permute(0, 3, 1, 2)
        if tuple(images.shape[1:]) != config.input_size:
            raise ValueError(f"the model takes images of {config.input_size}, these are {tuple(images.shape[1:])}.")
        self.classes, self.labels = split.classes, torch.from_numpy(split.labels).to(device)
        self.pad = config.pad if training else 0
        self.images = F.pad(images, (self.pad,) * 4).contiguous().to(device)  # (N, C, H + 2 pad, W + 2 pad)
        self.size, self.hflip = config.input_size[1:], config.hflip if training else 0.0
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (config.mean, config.std))
        self.seed, self.before_batch, self.before_epoch = seed, before_batch, before_epoch
        self._draw(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the following batches."""
        self.before_epoch(epoch)
        self._draw(epoch)

    def _draw(self, epoch: int) -> None:
        generator, count = torch.Generator().manual_seed(seed_of(self.seed, epoch)), len(self)
        corners = torch.randint(0, 2 * self.pad + 1, (2, count), generator=generator)
        flips = torch.rand(count, generator=generator) < self.hflip
        self.corners, self.flips = corners.to(self.labels.device), flips.to(self.labels.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: normalised images (N, C, H, W) and labels (N,), on the device."""
        self.before_batch()
        device, (height, width) = self.labels.device, self.size
        chosen = torch.tensor(indices)
        if device.type == "cuda":  # pinned memory, so that the copy does not wait for the previous step
            chosen = chosen.pin_memory().to(device, non_blocking=True)
        top, left = self.corners[:, chosen].unsqueeze(-1)  # (N, 1) each
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        columns = torch.where(self.flips[chosen, None], width - 1 - columns, columns)  # (N, W)
        channels = torch.arange(self.images.shape[1], device=device)
        pixels = self.images[
            chosen[:, None, None, None],
            channels[:, None, None],
            (top + rows)[:, None, :, None],
            (left + columns)[:, None, None, :],
        ]
        return pixels.float().div(255).sub(self.mean).div(self.std), self.labels[chosen]


def loader(images: DeviceImages, batch_size: int, training: bool) -> DataLoader[Any]:
    """A loader for hierens' trainer that fetches whole batches in the same process."""
    return DataLoader(images, batch_size, shuffle=training, drop_last=training, collate_fn=_whole)


def _whole(batch: Any) -> Any:
    return batch
