"""The models that travel with the repository: they load, and their cards are what the Hub takes."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config

import hierens
from hierens.inference.policies import load_policy

MODELS = sorted(path.parent for path in (Path(__file__).parents[1] / "models").glob("*/config.json"))


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_model_of_the_gallery_is_whole_and_small(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 30e6
    model, policy = hierens.from_pretrained(folder), load_policy(folder)
    assert len(policy.thresholds) == model.depths - 1
    assert len(json.loads((folder / "config.json").read_text())["label_names"]) == model.num_classes
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm" and len(card.data.eval_results) == model.depths
    assert f'from_pretrained("models/{folder.name}")' in card.text and (folder / "accuracy.png").is_file()


def test_the_digits_are_read():
    model = hierens.from_pretrained(MODELS[0].parent / "digits-tree")
    transform, digits = create_transform(**resolve_model_data_config(model)), load_digits()
    scans = (digits.images[::9] * 255 / 16).round().astype("uint8")
    logits = model(torch.stack([transform(Image.fromarray(scan)) for scan in scans]))
    assert (logits.argmax(-1).numpy() == digits.target[::9]).mean() > 0.98
