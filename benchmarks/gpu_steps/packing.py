"""The steps `pack` and `join`: convert a data set into a few small files and back.

`pack` arranges 1,024 images as one lossless WebP image. CIFAR-100's training images take 85 MB in this form, compared
with 154 MB as bytes and 112 MB as PNG files. Each file names its data set and the number of files, so the files can be
transferred in any order. `join` decodes the files that exist and lists the missing ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from hierens.training.config import DataConfig
from hierens.training.data.loaders import count_classes, create_datasets

SPLITS = ("train", "test")
SIDE = 32  # images along each edge of a WebP image (mosaic)
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Split:
    """A split of a data set in memory.

    Attributes:
        images: bytes (N, H, W, 3).
        labels: class indices (N,).
        classes: names by index.
    """

    images: Any
    labels: Any
    classes: tuple[str, ...]


def read_folders(data_dir: str) -> dict[str, Split]:
    """Training and test images from `train` and `test`, each with a folder per class.

    Raises:
        ValueError: a folder is missing or empty, an image cannot be read, or images have different sizes.
    """
    sets = create_datasets(DataConfig(data_dir=data_dir, val_split="test", augment="none"))
    return {name: _read(found) for name, found in zip(SPLITS, sets, strict=True)}


def _read(dataset: Any) -> Split:
    dataset.transform = np.asarray
    with ThreadPoolExecutor() as pool:
        images, labels = zip(*pool.map(dataset.__getitem__, range(len(dataset))), strict=True)
    if len(shapes := {image.shape for image in images}) > 1:
        raise ValueError(f"all images must be of one size, found {' and '.join(map(str, sorted(shapes)[:2]))}.")
    by_index = {index: name for name, index in dataset.dataset.reader.class_to_idx.items()}
    return Split(
        np.stack(images), np.asarray(labels, np.int64), tuple(by_index[i] for i in range(count_classes(dataset)))
    )


def pack(data: dict[str, Split], folder: Path, megabytes: float) -> list[Path]:
    """Write the files.

    Args:
        data: result of `read_folders`.
        folder: output folder; files of an earlier call are removed.
        megabytes: maximum size of a file.

    Raises:
        ValueError: a file could not hold even one mosaic.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"*-of-*{SUFFIX}"):
        old.unlink()
    identity, files = _identity(data), []
    for name, split in data.items():
        parts = list(_grouped(split, megabytes * 1e6))
        for number, part in enumerate(parts, 1):
            tensors = {f"mosaic-{i:03d}": np.frombuffer(mosaic, np.uint8) for i, (mosaic, _, _) in enumerate(part)}
            start, stop = part[0][1], part[-1][2]
            about = {
                "data": identity,
                "part": f"{number}",
                "parts": f"{len(parts)}",
                "shape": json.dumps(split.images.shape[1:]),
                "classes": json.dumps(split.classes),
                "sha256": _digest(split.images[start:stop]),
            }
            files.append(folder / _name(name, number, len(parts)))
            _save({**tensors, "labels": split.labels[start:stop]}, files[-1], about)
    return files


def _grouped(split: Split, limit: float) -> Iterator[list[tuple[bytes, int, int]]]:
    """Mosaics and their ranges of images, grouped into files."""
    part: list[tuple[bytes, int, int]] = []
    starts = range(0, len(split.images), SIDE**2)
    with ThreadPoolExecutor() as pool:
        mosaics = pool.map(lambda start: _encoded(split.images[start : start + SIDE**2]), starts)
        for start, mosaic in zip(starts, mosaics, strict=True):
            stop = min(start + SIDE**2, len(split.images))
            size = len(mosaic) + 8 * (stop - start) + 4096  # labels and header
            if size > limit:
                raise ValueError(f"{SIDE**2} images take {size / 1e6:.2f} MB: part_megabytes must be larger.")
            if part and sum(len(m) + 8 * (b - a) for m, a, b in part) + size > limit:
                yield part
                part = []
            part.append((mosaic, start, stop))
    yield part


