"""Streams: exact after a resume, disjoint between processes, as long for each, and clear when they cannot be read."""

import dataclasses
import json
import random
import subprocess

import pytest
import timm
import torch
from accelerate import Accelerator, skip_first_batches

import hierens
from hierens.training.config import DataConfig, TrainConfig
from hierens.training.data.loaders import create_loaders, data_signature
from hierens.training.trainer import Trainer
from support.accelerator import reset_accelerator
from support.made_up import jpeg, write_shards
from support.processes import environment, script

SMALL = {"input_size": (3, 16, 16), "mean": (0.5,), "std": (0.25,)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, "train", damaged=(5, 17, 30))
    return write_shards(root, "validation", shards=3, images=7, damaged=(4,))


def config(root, workers=0, dataset="wds/made-up", **settings):
    return DataConfig(dataset, str(root), **{**SMALL, "workers": workers, **settings})


def epochs(data, numbers, skip=0, seed=0, batch_size=8):
    """Images and targets of whole epochs, as the trainer reads them."""
    reset_accelerator()
    loader = Accelerator(cpu=True).prepare(create_loaders(data, batch_size, 4, seed, cpu=True)[0])
    found = []
    for epoch in numbers:
        loader.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        batches = list(skip_first_batches(loader, skip) if skip else loader)
        assert len(batches) == len(loader) - skip
        found.append(batches)
    return found


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_repeats_whatever_came_before_it_and_after_a_resume(shards, workers):
    data = config(shards, workers)
    zero, one = epochs(data, [0, 1])
    assert not same(zero, one), "epochs differ"
    random.seed(1), torch.manual_seed(1)  # nothing global may matter
    assert same(epochs(data, [1], skip=2)[0], one[2:])
    assert not same(epochs(data, [0], seed=5)[0], zero)
    assert len(zero) == 6 and all(len(images) == 8 for images, _ in zero)


class StoppedError(Exception):
    pass


@pytest.mark.sampled
def test_a_run_stopped_within_an_epoch_ends_in_the_same_bits(shards, tmp_path):
    def trained(output, stop_at=None):
        reset_accelerator()
        torch.manual_seed(0)
        loaders = create_loaders(config(shards, 2), 8, 4, cpu=True)
        backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 8), num_classes=3)
        settings = TrainConfig(str(output), epochs=2, batch_size=8, lr=0.02, cpu=True, checkpoint_steps=4)
        run = Trainer(hierens.hierensify(backbone, 2, init="reinit", looped={}), settings, *loaders)
        finish = run._finish_step

        def finish_or_stop(loss):
            finish(loss)
            if run.state.step == stop_at:
                raise StoppedError

        run._finish_step = finish_or_stop
        run.fit()
        return (output / "model" / "model.safetensors").read_bytes()

    undisturbed = trained(tmp_path / "a")
    with pytest.raises(StoppedError):
        trained(tmp_path / "b", stop_at=11)  # of 12; the checkpoint is of step 8, the second of the second epoch
    assert trained(tmp_path / "b") == undisturbed


def test_all_that_can_be_read_is_validated_once_and_the_rest_is_counted(shards):
    for workers in (0, 2):
        _, val = create_loaders(config(shards, workers), 8, 4, cpu=True)
        targets = torch.cat([targets for _, targets in val])
        expected = [number % 3 for number in range(21) if number != 4]
        assert sorted(targets.tolist()) == sorted(expected)
        read, skipped, names = val.dataset.unreadable.counts
        assert (read, skipped) == (20, 1) and "validation00004" in names[0] and "truncated" in names[0]
        assert sum(len(targets) for _, targets in val) == 20 and val.dataset.unreadable.counts[1] == 1, "each pass anew"


def test_the_order_depends_on_workers_and_says_so(shards):
    train, val = create_loaders(config(shards, 2), 8, 4, cpu=True)
    assert data_signature(train) == data_signature(val) == {"processes": 1, "workers": 2}
    assert data_signature(create_loaders(config(shards), 8, 4, cpu=True)[0]) == {"processes": 1, "workers": 1}
    assert not same(epochs(config(shards), [0])[0], epochs(config(shards, 2), [0])[0])


