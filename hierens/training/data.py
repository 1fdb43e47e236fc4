"""From a data set's name to loaders, by timm's factories; two small data sets of real images are read here.

Whatever a sample's augmentation draws at random depends only on the seed, the epoch and the sample: not on the number
of workers or processes, nor on where a run was resumed.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms as T

from hierens.training.config import DataConfig

BUILT_IN = ("digits", "fashion_mnist")
_HOSTED = ("hfds/", "hfids/", "tfds/", "wds/")  # their readers find the data by themselves
_DIGITS_HELD_OUT = 450


def create_loaders(
    config: DataConfig, batch_size: int, val_batch_size: int, seed: int = 0
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of (images (N, C, H, W), targets (N,)) for training, shuffled, and for validation.

    Args:
        config: the data.
        batch_size: images per training micro-batch, over all processes together.
        val_batch_size: images per validation step, over all processes together.
        seed: of the augmentation; the order is drawn by the sampler that Accelerate puts in.

    Raises:
        ValueError: data that is missing, empty, damaged or smaller than a batch.
    """
    train, val = create_datasets(config)
    if isinstance(train, Sized) and len(train) < batch_size:
        raise ValueError(f"the training set has {len(train)} images, fewer than one batch of {batch_size}.")
    common: dict[str, Any] = {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    if isinstance(train, IterableDataset):
        train_loader = DataLoader(train, batch_size, drop_last=True, **common)
    else:
        train_loader = DataLoader(SeededDataset(train, seed), batch_size, shuffle=True, drop_last=True, **common)
    return train_loader, DataLoader(val, val_batch_size, **common)


def create_datasets(config: DataConfig) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training and validation data with their transforms, before batching.

    Raises:
        ValueError: data that is missing, empty or damaged, or an unknown name.
    """
    pair: list[Dataset[Any]] = []
    for training, split in ((True, config.train_split), (False, config.val_split)):
        transform = create_transform(config, training)
        mode = "L" if config.input_size[0] == 1 else "RGB"
        if config.dataset in BUILT_IN:
            read = _digits if config.dataset == "digits" else _fashion_mnist
            pair.append(ArrayImages(*read(config, training), mode, transform))
        else:
            pair.append(_timm_dataset(config, split, training, mode, transform))
    return pair[0], pair[1]


def create_transform(config: DataConfig, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    """A PIL image -> a normalised tensor (C, H, W)."""
    channels, height, width = config.input_size
    mean, std = (_per_channel(values, channels) for values in (config.mean, config.std))
    if config.augment == "imagenet":
        return timm.data.create_transform(
            config.input_size,
            is_training=training,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            interpolation=config.interpolation,
            crop_pct=config.crop_pct,
            mean=mean,
            std=std,
        )
    steps: list[Any] = [_Fit((height, width), config.pad, T.InterpolationMode(config.interpolation))]
    if training and config.augment == "crop_flip":
        steps.append(T.RandomCrop((height, width), padding=config.pad))
        steps.append(T.RandomHorizontalFlip(config.hflip))
    steps += [T.ToTensor(), T.Normalize(mean, std)]
    if training and config.random_erasing:
        steps.append(timm.data.RandomErasing(config.random_erasing, mode="const", device="cpu"))
    return T.Compose(steps)


def count_classes(dataset: Any) -> int:
    """How many classes a data set of `create_datasets` or a loader's `dataset` has.

    Raises:
        ValueError: it does not say.
    """
    if isinstance(dataset, SeededDataset):
        return count_classes(dataset.dataset)
    if isinstance(dataset, ArrayImages):
        return int(dataset.labels.max()) + 1
    for owner in (getattr(dataset, "reader", None), dataset):
        for attribute in ("class_to_idx", "classes"):
            if named := getattr(owner, attribute, None):
                return len(named)
    raise ValueError("the data set does not say how many classes it has: give num_classes.")


def data_signature(loader: Any) -> dict[str, int]:
    """What the order of a loader's samples depends on besides the seed: nothing, for a map-style data set."""
    if not isinstance(loader.dataset, IterableDataset):
        return {}
    return {"processes": PartialState().num_processes, "workers": int(loader.num_workers)}


class SeededDataset(Dataset[Any]):
    """A data set whose samples draw their random numbers from (seed, epoch, index) alone.

    Args:
        dataset: a map-style data set.
        seed: of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that running workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Samples fetched from now on belong to this epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with _random_numbers_of(hash((self.seed, int(self.epoch), int(index))) % 2**32):
            return self.dataset[index]


class ArrayImages(Dataset[tuple[torch.Tensor, int]]):
    """Images that fit into memory: an array (N, H, W) of bytes and a label each."""

    def __init__(self, images: Any, labels: Any, mode: str, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.labels, self.mode, self.transform = images, labels, mode, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return self.transform(image), int(self.labels[index])


class _Fit:
    """Bring an image to a size: by zero padding if it is just short of it, by resizing otherwise.

    28x28 Fashion-MNIST keeps its pixels in 32x32 this way, as is the custom.
    """

    def __init__(self, size: tuple[int, int], margin: int, interpolation: T.InterpolationMode) -> None:
        self.size, self.margin = size, margin
        self.resize = T.Resize(size, interpolation=interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        short = [wanted - own for wanted, own in zip(self.size, (image.height, image.width), strict=True)]
        if all(0 <= missing <= 2 * self.margin for missing in short):
            top, left = short[0] // 2, short[1] // 2
            return T.functional.pad(image, [left, top, short[1] - left, short[0] - top])
        return self.resize(image)


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """All three generators that augmentations draw from, seeded inside and as they were after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _timm_dataset(config: DataConfig, split: str, training: bool, mode: str, transform: Any) -> Dataset[Any]:
    name, root = config.dataset, Path(config.data_dir)
    if not name.startswith(_HOSTED):
        if not config.data_dir:
            raise ValueError(f"data_dir is needed, the folder that holds {name or 'the images'}.")
        if not root.is_dir():
            raise ValueError(
                f"the data directory {root} does not exist: give data_dir the folder that holds the images."
            )
        if not any(root.iterdir()):
            raise ValueError(f"the data directory {root} is empty: it should hold a folder per split or class.")
    try:
        dataset = timm.data.create_dataset(
            name, root=config.data_dir or None, split=split, is_training=training, input_img_mode=mode
        )
    except Exception as error:
        raise ValueError(f"timm cannot read the data set {name!r} in {root} ({split} split): {error}") from error
    if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(
            f"the data directory {root} holds no images in its {split} split: one folder per class is due."
        )
    dataset.transform = transform
    return dataset


def _digits(config: DataConfig, training: bool) -> tuple[Any, Any]:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels; the same 450 of them are always held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'hierens[demo]'.") from error
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    train_x, val_x, train_y, val_y = train_test_split(
        images, labels, test_size=_DIGITS_HELD_OUT, random_state=0, stratify=labels
    )
    return (train_x, train_y) if training else (val_x, val_y)


def _fashion_mnist(config: DataConfig, training: bool) -> tuple[Any, Any]:
    """The 28x28 images of Fashion-MNIST from its four idx files, plain or gzipped."""
    directory, part = Path(config.data_dir), "train" if training else "t10k"
    if not config.data_dir or not directory.is_dir():
        raise ValueError(
            f"the data directory {config.data_dir!r} does not exist: fashion_mnist needs its idx files there."
        )
    images = _read_idx(directory, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(directory, f"{part}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{directory} has {len(images)} {part} images but {len(labels)} labels.")
    return images, labels


def _read_idx(directory: Path, name: str, dimensions: int) -> Any:
    """An array of bytes in the idx format: two zeros, type 8, the number of dimensions, their sizes, the values."""
    found = [path for path in (directory / name, directory / f"{name}.gz") if path.is_file()]
    if not found:
        raise ValueError(f"the data directory {directory} has neither {name} nor {name}.gz.")
    try:
        data = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{found[0]} is damaged ({error}): download it again.") from error
    if len(data) < 4 + 4 * dimensions or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{found[0]} is no idx file of {dimensions} dimensions of bytes.")
    shape = [int(size) for size in np.frombuffer(data, ">i4", dimensions, 4)]
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if values.size != np.prod(shape) or values.size == 0:
        raise ValueError(f"{found[0]} is truncated: it holds {values.size} values of {int(np.prod(shape))}.")
    return values.reshape(shape)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ValueError(f"mean and std need 1 or {channels} values for images of {channels} channels, got {values}.")
    return tuple(values) * channels if len(values) == 1 else tuple(values)
