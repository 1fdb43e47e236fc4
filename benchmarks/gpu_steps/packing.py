"""The steps `pack` and `join`: a data set as a few files small enough to travel one by one, and back.

`pack` lays a thousand images at a time side by side as one lossless WebP image: CIFAR-100's training images, 154 MB of
bytes or 112 MB of PNG files, take 85 MB so. A part says which data set it belongs to and how many parts there are, so
parts may arrive in any order and one after another; `join` decodes what has arrived and says what is missing.
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
SIDE = 32  # images along each edge of a mosaic
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Split:
    """A part of a data set in memory.

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
        ValueError: a folder that is missing or empty, an image that cannot be read, or images of several sizes.
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
    """Write the parts.

    Args:
        data: of `read_folders`.
        folder: new files go here; parts of an earlier packing are removed.
        megabytes: that a part may have at most.

    Raises:
        ValueError: a part could not hold even one mosaic.
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
    """Mosaics with the range of images that each shows, as many together as a part may hold."""
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
    """Decode the parts that lie in `packed` into `folder`, beside those that earlier calls decoded.

    Returns:
        The parts that are still missing, by name.

    Raises:
        ValueError: no parts, a damaged one, or one of another data set than those that are there.
    """
    found = sorted(packed.glob(f"*-of-*{SUFFIX}"))
    if not found and not list(folder.glob(f"*-of-*{SUFFIX}")):
        raise ValueError(f"there are no parts in {packed}: bring what the step pack wrote, or name it by --packed.")
    for file in found:
        about, tensors = _open(file)
        there = {_open(other, labels=False)[0]["data"]: other for other in folder.glob(f"*-of-*{SUFFIX}")}
        if other := next((other for data, other in there.items() if data != about["data"]), None):
            raise ValueError(f"{file} and {other} belong to different data sets: remove {folder} to join anew.")
        labels, images = tensors.pop("labels"), _unpacked(tensors, json.loads(about["shape"]))
        images = images[: len(labels)]  # the last mosaic may be in part empty
        if _digest(images) != about["sha256"]:
            raise ValueError(f"{file} is damaged: its images are not those that were packed. Bring it again.")
        folder.mkdir(parents=True, exist_ok=True)
        _save({"images": images, "labels": labels}, folder / file.name, about)
    return _missing(folder)


def read_joined(folder: Path) -> dict[str, Split]:
    """What `join` wrote, if all parts are there.

    Raises:
        ValueError: parts are missing.
    """
    if missing := _missing(folder):
        raise ValueError(
            f"of the images in {folder}, {', '.join(missing)} are missing: run the steps pack and join, or name a "
            "folder with train/CLASS/ and test/CLASS/ by --data-dir."
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
        raise ValueError(f"{file} cannot be read as a part ({error}): bring it again.") from error


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
