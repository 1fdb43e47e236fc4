"""What is compared can be trained, is recorded once, and goes on where it was stopped."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from comparison import recipes, records
from comparison import train as training
from comparison.train import train_missing
from comparison.views import TwoViews
from gpu_steps.packing import Split

from hierens.training.presets import preset


@pytest.fixture
def digits(monkeypatch, tmp_path):
    """A recipe of seconds, and a folder for its records."""
    run = preset("digits")
    train = dataclasses.replace(run.train, epochs=1, batch_size=256, warmup_epochs=0, val_epochs=1)
    monkeypatch.setitem(recipes.RECIPES, "digits", dataclasses.replace(run, train=train))
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(recipes, "ROWS", {name: shortened(row) for name, row in recipes.ROWS.items()})
    return tmp_path / "records" / "digits"


def shortened(row):
    """One seed, or as many as an ensemble is made of, and few channels."""
    changes = dict(row.changes)
    if "backbone_args" in changes:
        changes["backbone_args"] = {"channels": [4, 4, 8]}
    seeds = recipes.ENSEMBLE_SEEDS if len(row.seeds) == len(recipes.ENSEMBLE_SEEDS) else (0,)
    return dataclasses.replace(row, changes=changes, seeds=seeds)


def test_the_queue_has_every_row_once_and_the_first_seed_of_a_group_first():
    queue = list(recipes.queue("cifar100"))
    assert sorted(queue) == sorted((row, seed) for row, of in recipes.ROWS.items() for seed in of.seeds)
    assert [seed for _, seed in queue[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(list(recipes.queue("cifar100", ["exits"]))) == len(recipes.ROWS["exits"].seeds)


@pytest.mark.parametrize("row", recipes.ROWS)
def test_rows_differ_from_the_recipe_in_what_they_name_alone(row):
    run = recipes.configured("cifar100", row, 3, "data", "out")
    base = dataclasses.asdict(recipes.RECIPES["cifar100"])
    changed = {
        key
        for part in ("model", "train")
        for key, value in dataclasses.asdict(getattr(run, part)).items()
        if value != base[part][key]
    }
    started = {"start"} if recipes.ROWS[row].start else set()
    assert changed <= {*recipes.ROWS[row].changes, "seed", "output_dir"} | started


@pytest.mark.sampled
def test_rows_are_trained_and_recorded_once(digits, tmp_path):
    rows = ("tree-distilled", "single-24", "exits-ensemble", "tree-with-exits")
    train_missing("digits", "", tmp_path / "runs", rows)
    found = records.read_records("digits")
    assert set(found) == {*rows, records.DEEP_ENSEMBLE}
    for name, group in found.items():
        record = group.records[0]
        assert record["test_images"] == 450 and len(record["accuracy"]) == len(record["macs"])
        assert str(tmp_path) not in json.dumps(record), "a record names no folder of a machine"
        assert record["machine"]["torch"]
        if name in ("tree-distilled", "exits-ensemble", "tree-with-exits"):
            assert len(record["thresholds"]["accuracy"]) == len(records.SHARES)
    ensemble, singles = found[records.DEEP_ENSEMBLE].records[0], found["single-24"]
    assert ensemble["leaves"] == [1, 2, 4, 8] and [len(g) for g in ensemble["groups"].values()] == [8, 4, 2, 1]
    assert ensemble["accuracy"][0] == pytest.approx(singles.mean("accuracy")[0], abs=0.3)
    before = {file: file.stat().st_mtime_ns for file in digits.rglob("*.json")}
    train_missing("digits", "", tmp_path / "runs", rows)
    assert {file: file.stat().st_mtime_ns for file in digits.rglob("*.json")} == before


@pytest.mark.parametrize("row", ["single-24", "two-views"])
def test_runs_take_images_from_memory(row, digits, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    channels, height, width = recipes.RECIPES["digits"].data.input_size
    images = random.integers(0, 255, (300, height, width, channels), dtype=np.uint8)
    split = Split(images, random.integers(0, 10, 300), tuple("0123456789"))
    monkeypatch.setattr(training, "read_joined", lambda folder: {"train": split, "test": split})
    said = training._train_one("digits", tmp_path, tmp_path / "runs", "looped", (row, 0))
    assert said == f"wrote {records.record_file('digits', row, 0)}"
    record = json.loads(records.record_file("digits", row, 0).read_text())
    assert record["test_images"] == 300 and record["macs"]


def test_the_halves_of_a_tree_see_other_augmentations():
    config = recipes.RECIPES["cifar100"].data
    images = np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), dtype=np.uint8)
    both = TwoViews(Split(images, np.zeros(64, np.int64), ("a",)), config, torch.device("cpu"), 0, True)
    stacked, _ = both.__getitems__(range(64))
    first, second = stacked.chunk(2, 1)
    assert first.shape == (64, 3, 32, 32) and not torch.equal(first, second)
