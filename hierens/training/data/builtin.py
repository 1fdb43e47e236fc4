"""Small data sets that are read without a download.

They are the photographs of clothes in hierens, scikit-learn's digits, and Fashion-MNIST's idx files.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hierens.core.install import install_command
from hierens.training.config import DataConfig

CLOTHING = Path(__file__).with_name("clothing")
"""the folder of the photographs, with their sources; benchmarks/clothing_strips.py wrote it"""
CLOTHING_SIDE = 32
_DIGITS_HELD_OUT = 450
_PHOTOGRAPHED = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CLASSES = {"clothing": _PHOTOGRAPHED, "digits": tuple(map(str, range(10))), "fashion_mnist": _CLOTHES}
"""class names of each data set"""


def read_built_in(config: DataConfig, split: str) -> tuple[Any, Any]:
    """Images (N, H, W), or (N, H, W, 3) in colour, as bytes, and labels (N,) of a split.

    Raises:
        ValueError: there is no such split, or its data are missing or damaged.
    """
    read = {"clothing": clothing, "digits": digits, "fashion_mnist": fashion_mnist}[config.dataset]
    if split not in ("train", "validation"):
        raise ValueError(f"{config.dataset} has the splits train and validation, not {split!r}.")
    return read(config, split == "train")


def clothing(config: DataConfig, training: bool) -> tuple[Any, Any]:
    """3,781 photographs of clothes at 32x32 pixels: 1,893 for training and 1,888 held out, always the same.

    Each class is a JPEG with its photographs one below the other.
    """
    folder = CLOTHING / ("train" if training else "validation")
    strips = []
    for name in _PHOTOGRAPHED:
        with Image.open(folder / f"{name}.jpg") as strip:
            strips.append(np.asarray(strip).reshape(-1, CLOTHING_SIDE, CLOTHING_SIDE, 3))
    return np.concatenate(strips), np.repeat(np.arange(len(strips)), [len(strip) for strip in strips])


def digits(config: DataConfig, training: bool) -> tuple[Any, Any]:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels; the same 450 of them are always held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError(f"the digits are part of scikit-learn: {install_command('demo')}.") from error
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    train_x, val_x, train_y, val_y = train_test_split(
        images, labels, test_size=_DIGITS_HELD_OUT, random_state=0, stratify=labels
    )
    return (train_x, train_y) if training else (val_x, val_y)


def fashion_mnist(config: DataConfig, training: bool) -> tuple[Any, Any]:
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