def _encoded(images: Any) -> bytes:
    count, height, width, channels = images.shape
    tiles = np.zeros((SIDE**2, height, width, channels), np.uint8)
    tiles[:count] = images
    mosaic = tiles.reshape(SIDE, SIDE, height, width, channels).swapaxes(1, 2)
    file = io.BytesIO()
    Image.fromarray(mosaic.reshape(SIDE * height, SIDE * width, channels)).save(
        file, "WEBP", lossless=True, quality=50, method=2
    )
    return file.getvalue()


def _decoded(data: bytes, shape: Sequence[int]) -> Any:
    height, width, channels = shape
    mosaic = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return mosaic.reshape(SIDE, height, SIDE, width, channels).swapaxes(1, 2).reshape(-1, height, width, channels)


def _unpacked(mosaics: dict[str, Any], shape: Sequence[int]) -> Any:
    with ThreadPoolExecutor() as pool:
        return np.concatenate(list(pool.map(lambda key: _decoded(mosaics[key].tobytes(), shape), sorted(mosaics))))


def join(packed: Path, folder: Path) -> list[str]:
    """Decode the files in `packed` into `folder`, in addition to those that earlier calls decoded.

    Returns:
        The names of the missing files.

    Raises:
        ValueError: there are no files, or a file is damaged or belongs to another data set.
    """
    found = sorted(packed.glob(f"*-of-*{SUFFIX}"))
    if not found and not list(folder.glob(f"*-of-*{SUFFIX}")):
        raise ValueError(f"no parts in {packed}: copy the files of `pack` to it, or set --packed.")
    for file in found:
        about, tensors = _open(file)
        there = {_open(other, labels=False)[0]["data"]: other for other in folder.glob(f"*-of-*{SUFFIX}")}
        if other := next((other for data, other in there.items() if data != about["data"]), None):
            raise ValueError(f"{file} and {other} belong to different data sets: remove {folder} to join again.")
        labels, images = tensors.pop("labels"), _unpacked(tensors, json.loads(about["shape"]))
        images = images[: len(labels)]  # the last mosaic may be partly empty
        if _digest(images) != about["sha256"]:
            raise ValueError(f"{file} is damaged: its images are not those that were packed. Copy it again.")
        folder.mkdir(parents=True, exist_ok=True)
        _save({"images": images, "labels": labels}, folder / file.name, about)
    return _missing(folder)


def read_joined(folder: Path) -> dict[str, Split]:
    """The images decoded by `join`.

    Raises:
        ValueError: files are missing.
    """
    if missing := _missing(folder):
        raise ValueError(
            f"of the images in {folder}, {', '.join(missing)} are missing: run the steps pack and join, or set "
            "--data-dir to a folder with train/CLASS/ and test/CLASS/."
        )
    data = {}
    for name in SPLITS:
        files = sorted(folder.glob(f"{name}-*{SUFFIX}"), key=lambda file: int(file.stem.split("-")[1]))
        opened = [_open(file) for file in files]
        columns = [np.concatenate([tensors[key] for _, tensors in opened]) for key in ("images", "labels")]
        data[name] = Split(*columns, tuple(json.loads(opened[0][0]["classes"])))
    return data


def _missing(folder: Path) -> list[str]:
    missing = []
    for name in SPLITS:
        files = list(folder.glob(f"{name}-*{SUFFIX}"))
        count = int(files[0].stem.split("-")[-1]) if files else 0
        missing += [] if count else [f"all parts of {name}"]
        missing += [
            expected
            for number in range(1, count + 1)
            if not (folder / (expected := _name(name, number, count))).is_file()
        ]
    return missing


def _open(file: Path, labels: bool = True) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with safe_open(file, "numpy") as part:
            tensors = {key: part.get_tensor(key) for key in part.keys()} if labels else {}  # noqa: SIM118
            return dict(part.metadata()), tensors
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a part ({error}): copy it again.") from error


def _save(tensors: dict[str, Any], file: Path, about: dict[str, str]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    save_file(tensors, partial, about)
    os.replace(partial, file)


def _name(split: str, number: int, count: int) -> str:
    return f"{split}-{number}-of-{count}{SUFFIX}"


def _digest(images: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()


def _identity(data: dict[str, Split]) -> str:
    whole = hashlib.sha256()
    for split in data.values():
        whole.update(np.ascontiguousarray(split.images))
        whole.update(np.ascontiguousarray(split.labels))
        whole.update(json.dumps(split.classes).encode())
    return whole.hexdigest()
