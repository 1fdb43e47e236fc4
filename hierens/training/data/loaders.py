"""Creates loaders from a data set's name, with timm's factories.

The random numbers of a sample's augmentation depend only on the seed, the epoch and the sample: not on where a run was
resumed, nor, except for streams, on the number of workers or processes.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm.data
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from hierens.core.install import install_command
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
from hierens.training.data.transforms import create_transform
from hierens.training.data.unreadable import Unreadable

BUILT_IN = tuple(CLASSES)
_STREAMED = ("wds/", "hfids/")
_HOSTED = ("hfds/", *_STREAMED)  # their readers find the data themselves


def create_loaders(
    config: DataConfig, batch_size: int, val_batch_size: int, seed: int = 0, cpu: bool = False
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of (images (N, C, H, W), targets (N,)) for training, shuffled, and for validation.

    Streams are divided over processes by their readers. Their loaders are marked as prepared, so that Accelerate does
    not change them, and in training every process gets the same number of batches.

    Args:
        config: the data.
        batch_size: images per training micro-batch, over all processes together.
        val_batch_size: images per validation step, over all processes together.
        seed: of the augmentation and of a stream's order; in other data, Accelerate's sampler draws the order.
        cpu: whether training uses the CPU even if an accelerator is available. For a stream, the process group is
            created here.

    Raises:
        ValueError: data are missing, empty, damaged or fewer than a batch, or a stream has too few shards.
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
    """Training and validation data with their transforms, before batching; for a stream, timm's data sets.

    Validation labels are numbered as in training. It warns about classes without images and about lost colours.

    Raises:
        ValueError: data are missing, empty or damaged; an unknown name; the same images in both splits; classes in
            validation that training lacks.
    """
    train_folder, val_folder = _folder(config, "train_split"), _folder(config, "val_split")
    if train_folder and val_folder:
        check_folders(train_folder, val_folder)
    train = _dataset(config, config.train_split, True, train_folder)
    val = _dataset(config, config.val_split, False, val_folder)
    _check_disjoint(config, train, val)
    if isinstance(val, StoredImages) and val.classes and train.classes:
        val.renumber(train.classes, match_classes(val.classes, train.classes, config.val_split, "training"))
    _warn_of_lost_colours(config, train)
    return train, val


def create_held_out(config: DataConfig, classes: Sequence[str] | int | None = None) -> Any:
    """The validation data alone, as from `create_datasets`, for an existing model.

    Args:
        config: the data.
        classes: the model's class names, by which the labels of image folders are numbered; or the number of classes,
            if the model has no names.

    Raises:
        ValueError: data are missing, empty or damaged; an unknown name; folders of other classes than the model's.
    """
    folder = _folder(config, "val_split")
    if folder:
        check_folder(folder)
    dataset = _dataset(config, config.val_split, False, folder)
    if folder and classes:
        dataset.renumber(*match_model(dataset.classes, classes, folder))
    _warn_of_lost_colours(config, dataset)
    return dataset


def data_signature(loader: Any) -> dict[str, int]:
    """What the order of a loader's samples depends on besides seed and epoch; it must not change in a resumed run.

    Returns:
        `processes` and `workers` for a stream; nothing for other data.
    """
    return dict(getattr(loader.dataset, "signature", {}))


def check_division(batch_size: int, val_batch_size: int, processes: int) -> None:
    """Check that micro-batches can be divided over processes.

    Raises:
        ValueError: they cannot.
    """
    for name, size in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
        if size % processes:
            raise ValueError(f"{name}: {size} images per micro-batch cannot be divided over {processes} processes.")


def class_names(dataset: Any) -> list[str] | None:
    """The class names of a data set of `create_datasets` or of a loader's `dataset`, if it has any."""
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
    """The number of classes of a data set of `create_datasets` or of a loader's `dataset`.

    Raises:
        ValueError: it is unknown.
    """
    if names := class_names(dataset):
        return len(names)
    if isinstance(dataset, SeededDataset | HeldOutDataset):
        return count_classes(dataset.dataset)
    if isinstance(dataset, ArrayImages):
        return int(dataset.labels.max()) + 1
    raise ValueError("the data set's number of classes is unknown: give num_classes.")


