"""Inputs of batch_predict.py: `items` lists them in a fixed order; `load` reads one, or returns the reason why not.

`Batches` distributes them over processes, in parts that become one Parquet file each.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset, get_worker_info

from hierens.training.config import DataConfig
from hierens.training.data.decoding import Source, create_decoder
from hierens.training.data.loaders import class_names, create_held_out
from hierens.training.data.splits import images_below
from hierens.training.data.streams import hugging_face_bytes
from hierens.training.data.transforms import create_transform
from hierens.training.data.unreadable import UnreadableImageError


class Loaded(NamedTuple):
    """An image, or the reason why it cannot be read."""

    path: str | None
    label: int | None
    image: torch.Tensor | str


class Batch(NamedTuple):
    """Consecutive inputs of one Parquet file."""

    part: int
    indices: list[int]
    paths: list[str | None]
    labels: list[int | None]
    errors: list[str | None]
    images: torch.Tensor  # (N, C, H, W), of those without an error


def open_inputs(config: DataConfig) -> Folder | Indexed | Stream:
    """The folder, or the evaluation split of the data set.

    Raises:
        ValueError: there are no inputs.
    """
    if not config.dataset:
        return Folder(config)
    # Streams of unknown length can also be predicted.
    dataset = create_held_out(replace(config, num_samples=config.num_samples or 1))
    return Stream(dataset.reader, config) if isinstance(dataset, IterableDataset) else Indexed(dataset)


class Folder:
    """Images in a folder and its subfolders, sorted by path; the parent folder of an image may name its class."""

    def __init__(self, config: DataConfig) -> None:
        root = config.data_dir
        self.root, self.read = Path(root), _reader(config)
        if not root or not self.root.is_dir():
            raise ValueError(f"the folder {root!r} does not exist: give --input the folder that holds the images.")
        self.files = sorted(Path(file).relative_to(root).as_posix() for file in images_below(root))
        self.names = sorted(
            {Path(file).parent.name for file in self.files} - {""}, key=lambda name: (natural_key(name), name)
        )
        self.classes: dict[str, int] = {}

    def workers(self, wanted: int) -> int:
        return wanted

    def items(self) -> Iterable[str]:
        return self.files

    def load(self, file: str) -> Loaded:
        return Loaded(_text(file), self.classes.get(Path(file).parent.name), self.read(self.root / file))

    def fingerprint(self) -> list[Any]:
        return [(_text(file), os.stat(self.root / file).st_size) for file in self.files]


class Indexed:
    """A data set with a length."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.names = class_names(dataset) or []

    def workers(self, wanted: int) -> int:
        return wanted

    def items(self) -> Iterable[int]:
        return range(len(self.dataset))

    def load(self, index: int) -> Loaded:
        try:
            image, label = self.dataset[index]
        except UnreadableImageError as error:
            return Loaded(None, None, _reason(error))
        return Loaded(None, None if label < 0 else int(label), image)

    def fingerprint(self) -> list[Any]:
        arrays = [getattr(self.dataset, name, None) for name in ("images", "labels")]
        return [len(self.dataset), *(hashlib.sha256(a.tobytes()).hexdigest() for a in arrays if a is not None)]


