"""Data: every way in, the same tensors whatever the workers, and clear words where there is nothing to read."""

import dataclasses
import gzip
import random
import struct

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from PIL import Image
from torch.utils.data import Dataset

from hierens.training.config import DataConfig
from hierens.training.data.images import ArrayImages
from hierens.training.data.loaders import (
    SeededDataset,
    class_names,
    count_classes,
    create_datasets,
    create_loaders,
    create_transform,
)
from support.accelerator import reset_accelerator

GREY = {"mean": (0.5,), "std": (0.25,), "workers": 0}
DIGITS = DataConfig(dataset="digits", input_size=(1, 16, 16), augment="crop_flip", pad=1, **GREY)


def write_idx(directory, images=40, suffix=".gz", sides=28):
    directory.mkdir(exist_ok=True)
    pack = gzip.compress if suffix else bytes
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = generator.integers(0, 256, (images, sides, sides), dtype=np.uint8)
        labels = (np.arange(images) % 10).astype(np.uint8)
        head = struct.pack(">HBBiii", 0, 8, 3, images, sides, sides)
        (directory / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(head + pixels.tobytes()))
        head = struct.pack(">HBBi", 0, 8, 1, images)
        (directory / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(head + labels.tobytes()))
    return directory


def write_folders(root, splits=("train", "validation"), classes=("cat", "dog"), images=6, size=40):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (size, size), (60 * number, 10 * i, 0)).save(root / split / name / f"{i}.png")
    return root


def test_digits_are_real_images_split_the_same_way_every_time():
    train, val = create_datasets(DIGITS)
    assert (len(train), len(val), count_classes(train)) == (1347, 450, 10)
    image, label = val[0]
    assert image.shape == (1, 16, 16) and image.dtype == torch.float32 and 0 <= label < 10
    assert np.array_equal(create_datasets(DIGITS)[1].images, val.images)
    assert np.bincount(val.labels).min() >= 40, "every class is held out in its share"
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in val.images) == 0


def test_photographs_of_clothes_come_with_the_package():
    clothing = DataConfig(dataset="clothing", input_size=(3, 32, 32), augment="none", **GREY)
    train, val = create_datasets(clothing)
    assert (len(train), len(val), count_classes(train)) == (1893, 1888, 10)
    assert class_names(val)[:2] == ["dress", "hat"] and class_names(val)[9] == "t-shirt"
    assert np.bincount(val.labels).tolist() == [144, 74, 288, 123, 279, 172, 148, 128, 68, 464]
    image, label = val[1000]
    assert image.shape == (3, 32, 32) and label == val.labels[1000]
    pixels = torch.from_numpy(val.images[1000]).permute(2, 0, 1) / 255
    assert (image * 0.25 + 0.5 - pixels).abs().max() < 1e-6, "the photograph as it is, upright and in its colours"
    assert (pixels.amax(0) - pixels.amin(0)).max() > 0.1, "in colours"
    seen = {image.tobytes() for image in train.images}
    assert len(seen) == 1893 and sum(image.tobytes() in seen for image in val.images) == 0
    with pytest.warns(UserWarning, match="the images have colours, and input_size has 1 channel"):
        assert create_datasets(dataclasses.replace(clothing, input_size=(1, 32, 32)))[0][0][0].shape == (1, 32, 32)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_is_padded_and_normalised(tmp_path, suffix):
    directory = write_idx(tmp_path / "f", suffix=suffix)
    config = DataConfig(
        dataset="fashion_mnist", data_dir=str(directory), input_size=(1, 32, 32), augment="none", **GREY
    )
    train, val = create_datasets(config)
    image, label = train[3]
    assert len(train) == len(val) == 40 and label == 3 and count_classes(train) == 10
    assert (
        class_names(train)[::9] == ["T-shirt/top", "Ankle boot"] and class_names(create_datasets(DIGITS)[0])[4] == "4"
    )
    pixels = torch.from_numpy(train.images[3]).float() / 255
    assert torch.allclose(image[0, 2:30, 2:30], (pixels - 0.5) / 0.25, atol=1e-6)
    assert (image[0, :2] == -2).all() and (image[0, :, 30:] == -2).all()


def test_image_folders_by_timm(tmp_path):
    root = write_folders(tmp_path / "images")
    config = DataConfig(data_dir=str(root), input_size=(3, 32, 32), workers=0)
    train, val = create_loaders(config, batch_size=4, val_batch_size=5)
    assert count_classes(train.dataset) == 2
    images, targets = next(iter(val))
    assert images.shape == (5, 3, 32, 32) and targets.tolist() == [0] * 5
    assert len(train) == 3 and sum(len(t) for _, t in val) == 12


def test_torch_datasets_by_timms_name(tmp_path):
    """torchvision's CIFAR layout, made up: timm's `torch/cifar10` reads it."""
    import hashlib
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        content = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3], "label_names": list("abcdefghij")}
        (folder / name).write_bytes(pickle.dumps(content))
    import torchvision

    cifar = torchvision.datasets.CIFAR10
    digest = {
        name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in (p.name for p in folder.iterdir())
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "train_list", [(f"data_batch_{i}", digest[f"data_batch_{i}"]) for i in range(1, 6)])
        patch.setattr(cifar, "test_list", [("test_batch", digest["test_batch"])])
        patch.setattr(cifar, "meta", {**cifar.meta, "md5": digest["batches.meta"]})
        config = DataConfig(
            "torch/cifar10", str(tmp_path), val_split="test", input_size=(3, 32, 32), augment="crop_flip"
        )
        train, val = create_datasets(config)
    assert (len(train), len(val), count_classes(train)) == (20, 4, 10) and class_names(train) == list("abcdefghij")
    assert train[0][0].shape == (3, 32, 32)