def _stream_loaders(
    config: DataConfig, batch_size: int, val_batch_size: int, seed: int, state: PartialState
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """As `create_loaders`; the process group must exist, since timm's readers select their shards by it."""
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
    prepared._is_accelerate_prepared = True  # otherwise Accelerate would divide the batches again
    return prepared


def _counter(config: DataConfig) -> Unreadable:
    return Unreadable(config.workers, config.max_unreadable)


def _check_size(images: int, batch_size: int) -> None:
    if images < batch_size:
        raise ValueError(f"the training set has {images} images, fewer than one batch of {batch_size}.")


def _folder(config: DataConfig, field: str) -> str | None:
    """The folder of a split, if the data set is an image folder."""
    if not _in_folders(config):
        return None
    _check_directory(config)
    return split_folder(config.data_dir, getattr(config, field), field)


def _in_folders(config: DataConfig) -> bool:
    return config.dataset not in BUILT_IN and is_folder(config.dataset)


def _check_disjoint(config: DataConfig, train: Any, val: Any) -> None:
    """Check that the splits of a named data set do not share images; image folders are checked by `check_folders`."""
    splits = config.train_split, config.val_split
    if config.dataset.startswith("wds/"):
        same = not set(train.reader.split_info.filenames).isdisjoint(val.reader.split_info.filenames)
    elif config.dataset.startswith("torch/"):  # for timm, any name that is not one of training means the test set
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


def _dataset(config: DataConfig, split: str, training: bool, folder: str | None) -> Any:
    """A split with its transform; for training it is augmented and, if it is a stream, shuffled."""
    transform = create_transform(config, training)
    mode = "L" if config.input_size[0] == 1 else "RGB"
    if config.dataset in BUILT_IN:
        images, labels = read_built_in(config, split)
        names = CLASSES[config.dataset]
        classes = names if labels.max() < len(names) else None
        return ArrayImages(images, labels, mode, transform, classes, fixed=not training or _is_fixed(config))
    dataset = _timm_dataset(config, split, training, mode, folder)
    if config.dataset.startswith(_STREAMED):
        dataset.transform = transform
        return dataset
    return StoredImages(dataset, create_decoder(config), transform, class_names(dataset))


def _is_fixed(config: DataConfig) -> bool:
    """Whether the transform for training draws no random numbers."""
    return config.augment == "none" and not config.random_erasing


def _check_directory(config: DataConfig) -> None:
    name, root = config.dataset, Path(config.data_dir)
    if not config.data_dir:
        raise ValueError(f"data_dir is needed, the folder that holds {name or 'the images'}.")
    if not root.is_dir():
        raise ValueError(f"the data directory {root} does not exist: set data_dir to the folder that holds the images.")
    if not any(root.iterdir()):
        raise ValueError(f"the data directory {root} is empty: it must hold a folder per split or class.")


def _timm_dataset(config: DataConfig, split: str, training: bool, mode: str, folder: str | None) -> Any:
    name, root = config.dataset, folder or config.data_dir
    for prefix, package in (("wds/", "webdataset"), ("hfds/", "datasets"), ("hfids/", "datasets")):
        if name.startswith(prefix) and find_spec(package) is None:
            raise ValueError(f"{name} needs the package {package}: {install_command('data')}.")
    if name.startswith("tfds/"):
        raise ValueError(f"{name} cannot be resumed exactly, so it is not supported: use hfds/, hfids/ or wds/.")
    if not name.startswith(_HOSTED) or (name.startswith("wds/") and ":" not in config.data_dir):
        _check_directory(config)
    options: dict[str, Any] = {}
    if name.startswith(_STREAMED):
        options["num_samples"] = config.num_samples
    if name.startswith("wds/"):
        options["input_key"] = "jpg;jpeg;png;webp"
    if folder:
        options["search_split"] = False  # otherwise timm reads the whole root if the split is missing
    try:
        dataset = timm.data.create_dataset(
            name, root=root or None, split=split, is_training=training, input_img_mode=mode, **options
        )
    except Exception as error:
        raise ValueError(f"timm cannot read the data set {name!r} in {root} ({split} split): {error}") from error
    if isinstance(dataset, Sized) and not name.startswith(_STREAMED) and len(dataset) == 0:
        raise ValueError(
            f"the data directory {root} holds no images in its {split} split: it must hold a folder per class."
        )
    return dataset
