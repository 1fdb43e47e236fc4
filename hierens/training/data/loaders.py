"""From a data set's name to loaders, by timm's factories.

Whatever a sample's augmentation draws at random depends only on the seed, the epoch and the sample: not on where a run
was resumed, nor, unless samples come as a stream, on the number of workers or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm.data
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from hierens.training.config import DataConfig
from hierens.training.data.builtin import CLASSES, read_built_in
from hierens.training.data.colour import warn_of_lost_colours
from hierens.training.data.decoding import create_decoder
from hierens.training.data.images import ArrayImages, HeldOutDataset, SeededDataset, StoredImages
from hierens.training.data.splits import (
    check_folder,
    check_folders,
    is_folder,
    match_classes,
    match_model,
    split_folder,
)
from hierens.training.data.streams import Stream, TrainStream
from hierens.training.data.unreadable import Unreadable

BUILT_IN = tuple(CLASSES)
_STREAMED = ("wds/", "hfids/")
_HOSTED = ("hfds/", *_STREAMED)  # their readers find the data by themselves


def create_loaders(
    config: DataConfig, batch_size: int, val_batch_size: int, seed: int = 0, cpu: bool = False
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of (images (N, C, H, W), targets (N,)) for training, shuffled, and for validation.

    Streams are divided over processes by their readers, so their loaders come prepared for Accelerate, which leaves
    them as they are, and in training with as many batches for every process.

    Args:
        config: the data.
        batch_size: images per training micro-batch, over all processes together.
        val_batch_size: images per validation step, over all processes together.
        seed: of the augmentation and of a stream's order; else the order is drawn by the sampler that Accelerate puts
            in.
        cpu: whether training is on the CPU even where an accelerator is to hand; several processes that read a stream
            are made known to each other here.

    Raises:
        ValueError: data that is missing, empty, damaged or smaller than a batch, or a stream with too few shards.
    """
    if config.dataset.startswith(_STREAMED):
        return _stream_loaders(config, batch_size, val_batch_size, seed, PartialState(cpu=cpu))
    train, val = create_datasets(config)
    if isinstance(train, Sized):
        _check_size(len(train), batch_size)
    common: dict[str, Any] = {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    train = SeededDataset(train, seed, _counter(config))
    val = HeldOutDataset(val, config.input_size, _counter(config))
    train_loader = DataLoader(train, batch_size, shuffle=True, drop_last=True, **common)
    return train_loader, DataLoader(val, val_batch_size, **common)


def create_datasets(config: DataConfig) -> tuple[Any, Any]:
    """Training and validation data with their transforms, before batching; of a stream, timm's data sets.

    Classes have the numbers that they have in training. Warnings name classes without images, and lost colours.

    Raises:
        ValueError: data that is missing, empty or damaged, or an unknown name; the same images in both splits; classes
            in validation that training lacks.
    """
    places = _folder(config, "train_split"), _folder(config, "val_split")
    if places[0] and places[1]:
        check_folders(places[0], places[1])
    train = _dataset(config, config.train_split, True, places[0])
    val = _dataset(config, config.val_split, False, places[1])
    _check_apart(config, train, val)
    if isinstance(val, StoredImages) and val.classes and train.classes:
        val.renumber(train.classes, match_classes(val.classes, train.classes, config.val_split, "training"))
    _warn_of_lost_colours(config, train)
    return train, val


def create_held_out(config: DataConfig, classes: Sequence[str] | int | None = None) -> Any:
    """The validation data alone, as `create_datasets` makes them, for a model that is there already.

    Args:
        config: the data.
        classes: of the model, by name: image folders get their numbers. Or how many, of a model that names none.

    Raises:
        ValueError: data that is missing, empty or damaged, or an unknown name; folders of other classes than the
            model's.
    """
    place = _folder(config, "val_split")
    if place:
        check_folder(place)
    dataset = _dataset(config, config.val_split, False, place)
    if place and classes:
        dataset.renumber(*match_model(dataset.classes, classes, place))
    _warn_of_lost_colours(config, dataset)
    return dataset


def data_signature(loader: Any) -> dict[str, int]:
    """What the order of a loader's samples depends on beside seed and epoch: a resumed run must have the same.

    Returns:
        `processes` and `workers` for a stream; nothing for data by index, whose order depends on neither.
    """
    return dict(getattr(loader.dataset, "signature", {}))


def check_division(batch_size: int, val_batch_size: int, processes: int) -> None:
    """See that micro-batches divide over processes.

    Raises:
        ValueError: they do not.
    """
    for name, size in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
        if size % processes:
            raise ValueError(f"{name}: {size} images per micro-batch do not divide over {processes} processes.")


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


def class_names(dataset: Any) -> list[str] | None:
    """The classes of a data set of `create_datasets` or a loader's `dataset` by name, if it names them."""
    if isinstance(dataset, SeededDataset | HeldOutDataset):
        return class_names(dataset.dataset)
    for owner in (getattr(dataset, "reader", None), dataset):
        if classes := getattr(owner, "classes", None):
            return [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes]
        for attribute in ("class_to_idx", "class_name_to_idx"):
            if numbers := getattr(owner, attribute, None):
                by_number = {number: str(name) for name, number in numbers.items()}
                return [by_number.get(number, str(number)) for number in range(max(by_number) + 1)]
    return None


def count_classes(dataset: Any) -> int:
    """How many classes a data set of `create_datasets` or a loader's `dataset` has.

    Raises:
        ValueError: it does not say.
    """
    if names := class_names(dataset):
        return len(names)
    if isinstance(dataset, SeededDataset | HeldOutDataset):
        return count_classes(dataset.dataset)
    if isinstance(dataset, ArrayImages):
        return int(dataset.labels.max()) + 1
    raise ValueError("the data set does not say how many classes it has: give num_classes.")


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


def _stream_loaders(
    config: DataConfig, batch_size: int, val_batch_size: int, seed: int, state: PartialState
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """As `create_loaders`; the process group must exist, since timm's readers ask it which shards are theirs."""
    processes = state.num_processes
    check_division(batch_size, val_batch_size, processes)
    train, val = create_datasets(config)
    _check_size(train.reader.num_samples, batch_size)
    decode = create_decoder(config)
    train_stream = TrainStream(
        train.reader, decode, train.transform, config.workers, seed, _counter(config), batch_size // processes
    )
    val_stream = Stream(val.reader, decode, val.transform, config.workers, seed, _counter(config))
    train_loader = _stream_loader(train_stream, batch_size // processes, config, state, drop_last=True)
    return train_loader, _stream_loader(val_stream, val_batch_size // processes, config, state)


def _stream_loader(stream: Stream, batch_size: int, config: DataConfig, state: PartialState, **options: Any) -> Any:
    pin = torch.cuda.is_available()
    loader = DataLoader(stream, batch_size, num_workers=config.workers, pin_memory=pin, **options)
    prepared = prepare_data_loader(
        loader, state.device, num_processes=1, process_index=0, dispatch_batches=False, put_on_device=True
    )
    prepared._is_accelerate_prepared = True  # or Accelerate would divide once more what has been divided
    return prepared


def _counter(config: DataConfig) -> Unreadable:
    return Unreadable(config.workers, config.max_unreadable)


def _check_size(images: int, batch_size: int) -> None:
    if images < batch_size:
        raise ValueError(f"the training set has {images} images, fewer than one batch of {batch_size}.")


def _folder(config: DataConfig, field: str) -> str | None:
    """Where a split lies, if the data set is an image folder."""
    if not _in_folders(config):
        return None
    _check_directory(config)
    return split_folder(config.data_dir, getattr(config, field), field)


def _in_folders(config: DataConfig) -> bool:
    return config.dataset not in BUILT_IN and is_folder(config.dataset)


def _check_apart(config: DataConfig, train: Any, val: Any) -> None:
    """See that the splits of a data set by name are not of the same images; folders have been looked at by then."""
    splits = config.train_split, config.val_split
    if config.dataset.startswith("wds/"):
        same = not set(train.reader.split_info.filenames).isdisjoint(val.reader.split_info.filenames)
    elif config.dataset.startswith("torch/"):  # all but the names of training mean the test set to timm
        parts = [getattr(data.dataset, "train", name) for data, name in zip((train, val), splits, strict=True)]
        same = parts[0] == parts[1]
    else:
        same = splits[0] == splits[1]
    if same and not _in_folders(config):
        raise ValueError(
            f"training and validation images are the same: train_split {splits[0]!r} and val_split {splits[1]!r} of "
            f"{config.dataset} share images."
        )


def _warn_of_lost_colours(config: DataConfig, dataset: Any) -> None:
    if config.input_size[0] != 1:
        return
    if isinstance(dataset, StoredImages):
        warn_of_lost_colours(dataset.dataset)
    elif isinstance(dataset, ArrayImages):
        warn_of_lost_colours([(Image.fromarray(image),) for image in dataset.images[:8]])


def _dataset(config: DataConfig, split: str, training: bool, place: str | None) -> Any:
    """A split with its transform: augmented and, if a stream, shuffled for training; `place` is an image folder's."""
    transform = create_transform(config, training)
    mode = "L" if config.input_size[0] == 1 else "RGB"
    if config.dataset in BUILT_IN:
        images, labels = read_built_in(config, split)
        names = CLASSES[config.dataset]
        return ArrayImages(images, labels, mode, transform, names if labels.max() < len(names) else None)
    dataset = _timm_dataset(config, split, training, mode, place)
    if config.dataset.startswith(_STREAMED):
        dataset.transform = transform
        return dataset
    return StoredImages(dataset, create_decoder(config), transform, class_names(dataset))


def _check_directory(config: DataConfig) -> None:
    name, root = config.dataset, Path(config.data_dir)
    if not config.data_dir:
        raise ValueError(f"data_dir is needed, the folder that holds {name or 'the images'}.")
    if not root.is_dir():
        raise ValueError(f"the data directory {root} does not exist: give data_dir the folder that holds the images.")
    if not any(root.iterdir()):
        raise ValueError(f"the data directory {root} is empty: it should hold a folder per split or class.")


def _timm_dataset(config: DataConfig, split: str, training: bool, mode: str, place: str | None) -> Any:
    name, root = config.dataset, place or config.data_dir
    for prefix, package in (("wds/", "webdataset"), ("hfds/", "datasets"), ("hfids/", "datasets")):
        if name.startswith(prefix) and find_spec(package) is None:
            raise ValueError(f"{name} is read by the package {package}: pip install 'hierens[data]'.")
    if name.startswith("tfds/"):
        raise ValueError(f"{name} cannot be resumed exactly, so it is not read here: use hfds/, hfids/ or wds/.")
    if not name.startswith(_HOSTED) or (name.startswith("wds/") and ":" not in config.data_dir):
        _check_directory(config)
    options: dict[str, Any] = {}
    if name.startswith(_STREAMED):
        options["num_samples"] = config.num_samples
    if name.startswith("wds/"):
        options["input_key"] = "jpg;jpeg;png;webp"
    if place:
        options["search_split"] = False  # timm would read the whole root where the split is missing
    try:
        dataset = timm.data.create_dataset(
            name, root=root or None, split=split, is_training=training, input_img_mode=mode, **options
        )
    except Exception as error:
        raise ValueError(f"timm cannot read the data set {name!r} in {root} ({split} split): {error}") from error
    if isinstance(dataset, Sized) and not name.startswith(_STREAMED) and len(dataset) == 0:
        raise ValueError(
            f"the data directory {root} holds no images in its {split} split: one folder per class is due."
        )
    return dataset


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ValueError(f"mean and std need 1 or {channels} values for images of {channels} channels, got {values}.")
    return tuple(values) * channels if len(values) == 1 else tuple(values)
