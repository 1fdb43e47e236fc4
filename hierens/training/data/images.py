"""Map-style data sets of images.

The random numbers of a sample's augmentation depend only on the seed, the epoch and the index, not on the number of
workers or processes, nor on where a run was resumed. An image that cannot be read is replaced in training by another,
drawn with the same seed, and has no class in validation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from torch.utils.data import Dataset

from hierens.core.labels import NO_CLASS
from hierens.training.data.decoding import Source
from hierens.training.data.unreadable import Unreadable, UnreadableImageError
from hierens.training.randomness import seeded

_KEPT_BYTES = 64 * 2**20


class ArrayImages(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory.

    Args:
        images: an array (N, H, W) or (N, H, W, 3) of bytes.
        labels: (N,).
        mode: Pillow's mode of the images that `transform` takes.
        transform: PIL image -> tensor (C, H, W).
        classes: names of the classes, if known.
        fixed: whether the transform draws no random numbers; its results are then kept, up to 64 MiB of them.
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        mode: str,
        transform: Callable[[Image.Image], torch.Tensor],
        classes: Sequence[str] | None = None,
        fixed: bool = False,
    ) -> None:
        self.images, self.labels, self.mode, self.transform = images, labels, mode, transform
        self.classes, self.fixed = classes, fixed
        self._kept: dict[int, torch.Tensor] = {}
        self._room = _KEPT_BYTES if fixed else 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        index = int(index)
        if index in self._kept:
            return self._kept[index].clone(), int(self.labels[index])
        image = self.transform(Image.fromarray(self.images[index]).convert(self.mode))
        if image.nbytes <= self._room:
            self._kept[index], self._room = image.clone(), self._room - image.nbytes
        return image, int(self.labels[index])


class StoredImages(Dataset[tuple[torch.Tensor, int]]):
    """Transformed images of a map-style data set of timm or torchvision.

    timm's own class replaces an image that it cannot read by a neighbour, with only a warning. This one raises.

    Args:
        dataset: the data set; its own transform is removed.
        decode: a file or a PIL image -> a PIL image as input of the model.
        transform: PIL image -> tensor (C, H, W).
        classes: names of the classes, if known.
    """

    def __init__(
        self,
        dataset: Any,
        decode: Callable[[Source], Image.Image],
        transform: Callable[[Image.Image], torch.Tensor],
        classes: Sequence[str] | None = None,
    ) -> None:
        self.dataset, self.decode, self.transform, self.classes = dataset, decode, transform, classes
        self._numbers: Sequence[int] | None = None
        dataset.transform = None
        if hasattr(dataset, "loader"):  # torchvision's own ignores 16-bit values and orientation
            dataset.loader = Path

    def renumber(self, classes: Sequence[str], numbers: Sequence[int] | None) -> None:
        """Map the labels to other classes: `numbers` has the new label for each of the data set's; None keeps them."""
        self.classes, self._numbers = classes, numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image, target = self._read(index)
        except Exception as error:  # data sets raise all kinds of errors for a missing file
            raise UnreadableImageError(f"{self._name(index)}: {error or type(error).__name__}") from error
        if target is None:
            return self.transform(image), NO_CLASS
        return self.transform(image), target if self._numbers is None else self._numbers[target]

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if not isinstance(self.dataset, timm.data.ImageDataset):
            image, target = self.dataset[index]
            return self.decode(image), target
        file, target, *_ = self.dataset.reader[index]
        with file:
            return self.decode(file), target

    def _name(self, index: int) -> str:
        try:
            if isinstance(self.dataset, timm.data.ImageDataset):
                return str(self.dataset.filename(index, absolute=True))
            return str(self.dataset.samples[index][0])
        except Exception:  # not every data set has file names
            return f"image {index}"


class SeededDataset(Dataset[Any]):
    """A data set whose samples' random numbers depend only on (seed, epoch, index).

    A sample that raises `UnreadableImageError` is counted, and replaced by a random one, drawn with the same seed.

    Args:
        dataset: a map-style data set.
        seed: of the run.
        unreadable: counts the samples.
    """

    def __init__(self, dataset: Any, seed: int, unreadable: Unreadable | None = None) -> None:
        self.dataset, self.seed, self.unreadable = dataset, seed, unreadable or Unreadable()
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that running workers see changes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the samples that are read from now on."""
        self.epoch.fill_(epoch)
        self.unreadable.start()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if getattr(self.dataset, "fixed", False):  # setting the generators takes longer than reading a kept image
            self.unreadable.count_read()
            return self.dataset[index]
        with seeded(self.seed, int(self.epoch), int(index)):
            while True:
                try:
                    sample = self.dataset[index]
                except UnreadableImageError as error:
                    self.unreadable.count_skipped(error)  # raises once too many fail in a row
                    index = random.randrange(len(self))
                else:
                    self.unreadable.count_read()
                    return sample


class HeldOutDataset(Dataset[Any]):
    """A data set for validation, in which an image that cannot be read is blank and has no class.

    Args:
        dataset: a map-style data set.
        input_size: (C, H, W) of the blank image.
        unreadable: counts the samples.
    """

    def __init__(self, dataset: Any, input_size: tuple[int, int, int], unreadable: Unreadable) -> None:
        self.dataset, self.input_size, self.unreadable = dataset, input_size, unreadable

    def set_epoch(self, epoch: int) -> None:
        """Start a new pass. Accelerate calls this."""
        self.unreadable.start()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self.dataset[index]
        except UnreadableImageError as error:
            self.unreadable.count_skipped(error)
            return torch.zeros(self.input_size), NO_CLASS
        self.unreadable.count_read()
        return sample