@pytest.mark.sampled
def test_two_processes_share_shards_without_waiting_for_each_other(shards, tmp_path):
    """Shards do not divide evenly in validation (3 of them), and batches are counted over both processes."""
    settings = json.dumps(dataclasses.asdict(config(shards)))
    command = script("read_shards", settings, tmp_path, processes=2)
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    for workers in (0, 2):
        first, second = (json.loads((tmp_path / f"{rank}-{workers}.json").read_text()) for rank in (0, 1))
        for epoch in (0, 1):
            sizes = [[len(batch) for batch in part["train"][epoch]] for part in (first, second)]
            assert sizes[0] == sizes[1] and set(sizes[0]) == {4}
        numbers = [{tuple(row) for batch in part["train"][0] for row in batch} for part in (first, second)]
        assert min(len(seen) for seen in numbers) > 15 and not numbers[0] & numbers[1], "each reads its own shards"
        assert sorted(first["val"] + second["val"]) == sorted(number % 3 for number in range(21) if number != 4)
        assert len(first["val"]) != len(second["val"])
        assert first["signature"] == {"processes": 2, "workers": max(workers, 1)}
        assert first["reported"] == second["reported"] == [20, 1]


def test_hugging_face_streams(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # seconds after every pass
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    for split, count in (("train", 3), ("validation", 2)):
        for part in range(count):
            stored = [{"bytes": jpeg(10 * part + i), "path": f"{split}{part}-{i}.jpg"} for i in range(12)]
            if part == 1:
                stored[3]["bytes"] = stored[3]["bytes"][:300]
            rows = {"image": stored, "label": [i % 3 for i in range(12)]}
            table = datasets.Dataset.from_dict(rows, features=features)
            table.to_parquet(tmp_path / f"{split}-{part:05d}-of-{count:05d}.parquet")
    for workers in (0, 2):
        data = config("", workers, f"hfids/{tmp_path}", num_samples=36)
        zero, one = epochs(data, [0, 1])
        assert not same(zero, one) and same(epochs(data, [1], skip=1)[0], one[1:])
        _, val = create_loaders(data, 8, 4, cpu=True)
        assert sum(len(targets) for _, targets in val) == 23
        read, skipped, names = val.dataset.unreadable.counts
        assert (read, skipped) == (23, 1) and names[0].startswith("validation1-3.jpg")
    with pytest.raises(ValueError, match=r"3 shards for 1 processes with 4 workers"):
        create_loaders(dataclasses.replace(data, workers=4), 8, 4, cpu=True)
    with pytest.raises(ValueError, match="num_samples"):
        create_loaders(dataclasses.replace(data, num_samples=None), 8, 4, cpu=True)


def test_missing_shards_and_packages_say_so(shards, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="4 shards for 1 processes with 5 workers"):
        create_loaders(config(shards, 5), 8, 4)
    with pytest.raises(ValueError, match="48 images, fewer than one batch of 64"):
        create_loaders(config(shards), 64, 4)
    with pytest.raises(ValueError, match="data_dir is needed"):
        create_loaders(config(""), 8, 4)
    with pytest.raises(ValueError, match="num_samples"):
        create_loaders(config(shards, train_split="train-{0000..0003}.tar"), 8, 4)
    with pytest.raises(ValueError, match="use hfds/, hfids/ or wds/"):
        create_loaders(config(shards, dataset="tfds/mnist"), 8, 4)
    counted = config(shards, train_split="train-{0000..0003}.tar|40")
    assert len(create_loaders(counted, 8, 4)[0]) == 5
    monkeypatch.setattr("hierens.training.data.loaders.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e ".*\[data\]"'):
        create_loaders(config(shards), 8, 4)


def test_a_lost_shard_is_counted(tmp_path):
    root = write_shards(write_shards(tmp_path / "s"), "validation", shards=3, images=4)
    (root / "validation-0001.tar").unlink()
    _, val = create_loaders(config(root), 8, 4, cpu=True)
    assert sum(len(targets) for _, targets in val) == 8
    assert "validation-0001.tar" in val.dataset.unreadable.counts[2][0]
