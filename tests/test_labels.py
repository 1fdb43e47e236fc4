"""Names of classes: read, given, forgotten with the classes that they named, and said by cards."""

import json

import pytest
import timm

import hierens
from hierens.core.labels import label_names, name_labels
from hierens.hub.cards import model_card
from hierens.hub.saving import save_config

MAKERS = {
    "tree": lambda backbone: hierens.hierensify(backbone, 2, looped={}),
    "exits": lambda backbone: hierens.multi_exit(backbone, 2),
    "both": lambda backbone: hierens.tree_with_exits(backbone, 2, looped={}),
}


@pytest.fixture(params=MAKERS)
def model(request):
    backbone = timm.create_model("resnet8_cifar", channels=(8, 8, 8), in_chans=1, num_classes=3)
    model = MAKERS[request.param](backbone)
    name_labels(model, ["ape", "bee", "cat"])
    return model


def test_names_stay_with_the_classes_that_they_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert label_names(hierens.from_pretrained(tmp_path)) == ["ape", "bee", "cat"]
    model.pretrained_cfg["label_descriptions"] = {"ape": "hairy"}
    model.reset_classifier(3)
    assert label_names(model) == ["ape", "bee", "cat"]
    model.reset_classifier(2)
    assert label_names(model) is None and not {"label_names", "label_descriptions"} & {*model.pretrained_cfg}
    model.reset_classifier(3)
    assert label_names(model) is None, "these are three others"
    model.save_pretrained(tmp_path)
    assert "label_names" not in json.loads((tmp_path / "config.json").read_text())


def test_models_made_of_a_model_have_its_names(model):
    made = [model.at_depth(0), *([model.eval().fuse()] if hasattr(model, "fuse") else [])]
    assert all(label_names(other) == ["ape", "bee", "cat"] for other in made)


def test_cards_and_configs_alone_have_them(model, tmp_path):
    assert "Classes, in order: ape, bee, cat." in model_card(model)
    assert "Classes, in order: x, y, z." in model_card(model, label_names=["x", "y", "z"])
    save_config(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["ape", "bee", "cat"]


def test_classes_beyond_the_names_go_by_number_and_too_few_are_refused(model):
    with pytest.raises(ValueError, match="num_classes is 3, but the data set has 4 classes"):
        name_labels(model, list("abcd"))
    assert label_names(model) == ["ape", "bee", "cat"]
    name_labels(model, ["a"])
    assert label_names(model) == ["a", "1", "2"]
