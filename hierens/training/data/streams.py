"""Streams of samples from WebDataset shards or the Hugging Face Hub.

timm's readers list the shards and divide them over workers. In addition, order and augmentation depend here only on the
seed, the epoch, the process and the worker, and images that cannot be read are skipped and counted.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from hierens.training.data.decoding import DecodingError, Source
from hierens.training.data.unreadable import Unreadable, UnreadableDataError
from hierens.training.randomness import seed_of, seeded

_BLANK = b"P5 1 1 255\n\0"  # the smallest image


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """One pass over the shards of this process, each sample once: for validation.

    Args:
        reader: timm's `ReaderWds` or `ReaderHfids`, created after the process group.
        decode: a file or its bytes -> a PIL image as input of the model.
        transform: PIL image -> tensor (C, H, W).
        workers: loader processes.
        seed: of the run.
        unreadable: counts the samples.
    """

    def __init__(
        self,
        reader: Any,
        decode: Callable[[Source], Image.Image],
        transform: Callable[[Image.Image], torch.Tensor],
        workers: int,
        seed: int,
        unreadable: Unreadable,
    ) -> None:
        self.reader, self.decode, self.transform = reader, decode, transform
        self.seed, self.unreadable = seed, unreadable
        self.workers, self.processes, self.process = max(workers, 1), reader.dist_num_replicas, reader.dist_rank
        self.epoch = 0
        reader.set_loader_cfg(num_workers=workers)
        reader.common_seed = seed_of(seed)  # never negative, as its generators require

    @property
    def signature(self) -> dict[str, int]:
        """What the order of samples depends on besides seed and epoch."""
        return {"processes": self.processes, "workers": self.workers}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass. Its workers are started afterwards, so they see it."""
        self.epoch = epoch
        self.unreadable.start()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for number, (image, target) in enumerate(self._samples(worker)):
            self.unreadable.count_read()
            with seeded(self.seed, self.epoch, self.process, worker, number):
                yield self.transform(image), target

    def _samples(self, worker: int) -> Iterator[tuple[Image.Image, int]]:
        return self._pass(worker, 0)

    def _pass(self, worker: int, number: int) -> Iterator[tuple[Image.Image, int]]:
        """The shards of this worker once; for training they are shuffled, differently for each `number`."""
        read = _hugging_face if hasattr(self.reader, "builder") else _web_dataset
        mine, of = self.process * self.workers + worker, self.processes * self.workers
        for name, stored, target in read(self.reader, mine, of, (self.seed, self.epoch, number), self.unreadable):
            try:
                image = self.decode(stored)
            except DecodingError as error:
                self.unreadable.count_skipped(f"{name}: {error}")
            else:
                yield image, target


class TrainStream(Stream):
    """A stream with the same number of samples per epoch for every worker of every process, for training.

    Each worker yields its part of `num_samples`, rounded up to whole batches; it repeats its shards if they have fewer.

    Args:
        reader: as for `Stream`.
        decode: as for `Stream`.
        transform: as for `Stream`.
        workers: as for `Stream`.
        seed: as for `Stream`.
        unreadable: as for `Stream`.
        batch_size: images per batch of this process.

    Raises:
        ValueError: there are fewer shards than workers.
    """

    def __init__(
        self,
        reader: Any,
        decode: Callable[[Source], Image.Image],
        transform: Callable[[Image.Image], torch.Tensor],
        workers: int,
        seed: int,
        unreadable: Unreadable,
        batch_size: int,
    ) -> None:
        super().__init__(reader, decode, transform, workers, seed, unreadable)
        reader.batch_size = batch_size
        shards = _count_shards(reader)
        if shards < self.workers * self.processes:
            raise ValueError(
                f"the training split has {shards} shards for {self.processes} processes with {self.workers} workers "
                "each, and a shard is read by one worker: use fewer workers, or more shards."
            )

    def __len__(self) -> int:
        return len(self.reader)

    def _samples(self, worker: int) -> Iterator[tuple[Image.Image, int]]:
        wanted = len(self) // self.workers
        passes = itertools.chain.from_iterable(self._whole_passes(worker))
        return itertools.islice(passes, wanted)

    def _whole_passes(self, worker: int) -> Iterator[Iterator[tuple[Image.Image, int]]]:
        for number in itertools.count():
            samples = self._pass(worker, number)
            first = next(samples, None)
            if first is None:
                raise UnreadableDataError(f"the shards of worker {worker} hold no readable image.")
            yield itertools.chain([first], samples)


