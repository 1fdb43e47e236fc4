"""The examples as a user runs them: from shards with damage in them, and by the paper's CIFAR recipe."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import train_cifar

import hierens
from support.made_up import write_cifar, write_shards
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
