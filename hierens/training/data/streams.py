"""Streams: samples that come one after the other, from WebDataset shards or the Hugging Face Hub.

timm's readers say what there is and who reads which shards. What they leave to chance or to a warning is settled here:
order and augmentation depend only on the seed, the epoch, the process and the worker; an image that cannot be read is
skipped and counted.
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
from hierens.training.randomness import random_numbers_of, seed_of

_BLANK = b"P5 1 1 255\n\0"  # the smallest image


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """One pass over the shards of this process, each sample once: for validation.

    Args:
        reader: timm's `ReaderWds` or `ReaderHfids`, made once the process group exists.
        decode: a file or its bytes -> a PIL image as the model sees it.
        transform: PIL image -> tensor (C, H, W).
        workers: loader processes.
        seed: of the run.
        unreadable: counts.
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
        reader.common_seed = seed_of(seed)  # which is never negative, as its generators want it

    @property
    def signature(self) -> dict[str, int]:
        """What the order of samples depends on beside seed and epoch."""
        return {"processes": self.processes, "workers": self.workers}

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch's. Workers are started anew for it, so they need not be told."""
        self.epoch = epoch
        self.unreadable.start()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for number, (image, target) in enumerate(self._samples(worker)):
            self.unreadable.count_read()
            with random_numbers_of(self.seed, self.epoch, self.process, worker, number):
                yield self.transform(image), target

    def _samples(self, worker: int) -> Iterator[tuple[Image.Image, int]]:
        return self._pass(worker, 0)

    def _pass(self, worker: int, number: int) -> Iterator[tuple[Image.Image, int]]:
        """The shards of this worker once: shuffled, and anew for each `number`, if the reader is for training."""
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
    """As many samples per epoch from every worker of every process, so that none waits for another in vain.

    Each gives its share of `num_samples`, rounded up to whole batches, and begins its shards again if they hold fewer.

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
                "each, and a shard is read by one worker: lower workers, or write more shards."
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
                raise UnreadableDataError(f"the shards of worker {worker} hold no image that can be read.")
            yield itertools.chain([first], samples)


def hugging_face_bytes(stored: dict[str, Any]) -> bytes:
    """The image of a row of a Hugging Face data set that is not to decode it, fetched from wherever it lies."""
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
        random.Random(seed_of(*seeds[:2])).shuffle(shards)  # alike in all workers, so that their shares are disjoint
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
            # timm says what the target is, but not without decoding an image, its own way.
            found = _decode({**sample, "jpg": _BLANK}, "jpg", None, target_key, reader.split_info.alt_label)
        except WdsTargetKeyError:  # the whole set lacks what was asked for
            raise
        except Exception as error:  # no image, or no number for a label
            unreadable.count_skipped(f"{name}: {error or type(error).__name__}")
            continue
        if found is not None:  # a sample without a label is meant to be left out
            yield name, stored, found["target"]


def _hugging_face(
    reader: Any, mine: int, of: int, seeds: tuple[int, int, int], unreadable: Unreadable
) -> Iterator[tuple[str, bytes, int]]:
    from datasets import Image as ImageFeature

    reader._lazy_init()  # anew for each pass; shards, shuffling and who reads what are timm's and datasets' own
    samples = reader.ds.cast_column(reader.input_key, ImageFeature(decode=False))
    samples.set_epoch(seeds[1])
    for number, sample in enumerate(samples):
        stored = sample[reader.input_key]
        name = stored.get("path") or f"sample {number} of worker {mine} of {of}"
        try:
            content = hugging_face_bytes(stored)
        except Exception as error:  # whatever stands between here and a file
            unreadable.count_skipped(f"{name}: {error or type(error).__name__}")
            continue
        yield name, content, sample[reader.target_key]


def _count_shards(reader: Any) -> int:
    """How many shards there are to hand out to workers."""
    if hasattr(reader, "split_info"):
        return len(reader.split_info.filenames)
    shards = reader.builder.as_streaming_dataset(split=reader.split).num_shards
    whole = shards % reader.dist_num_replicas == 0
    return shards if whole else shards * reader.dist_num_replicas  # each process then reads a part of every shard