def hugging_face_bytes(stored: dict[str, Any]) -> bytes:
    """The encoded image in a row of a Hugging Face data set, read from its path or URL if it is not in the row."""
    from datasets.utils.file_utils import xopen

    if stored.get("bytes") is not None:
        return bytes(stored["bytes"])
    with xopen(stored["path"], "rb") as file:
        return bytes(file.read())


def _web_dataset(
    reader: Any, mine: int, of: int, seeds: tuple[int, int, int], unreadable: Unreadable
) -> Iterator[tuple[str, bytes, int]]:
    import webdataset as wds
    from timm.data.readers.reader_wds import WdsTargetKeyError, _decode, getfirst

    def skip(error: Exception) -> bool:
        unreadable.count_skipped(", ".join(str(part) for part in error.args) or type(error).__name__)
        return True

    shards = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    if reader.is_training:
        random.Random(seed_of(*seeds[:2])).shuffle(shards)  # the same in all workers, so that their parts are disjoint
    shards = shards[mine::of]
    if not shards:
        return
    stages = [wds.SimpleShardList(shards), wds.tarfile_to_samples(handler=skip)]
    if reader.is_training:
        order = random.Random(seed_of(*seeds, mine))
        stages.append(wds.shuffle(reader.sample_shuffle_size, initial=reader.sample_initial_size, rng=order))
    target_key = reader.target_keys or reader.target_key
    for sample in wds.DataPipeline(*stages):
        name = f"{sample['__url__']} {sample['__key__']}"
        try:
            stored = getfirst(sample, reader.input_key)
            # timm finds the target, but only together with an image that it decodes itself.
            found = _decode({**sample, "jpg": _BLANK}, "jpg", None, target_key, reader.split_info.alt_label)
        except WdsTargetKeyError:  # the whole data set lacks the key
            raise
        except Exception as error:  # no image, or a label that is no number
            unreadable.count_skipped(f"{name}: {error or type(error).__name__}")
            continue
        if found is not None:  # samples without a label are left out on purpose
            yield name, stored, found["target"]


def _hugging_face(
    reader: Any, mine: int, of: int, seeds: tuple[int, int, int], unreadable: Unreadable
) -> Iterator[tuple[str, bytes, int]]:
    from datasets import Image as ImageFeature

    reader._lazy_init()  # for each pass; timm and datasets choose the shards of each worker and shuffle
    samples = reader.ds.cast_column(reader.input_key, ImageFeature(decode=False))
    samples.set_epoch(seeds[1])
    for number, sample in enumerate(samples):
        stored = sample[reader.input_key]
        name = stored.get("path") or f"sample {number} of worker {mine} of {of}"
        try:
            content = hugging_face_bytes(stored)
        except Exception as error:  # file systems and networks raise all kinds of errors
            unreadable.count_skipped(f"{name}: {error or type(error).__name__}")
            continue
        yield name, content, sample[reader.target_key]


def _count_shards(reader: Any) -> int:
    """The number of shards that can be distributed to workers."""
    if hasattr(reader, "split_info"):
        return len(reader.split_info.filenames)
    shards = reader.builder.as_streaming_dataset(split=reader.split).num_shards
    whole = shards % reader.dist_num_replicas == 0
    return shards if whole else shards * reader.dist_num_replicas  # otherwise each process reads a part of every shard
