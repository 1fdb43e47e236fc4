"""Data sets on disk: shards and folders of JPEGs of different sizes, and torchvision's CIFAR files."""

import io
import json
import pickle
import tarfile

import numpy as np
from PIL import Image

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no image": lambda data: b"<html>404 not found</html>",
}


def jpeg(number, size=(48, 64)):
    """An image of blocks of random colours, drawn by its number as the seed."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(root, split="train", shards=4, images=12, classes=3, damaged=(), sizes=((48, 64), (70, 50))):
    """WebDataset shards with timm's `_info.json`; `damaged` numbers are spoilt in turn by each of `DAMAGES`."""
    root.mkdir(exist_ok=True)
    names, number = [], 0
    for shard in range(shards):
        names.append(f"{split}-{shard:04d}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for _ in range(images):
                data = jpeg(number, sizes[number % len(sizes)])
                if number in damaged:
                    data = list(DAMAGES.values())[sorted(damaged).index(number) % len(DAMAGES)](data)
                for extension, content in (("jpg", data), ("cls", str(number % classes).encode())):
                    member = tarfile.TarInfo(f"{split}{number:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    info = json.loads((root / "_info.json").read_text()) if (root / "_info.json").exists() else {"splits": {}}
    info["splits"][split] = {
        "name": split,
        "filenames": names,
        "shard_lengths": [images] * shards,
        "num_samples": shards * images,
    }
    (root / "_info.json").write_text(json.dumps(info))
    return root


def write_cifar(root, classes=10, images=20):
    """torchvision's layout of CIFAR-10 or CIFAR-100: pickles with the right names and other checksums."""
    generator = np.random.default_rng(0)
    labels = [number % classes for number in range(images)]
    content = {"data": generator.integers(0, 256, (images, 3072), dtype=np.uint8)}
    if classes == 10:
        folder, key, parts = root / "cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)]
        meta = {"batches.meta": {"label_names": [f"class {i}" for i in range(classes)]}}
        parts.append("test_batch")
    else:
        folder, key, parts = root / "cifar-100-python", "fine_labels", ["train", "test"]
        meta = {"meta": {"fine_label_names": [f"class {i}" for i in range(classes)]}}
    folder.mkdir(parents=True)
    for name, value in {**{part: {**content, key: labels} for part in parts}, **meta}.items():
        (folder / name).write_bytes(pickle.dumps(value))
    return root


def write_folders(root, splits):
    """An image folder: {split: {class: number of images}}. Classes named red, green or blue show that colour."""
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                shade = {"red": (200, number, 0), "green": (0, 200, number), "blue": (number, 0, 200)}.get(name)
                Image.new("RGB", (24, 24), shade or (250, 10 * number, 0)).save(folder / f"{number}.png")
    return root