def test_transforms_crop_flip_and_resize():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    train = create_transform(DIGITS, training=True)
    val = create_transform(DIGITS, training=False)
    assert torch.equal(val(image), val(image)) and val(image).shape == (1, 16, 16)
    drawn = {train(image).numpy().tobytes() for _ in range(60)}
    assert 9 < len(drawn) <= 18, "3 by 3 crops, each also flipped"
    assert (val(image) * 0.25 + 0.5).max() == pytest.approx(252 / 255, abs=0.02), "digits are resized, not padded"
    with pytest.raises(ValueError, match="mean and std need 1 or 3 values"):
        create_transform(DataConfig(mean=(0.5, 0.5)), training=True)


class Draws(Dataset):
    """Yields what all three generators draw."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


def test_random_numbers_depend_on_seed_epoch_and_index_alone():
    data = SeededDataset(Draws(), seed=1)
    first = [data[i] for i in range(10)]
    assert all(torch.equal(data[i], first[i]) for i in reversed(range(10)))
    assert len({row.sum().item() for row in first}) == 10
    data.set_epoch(1)
    assert not any(torch.equal(data[i], first[i]) for i in range(10))
    assert not torch.equal(SeededDataset(Draws(), seed=2)[0], first[0])


def test_the_callers_generators_are_left_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    SeededDataset(Draws(), seed=1)[3]
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def batches(epochs, workers=0, skip=0, seed=0):
    reset_accelerator()
    settings = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    config = DataConfig(**{**DIGITS.__dict__, "workers": workers})
    loader = accelerator.prepare(create_loaders(config, 200, 450, seed)[0])
    found = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        found += [images for images, _ in (skip_first_batches(loader, skip) if skip else loader)]
    return found


@pytest.mark.sampled
def test_order_and_augmentation_repeat_with_any_workers_and_after_a_resume():
    reference = batches([0, 1])
    assert len(reference) == 12
    assert not any(torch.equal(a, b) for a, b in zip(reference[:6], reference[6:], strict=True)), "epochs differ"
    assert all(torch.equal(a, b) for a, b in zip(reference, batches([0, 1], workers=2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reference[6 + 2 :], batches([1], skip=2), strict=True))
    assert not torch.equal(batches([0], seed=5)[0], reference[0])


def shorten(file):
    data = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(data[:-5]))


@pytest.mark.parametrize(
    ("dataset", "prepare", "message"),
    [
        ("", lambda d: None, "does not exist: set data_dir to the folder that holds the images"),
        ("", lambda d: d.mkdir(), "is empty: it must hold a folder per split or class"),
        ("", lambda d: (d / "train").mkdir(parents=True), "val_split is 'validation', and .* has no folder"),
        ("", lambda d: write_folders(d, images=0), "timm cannot read|holds no images"),
        ("torch/nonsense", lambda d: write_folders(d), "cannot read the data set 'torch/nonsense'"),
        ("fashion_mnist", lambda d: None, "does not exist: fashion_mnist needs its idx files there"),
        ("fashion_mnist", lambda d: d.mkdir(), "has neither train-images-idx3-ubyte nor"),
        (
            "fashion_mnist",
            lambda d: shorten(write_idx(d) / "train-images-idx3-ubyte.gz"),
            "truncated: it holds 31355 values",
        ),
        (
            "fashion_mnist",
            lambda d: (write_idx(d) / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnothing"),
            "is damaged",
        ),
        (
            "fashion_mnist",
            lambda d: (write_idx(d, suffix="") / "t10k-labels-idx1-ubyte").write_bytes(b"abcdefghij"),
            "is no idx file of 1 dimensions",
        ),
        ("fashion_mnist", lambda d: (write_idx(d, 40), write_idx(d, 0)), "truncated|no idx"),
    ],
)
def test_missing_and_damaged_data_say_so(tmp_path, dataset, prepare, message):
    prepare(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        create_datasets(DataConfig(dataset=dataset, data_dir=str(tmp_path / "data")))


def test_a_directory_is_needed_and_a_batch_must_be_filled(tmp_path):
    with pytest.raises(ValueError, match="data_dir is needed"):
        create_datasets(DataConfig())
    with pytest.raises(ValueError, match="1347 images, fewer than one batch of 2000"):
        create_loaders(DIGITS, 2000, 10)
    with pytest.raises(ValueError, match="give num_classes"):
        count_classes(Draws())


def test_images_without_augmentation_are_transformed_once_and_copies_are_given():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    calls = []

    def transform(image):
        calls.append(image)
        return torch.from_numpy(np.array(image)).float()

    fixed = ArrayImages(images, np.arange(4), "L", transform, fixed=True)
    seeded = SeededDataset(fixed, seed=0)
    first, _ = seeded[2]
    expected = first.clone()
    first.zero_()
    again, label = seeded[np.int64(2)]
    assert torch.equal(again, expected) and label == 2 and len(calls) == 1
    again.zero_()
    assert torch.equal(fixed[2][0], expected)
    drawn = ArrayImages(images, np.arange(4), "L", transform)
    assert torch.equal(drawn[2][0], drawn[2][0]) and len(calls) == 3


def test_only_transforms_without_random_numbers_are_kept():
    train, val = create_datasets(DIGITS)
    assert (train.fixed, val.fixed) == (False, True)
    plain = dataclasses.replace(DIGITS, augment="none")
    assert create_datasets(plain)[0].fixed
    train, _ = create_datasets(dataclasses.replace(plain, random_erasing=1.0))
    assert not train.fixed and not torch.equal(train[0][0], train[0][0])
