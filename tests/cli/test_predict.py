"""`hierens predict`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import hierens as library
from hierens.inference.policies import Confidence, save_policy
from hierens.training.data.loaders import create_datasets
from hierens.training.presets import load_run
from support.command_line import hierens

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path):
    """Three digits, as they are held out in training, in files."""
    scans = load_digits().images[:3]
    for number, scan in enumerate(scans):
        Image.fromarray((scan * (255 / 16)).round().astype(np.uint8)).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def test_answers_are_the_models_on_images_prepared_as_in_training(trained, images):
    directory, *_ = trained
    name = directory / "run0" / "model"
    model, (_, held_out) = library.from_pretrained(name), create_datasets(load_run(name.parent / "run.json").data)
    x = torch.stack([held_out.transform(Image.open(file)) for file in images])
    for depth in (0, 1):
        done = hierens("predict", name, *images, "--depth", depth, "--top", 3, "--json")
        assert done.code == 0, done.err
        answers = json.loads(done.out)["answers"]
        best, classes = model(x, depth=depth).double().softmax(-1).topk(3)
        assert [[likely["class"] for likely in answer["top"]] for answer in answers] == classes.tolist()
        for answer, expected in zip(answers, best.tolist(), strict=True):
            assert [likely["probability"] for likely in answer["top"]] == pytest.approx(expected, abs=1e-5)
            assert answer["networks"] == 2**depth and answer["macs"] == model.macs()[depth]


def test_a_policy_answers_and_classes_have_names(trained, images, tmp_path):
    directory, *_ = trained
    model = library.from_pretrained(directory / "run0" / "model")
    model.pretrained_cfg["label_names"] = [f"digit {number}" for number in range(10)]
    model.save_pretrained(tmp_path / "model", policy=Confidence((0.0,)))
    shown = hierens("predict", tmp_path / "model", images[0], "--top", 1).out.splitlines()[-1]
    assert "digit " in shown and f"{images[0]}" in shown and shown.split("|")[4].strip() == "1"
    (tmp_path / "other").mkdir()
    save_policy(Confidence((2.0,)), tmp_path / "other")
    done = hierens("predict", tmp_path / "model", images[0], "--policy", tmp_path / "other", "--json")
    (answer,) = json.loads(done.out)["answers"]
    assert answer["networks"] == 2 and len(answer["top"]) == 5


def test_folders_stand_for_their_images_sorted_by_path(images, tmp_path):
    folder = tmp_path / "folder"
    for name, image in (("b.PNG", 0), ("a/z.jpeg", 1), ("c.png", 2)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(images[image]).save(folder / name, "png")
    (folder / "notes.txt").write_text("no image")
    (folder / "a" / "bad.jpg").write_text("no image")
    done = hierens("predict", ROOT / "models" / "digits-tree", images[2], folder, "--depth", 3, "--top", 1)
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.out.splitlines()[2:]]
    names = [images[2], folder / "a" / "z.jpeg", folder / "b.PNG", folder / "c.png"]
    assert rows == [[str(name), label] for name, label in zip(names, "2102", strict=True)]
    assert done.code == 1 and f"error: {folder}/a/bad.jpg: it is no image" in done.err


def test_bad_images_are_named_and_the_others_answered(trained, images, tmp_path):
    directory, *_ = trained
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(images[1].read_bytes()[:-30])
    bad = [tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "missing.png"]
    done = hierens("predict", directory / "run0" / "model", images[0], *bad, images[2], "--json")
    record = json.loads(done.out)
    assert done.code == 1 and [answer["image"] for answer in record["answers"]] == [str(images[0]), str(images[2])]
    assert [failed["image"] for failed in record["failed"]] == [str(file) for file in bad]
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3 and "no image" in lines[0] and "cut short" in lines[1] and "No such file" in lines[2]
