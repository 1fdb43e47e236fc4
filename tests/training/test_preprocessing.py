"""How a saved model's images are prepared: as its run did it, or as its config says."""

import dataclasses
import json

import pytest
import timm
import torch
from PIL import Image

import hierens
from hierens.training.config import to_json
from hierens.training.data.transforms import create_transform
from hierens.training.preprocessing import data_config, label_names
from hierens.training.presets import PRESETS


@pytest.fixture(scope="module")
def model():
    return hierens.hierensify(timm.create_model("resnet8_cifar", in_chans=1, num_classes=3), 2, looped={}).eval()


def test_the_config_says_how(model, tmp_path):
    model.pretrained_cfg.update(input_size=(1, 16, 16), mean=(0.25,), std=(0.5,), crop_pct=0.5)
    model.save_pretrained(tmp_path / "model")
    loaded = hierens.from_pretrained(tmp_path / "model")
    config = data_config(loaded, tmp_path / "model")
    assert (config.input_size, config.mean, config.std, config.crop_pct) == ((1, 16, 16), (0.25,), (0.5,), 0.5)
    image = Image.new("L", (32, 32), 255)
    image.paste(0, (8, 8, 24, 24))  # the middle half is black, and all that is left
    x = create_transform(config, training=False)(image)
    assert torch.equal(x, torch.full((1, 16, 16), -0.5)) and data_config(loaded, "user/name") == config


def test_the_run_beside_the_model_knows_better(model, tmp_path):
    run = PRESETS["fashion-mnist"]  # pads 28 pixels to 32, which no config of timm's could say
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, pad=2, data_dir="elsewhere", max_pixels=99))
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    model.pretrained_cfg.update(input_size=(1, 32, 32))
    model.save_pretrained(tmp_path / "model")
    config = data_config(hierens.from_pretrained(tmp_path / "model"), tmp_path / "model")
    assert (config.augment, config.pad, config.data_dir, config.max_pixels) == (run.data.augment, 2, "", 99)
    model.pretrained_cfg.update(input_size=(1, 16, 16))
    assert data_config(model, tmp_path / "model").augment == "imagenet", "a run of another model's"


def test_names_of_classes(model, tmp_path):
    assert label_names(model) is None
    for names, expected in (
        (["a", "b", "c"], ["a", "b", "c"]),
        ({"0": "a", "2": "c"}, ["a", "1", "c"]),
        ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
        (["a"], None),
    ):
        model.pretrained_cfg.update(num_classes=3, label_names=names)
        model.save_pretrained(tmp_path)
        assert label_names(model) == label_names(hierens.from_pretrained(tmp_path)) == expected
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": ["x", "y", "z"]}))  # as timm does it
    assert label_names(hierens.from_pretrained(tmp_path)) == ["x", "y", "z"]
