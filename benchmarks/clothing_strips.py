"""Writes the photographs of the demo, one strip per split and class, to hierens/training/data/clothing/.

python benchmarks/clothing_strips.py DIR        DIR holds `train`, `validation` and `test` with a folder per class

Every photograph is cropped to its central square and scaled to 32x32 pixels. The photographs of a class are sorted by
the SHA-1 of their files, and every second one, beginning with the first, is for training.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hierens.training.data.builtin import CLASSES, CLOTHING, CLOTHING_SIDE

QUALITY = 90


def main(source: Path) -> None:
    """Write all strips."""
    for name in CLASSES["clothing"]:
        files = sorted(source.glob(f"*/{name}/*.jpg"), key=lambda file: hashlib.sha1(file.read_bytes()).hexdigest())
        for split, chosen in (("train", files[::2]), ("validation", files[1::2])):
            strip = Image.fromarray(np.concatenate([small(file) for file in chosen]))
            (CLOTHING / split).mkdir(parents=True, exist_ok=True)
            strip.save(CLOTHING / split / f"{name}.jpg", quality=QUALITY, subsampling=0, optimize=True)
            print(f"{split} {name}: {len(chosen)}")


def small(file: Path) -> np.ndarray:
    """A photograph in the size of the demo, (32, 32, 3)."""
    with Image.open(file) as photograph:
        upright = ImageOps.exif_transpose(photograph).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (CLOTHING_SIDE, CLOTHING_SIDE), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
