"""The examples as a user runs them: from shards with damage in them, and by the paper's CIFAR recipe."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_cifar
import train_retrieval

import hierens
from support.made_up import write_cifar, write_folders, write_shards
from support.processes import environment, several

EXAMPLES = Path(__file__).parents[1] / "examples"


def records(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("classes", [pytest.param(10, marks=pytest.mark.slow), 100])
def test_the_cifar_recipe_runs(tmp_path, monkeypatch, capsys, classes):
    write_cifar(tmp_path, classes)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    flags = ["--small", "--epochs", "1", "--batch-size", "10", "--val-batch-size", "20", "--workers", "0", "--cpu"]
    where = ["--data-dir", str(tmp_path), "--dataset", f"torch/cifar{classes}", "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *where, *flags])
    train_cifar.main()
    assert re.search(r"\n\| +4 \| +16 \|", capsys.readouterr().out), "a row for each of five depths"
    model = hierens.from_pretrained(tmp_path / "run" / "model")
    assert model.num_classes == classes and len(model.macs()) == 5
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["train"]["lr"], run["train"]["weight_decay"], run["train"]["schedule"]) == (0.1, 5e-4, "cosine")


def test_the_cifar_recipe_is_the_papers():
    run = train_cifar.recipe("torch/cifar100", small=False)
    train, data = run.train, run.data
    assert (run.model.backbone, train.epochs, train.batch_size, train.momentum) == ("hne_resnet50_cifar", 200, 128, 0.9)
    assert (train.optimizer, train.alpha, train.temperature) == ("sgd", 0.5, 2.0)
    assert (data.augment, data.pad, data.hflip, data.color_jitter) == ("crop_flip", 4, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"one of torch/cifar10, torch/cifar100, got 'digits'"):
        train_cifar.recipe("digits", small=False)


@pytest.mark.parametrize(("flags", "depths"), [(["--distance", "mse"], 3), (["--blocks", "1", "--per-class", "3"], 1)])
def test_the_retrieval_example_runs(tmp_path, monkeypatch, capsys, flags, depths):
    made = dict.fromkeys(("blue", "green", "other", "red", "zebra"), 4)  # the last is held out
    write_folders(tmp_path, {"train": made, "test": made})
    command = ["train_retrieval.py", "--data-dir", str(tmp_path), "--batch-size", "8", *flags]
    monkeypatch.setattr(sys, "argv", [*command, "--output-dir", str(tmp_path / "model")])
    train_retrieval.main()
    assert capsys.readouterr().out.count("100.00 | 100.00") >= depths, "one class in the index"
    model = hierens.from_pretrained(tmp_path / "model")
    assert model.num_classes == 0 and model.embed(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    assert model.depths == depths
    monkeypatch.setattr(sys, "argv", [*command, "--batch-size", "99"])
    with pytest.raises(ValueError, match="images are fewer than a batch of 99: set --batch-size"):
        train_retrieval.main()


def test_recall_is_that_of_a_plain_search():
    class Model(torch.nn.Module):
        """Two leaves, whose embeddings are two colours of the first pixel."""

        sizes, leaves = (1, 2), 2

        def forward(self, x, reduce=False):
            return torch.stack([x[:, :2, 0, 0], x[:, 1:, 0, 0]], 1)

    def some(count, seed):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (count, 2, 2, 3), dtype=torch.uint8, generator=generator)
        return train_retrieval.Images(pixels, torch.randint(0, 4, (count,), generator=generator))

    data = train_retrieval.Data(some(1, 0), some(40, 1), some(30, 2))
    found = train_retrieval.recalls(Model(), data)
    index, queries = (train_retrieval._leaf_embeddings(Model(), of) for of in (data.index, data.queries))
    for k in (1, 10):
        hits = 0
        for query, label in zip(queries, data.queries.labels, strict=True):
            cosines = [float(torch.cosine_similarity(query[0], stored.mean(0), dim=0)) for stored in index]
            nearest = sorted(range(40), key=lambda row: -cosines[row])[:k]
            hits += any(data.index.labels[row] == label for row in nearest)
        assert found[f"full_{k}"][0] == pytest.approx(100 * hits / 30)
    assert found["full_1"][1] == found["same_1"][1] and found["concat_1"][0] == found["same_1"][0]
    assert list(found) == [f"{name}_{k}" for name in ("full", "same", "concat") for k in (1, 10)]


def from_shards(root, output, size, processes=1, backbone="mobilenetv2_075", **settings):
    """`train_imagenet.py` in processes of its own: ImageNet's recipe on a few shards."""
    flags = {"num_classes": 5, "epochs": 1, "batch_size": 8, "val_batch_size": 8, "workers": 1, "log_steps": 1}
    command = [
        *several(processes),
        str(EXAMPLES / "train_imagenet.py"),
        "--dataset",
        "wds/made-up",
        "--data-dir",
        str(root),
    ]
    command += ["--output-dir", str(output), "--cpu", "--backbone", backbone, "--input-size", "3", *[str(size)] * 2]
    for name, value in (flags | settings).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_report(output, directory):
    found = re.findall(r"epoch 1: (\d+) unreadable (\w+) images were skipped, first: .*made_up_\d+.*", output)
    logged = {key: value for record in records(directory) for key, value in record.items() if "readable_" in key}
    assert {f"unreadable_{part}": int(count) for count, part in found} == logged
    assert logged["unreadable_validation"] == 1 and logged["unreadable_training"] >= 3
    assert len((directory / "unreadable.txt").read_text().splitlines()) >= 4


def imagenet_shaped(root):
    sizes = ((500, 375), (333, 500), (120, 90), (640, 480))
    write_shards(root, "train", shards=4, images=10, classes=5, damaged=(3, 18, 25), sizes=sizes)
    return write_shards(root, "validation", shards=3, images=5, classes=5, damaged=(7,), sizes=sizes)


@pytest.mark.slow
def test_two_processes_train_from_shards(tmp_path):
    root = imagenet_shaped(tmp_path / "made_up_1")
    output = from_shards(root, tmp_path / "run", 32, processes=2, backbone="resnet8_cifar", blocks=3)
    check_report(output, tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert len(losses) == 5, "20 images of each process, 4 per batch"


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mobilenetv2_075", "hne_mobilenetv2_075"])
def test_the_imagenet_recipe_trains_from_shards(tmp_path, backbone):
    root = imagenet_shaped(tmp_path / "made_up_1")
    check_report(from_shards(root, tmp_path / "run", 224, backbone=backbone, workers=2), tmp_path / "run")
