"""Unreadable images: replaced in training, of no class in validation, counted everywhere, and too many stop the run."""

import io
import json

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import hierens
from hierens.training.config import DataConfig, TrainConfig
from hierens.training.data.images import NO_CLASS
from hierens.training.data.loaders import create_loaders
from hierens.training.data.unreadable import Unreadable, UnreadableDataError
from hierens.training.evaluation import evaluate
from hierens.training.trainer import Trainer
from support.accelerator import reset_accelerator
from support.made_up import jpeg

SMALL = {"input_size": (3, 16, 16), "mean": (0.5,), "std": (0.25,)}


def png(size):
    file = io.BytesIO()
    Image.new("1", (size, size)).save(file, "PNG")
    return file.getvalue()


DAMAGED = {
    "truncated by a byte": lambda: jpeg(1)[:-1],
    "cut in half": lambda: jpeg(1)[:500],
    "empty": lambda: b"",
    "no image": lambda: b"<html>404 not found</html>",
    "a bomb": lambda: png(14_000),
    "a broken chunk": lambda: png(40)[:-20] + bytes(20),
}


def write_folder(root, damaged=(), images=30):
    """Two classes of JPEGs per split; damaged files, by number, are the values given."""
    damaged = dict(damaged)
    for split in ("train", "validation"):
        for number in range(images):
            folder = root / split / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03d}.jpg").write_bytes(damaged[number] if number in damaged else jpeg(number))
    return root


def loaders(root, workers=0, **settings):
    return create_loaders(DataConfig("", str(root), **{**SMALL, "workers": workers, **settings}), 10, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_damage_is_skipped_and_counted(tmp_path, workers):
    root = write_folder(tmp_path, [(2 * i, make()) for i, make in enumerate(DAMAGED.values())])
    train, val = loaders(root, workers)
    targets = torch.cat([targets for _, targets in val]).tolist()
    wrong = {2 * i for i in range(len(DAMAGED))}
    assert len(targets) == 30 and targets.count(NO_CLASS) == 6, "by class: cats first"
    read, skipped, names = val.dataset.unreadable.counts
    assert (read, skipped) == (24, 6)
    assert {int(name.split(".jpg")[0][-3:]) for name in names} == wrong and all("validation/cat" in n for n in names)
    batches = list(train)
    assert sum(len(images) for images, _ in batches) == 30 and all((t >= 0).all() for _, t in batches)
    read, skipped, _ = train.dataset.unreadable.counts
    assert read == 30 and skipped >= 6, "a replacement may be damaged, too"


def test_replacements_depend_on_seed_epoch_and_index_alone(tmp_path):
    data = loaders(write_folder(tmp_path, [(4, b"")]))[0].dataset
    damaged = next(i for i in range(30) if "004.jpg" in data.dataset._name(i))
    drawn = []
    for epoch in range(6):
        data.set_epoch(epoch)
        image, target = data[damaged]
        data[3]
        assert torch.equal(data[damaged][0], image) and data[damaged][1] == target
        drawn.append(image)
    assert sum(torch.equal(drawn[0], other) for other in drawn[1:]) < 5


def test_a_missing_file_and_a_mistake_in_a_transform_differ(tmp_path):
    root = write_folder(tmp_path)
    train, val = loaders(root)
    (root / "validation" / "cat" / "006.jpg").unlink()
    assert sum((targets == NO_CLASS).sum() for _, targets in val) == 1
    train.dataset.dataset.transform = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train.dataset[0]


def trainer(root, output, **settings):
    reset_accelerator()
    backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 8), num_classes=2)
    config = TrainConfig(str(output), epochs=2, batch_size=10, lr=0.01, cpu=True, log_steps=1, ema_decay=0.9)
    return Trainer(hierens.hierensify(backbone, 2, init="reinit", looped={}), config, *loaders(root, **settings))


def test_a_run_reports_what_it_skipped(tmp_path, capsys):
    root = write_folder(tmp_path / "data", [(7, b"")])
    trainer(root, tmp_path / "run").fit()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validated = [record for record in records if "unreadable_validation" in record]
    assert [(r["epoch"], r["unreadable_validation"], r["read_validation"]) for r in validated] == [
        (1, 1, 29),
        (2, 1, 29),
    ]
    assert [r["epoch"] for r in records if "unreadable_training" in r] == [1, 2]
    assert "epoch 2: 1 unreadable validation images were skipped, first: " in capsys.readouterr().out
    lines = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert len(lines) == 2 and all("dog/007.jpg: it is no image" in line for line in lines), "named once each"
    assert all(0 <= record["data_wait"] <= 1 for record in records if "loss" in record)


def test_too_many_stop_the_run(tmp_path):
    root = write_folder(tmp_path / "data", [(number, b"") for number in range(5)])
    with pytest.raises(UnreadableDataError, match=r"\d of 3\d training images cannot be read, more than max_unrea"):
        trainer(root, tmp_path / "run").fit()
    trainer(root, tmp_path / "lenient", max_unreadable=0.5).fit()
    broken = write_folder(tmp_path / "broken", [(number, b"") for number in range(30)])
    with pytest.raises(UnreadableDataError, match=r"200 images in a row cannot be read; the last: .*train/"):
        trainer(broken, tmp_path / "none").fit()


def test_validation_leaves_them_out(tmp_path):
    """Accuracy and loss over the readable images alone, as if the others were not there."""
    whole, part = write_folder(tmp_path / "a", [(3, b"x"), (8, b"x")]), write_folder(tmp_path / "b")
    for number in (3, 8):
        (part / "validation" / ("cat", "dog")[number % 2] / f"{number:03d}.jpg").unlink()
    model = hierens.hierensify(timm.create_model("resnet8_cifar", channels=(8, 8, 8), num_classes=2), 2, init="reinit")
    accelerator = Accelerator(cpu=True)
    first, second = (evaluate(accelerator, model, accelerator.prepare(loaders(root)[1])) for root in (whole, part))
    assert first["accuracy"] == second["accuracy"] and first["val_loss"] == pytest.approx(second["val_loss"], rel=1e-5)


def test_names_are_kept_within_bounds():
    counts = Unreadable()
    for number in range(150):
        counts.count_skipped(f"{number} " + "é" * 500)
        counts.count_read()
    read, skipped, names = counts.counts
    assert (read, skipped, len(names)) == (150, 150, 100)
    assert names[99].startswith("99 é") and len(names[99].encode()) <= 400
    counts.start()
    counts.count_skipped("a.jpg: cannot identify image file <_io.BytesIO object at 0x7fd2a0d12a70>")
    assert counts.counts == (0, 1, ["a.jpg: cannot identify image file"]) and np.array_equal(counts._counts.sum(), 1)