class Stream:
    """WebDataset shards or a Hugging Face stream, in stored order; inputs of other processes are not decoded."""

    def __init__(self, reader: Any, config: DataConfig) -> None:
        self.reader, self.read = reader, _reader(config)
        self.names: list[str] = []

    def workers(self, wanted: int) -> int:
        """At most one for `datasets`, which would distribute shards over loader workers itself."""
        return min(wanted, 1) if hasattr(self.reader, "builder") else wanted

    def items(self) -> Iterable[Any]:
        return self._stored() if hasattr(self.reader, "builder") else self._shards()

    def load(self, item: tuple[str | None, int | None, Any]) -> Loaded:
        path, label, content = item
        return Loaded(path, label, content if isinstance(content, str) else self.read(content))

    def fingerprint(self) -> list[Any]:
        if hasattr(self.reader, "builder"):
            return [str(self.reader.builder.hash)]
        files = [Path(self.reader.root) / name for name in self.reader.split_info.filenames]
        return [(file.name, file.stat().st_size if file.is_file() else None) for file in files]

    def _shards(self) -> Iterator[tuple[str | None, int | None, Any]]:
        import webdataset as wds

        for name in self.reader.split_info.filenames:
            shard = os.path.join(self.reader.root, name)
            samples = wds.DataPipeline(
                wds.SimpleShardList([shard]), wds.tarfile_to_samples(handler=wds.reraise_exception)
            )
            try:
                for sample in samples:
                    image = next(
                        (sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample), "no image"
                    )
                    label = int(sample["cls"]) if "cls" in sample else None
                    yield f"{name}/{sample['__key__']}", label, image
            except Exception as error:
                if not Path(shard).is_file():  # a connection may work next time, so this must not become a row
                    raise ValueError(f"the shard {shard} cannot be read: {_reason(error)}") from error
                yield name, None, f"the rest of the shard cannot be read: {_reason(error)}"

    def _stored(self) -> Iterator[tuple[str | None, int | None, Any]]:
        from datasets import Image as ImageFeature

        samples = self.reader.builder.as_streaming_dataset(split=self.reader.split)
        for sample in samples.cast_column(self.reader.input_key, ImageFeature(decode=False)):
            stored = sample[self.reader.input_key]
            label = sample.get(self.reader.target_key)
            yield stored.get("path"), None if label is None or label < 0 else int(label), stored


class Batches(IterableDataset[Batch]):
    """The batches of this process, sorted by Parquet file; loader workers take turns.

    Args:
        inputs: the inputs.
        done: indices of the existing Parquet files.
        share: index and number of processes, over which the missing files are distributed in turn.
        shard_size: inputs per Parquet file.
        batch_size: inputs per batch.
    """

    def __init__(
        self,
        inputs: Folder | Indexed | Stream,
        done: set[int],
        share: tuple[int, int],
        shard_size: int,
        batch_size: int,
    ) -> None:
        self.inputs, self.done, self.share = inputs, done, share
        self.shard_size, self.batch_size = shard_size, batch_size

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        turn = itertools.count()
        for part, items in self._mine():
            while batch := list(itertools.islice(items, self.batch_size)):
                if next(turn) % workers == worker:
                    yield self._loaded(part, batch)

    def _mine(self) -> Iterator[tuple[int, Iterator[tuple[int, Any]]]]:
        process, processes = self.share
        turn = itertools.count()
        numbered = enumerate(self.inputs.items())
        for part, items in itertools.groupby(numbered, key=lambda pair: pair[0] // self.shard_size):
            if part not in self.done and next(turn) % processes == process:
                yield part, items

    def _loaded(self, part: int, batch: list[tuple[int, Any]]) -> Batch:
        loaded = [self.inputs.load(item) for _, item in batch]
        images = [one.image for one in loaded if isinstance(one.image, torch.Tensor)]
        return Batch(
            part,
            [index for index, _ in batch],
            [one.path for one in loaded],
            [one.label for one in loaded],
            [one.image if isinstance(one.image, str) else None for one in loaded],
            torch.stack(images) if images else torch.empty(0),
        )


def _reader(config: DataConfig) -> Callable[[Source | dict[str, Any]], torch.Tensor | str]:
    """A function that prepares an image (also of a Hugging Face row), or returns the reason why it cannot be read."""
    return partial(_prepared, create_decoder(config), create_transform(config, training=False))


def _prepared(
    decode: Callable[[Source], Image.Image],
    transform: Callable[[Image.Image], torch.Tensor],
    content: Source | dict[str, Any],
) -> torch.Tensor | str:
    try:
        return transform(decode(hugging_face_bytes(content) if isinstance(content, dict) else content))
    except Exception as error:  # files, connections and transforms raise many types of errors
        return _reason(error)


def _reason(error: BaseException) -> str:
    """The error in one line, without addresses of open files, so that it is the same at every attempt."""
    said = re.sub(r"<_io\.[^>]*>", "", str(error) or type(error).__name__)
    return _text(" ".join(said.split()))


def _text(name: str) -> str:
    """A file name as valid UTF-8, for Parquet."""
    return os.fsencode(name).decode(errors="replace")
