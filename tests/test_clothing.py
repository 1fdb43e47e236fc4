"""Fine-tuning compared: validation images choose thresholds, test images judge; the first tree is published."""

import dataclasses
import json
import shutil

import clothing
import gallery
import numpy as np
import pytest
import timm
import torch
from comparison import pretrained, recipes, records
from comparison.differences import over_last, over_one
from comparison.train import train_missing
from PIL import Image
from safetensors.torch import load_file, save_file

import hierens
from hierens.evaluation.reporting import Group
from hierens.inference.policies import load_policy

BACKBONE = {"backbone": "resnet8_cifar", "backbone_args": {"channels": [4, 4, 8]}}
SPLITS = {"train": 4, "validation": 3, "test": 2}  # images a class


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All rows of one seed, three of the backbone alone, on made images; the folder of everything."""
    root, patch = tmp_path_factory.mktemp("clothing"), pytest.MonkeyPatch()
    for contrast, (split, count) in enumerate(SPLITS.items(), 1):
        for label, name in enumerate(clothing.CLASSES):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng([contrast, index]).integers(0, 25 * contrast, (24, 20, 3))
                pixels = noise + 18 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    weights = root / "weights.safetensors"
    torch.manual_seed(0)
    backbone = timm.create_model(BACKBONE["backbone"], **BACKBONE["backbone_args"])
    with torch.no_grad():
        backbone.get_classifier().weight.mul_(20)  # an almost untrained network would lose log 10 on any images
    save_file(backbone.state_dict(), weights)
    recipe = recipes.RECIPES["clothing"]
    small = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, input_size=(3, 16, 16)),
        model=dataclasses.replace(recipe.model, drop_path=None, **BACKBONE),
        train=dataclasses.replace(recipe.train, epochs=1, batch_size=8, warmup_epochs=0),
    )
    patch.setitem(recipes.RECIPES, "clothing", small)
    patch.setattr(records, "RECORDS", root / "records")
    rows = {
        name: dataclasses.replace(row, seeds=row.seeds if name == "single" else (0,))
        for name, row in recipes.FINE_TUNED.items()
    }
    patch.setattr(recipes, "FINE_TUNED", rows)
    train_missing("clothing", str(root / "images"), root / "runs", weights=str(weights))
    yield root
    patch.undo()


def test_the_tree_and_the_backbones_come_before_the_rest():
    queue = list(recipes.queue("clothing"))
    assert queue[:4] == [("tree", 0), ("single", 0), ("tree", 1), ("single", 1)]
    assert list(recipes.queue("clothing", ["single"], [1])) == [("single", 1)]


@pytest.mark.sampled
def test_the_tree_fits_into_thirty_megabytes_of_half_precision():
    model = recipes.RECIPES["clothing"].model
    backbone = timm.create_model(model.backbone, num_classes=len(clothing.CLASSES))
    counts = [hierens.hierensify(backbone, blocks).parameter_counts()[-1] for blocks in (model.blocks, 4)]
    assert 2 * counts[0] < 30e6 < 2 * counts[1], "four networks do, eight do not"


def test_test_images_judge_and_validation_images_choose(trained):
    groups = records.read_records("clothing")
    assert {name: len(group.records) for name, group in groups.items()} == {
        "tree": 1,
        "single": 3,
        "deep-ensemble": 1,
    }
    tree, text = groups["tree"].records[0], json.dumps(groups["tree"].records[0])
    assert tree["test_images"] == 20 and len(tree["validation"]["accuracy"]) == len(tree["accuracy"]) == 3
    assert len(tree["thresholds"]["accuracy"]) == len(records.SHARES)
    assert str(trained) not in text and '"weights": "FILE"' in text, "a record names no folder of a machine"
    model = hierens.from_pretrained(trained / "runs" / "clothing" / "tree" / "0" / "model")
    run = recipes.configured("clothing", "tree", 0, str(trained / "images"), "")
    images = records.test_images(run, "clothing")
    pairs = [images[index] for index in range(len(images))]
    logits, labels = model(torch.stack([image for image, _ in pairs])), torch.tensor([label for _, label in pairs])
    assert tree["nll"][-1] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)
    assert tree["nll"][-1] != pytest.approx(tree["validation"]["nll"][-1], abs=1e-4)


def test_three_backbones_are_one_ensemble(trained):
    groups = records.read_records("clothing")
    ensemble, single = groups["deep-ensemble"].records[0], groups["single"]
    assert ensemble["leaves"] == [1, 3] and ensemble["macs"] == [single.macs[0], 3 * single.macs[0]]
    assert ensemble["accuracy"][0] == pytest.approx(single.mean("accuracy")[0], abs=5.1)


def test_the_page_is_made_of_records_alone(trained, tmp_path):
    page = clothing.page(tmp_path)
    assert "One of the 20 test images" in page and (tmp_path / "clothing.png").is_file()
    assert page.count("Not run yet.") == 1, "the ImageNet step alone has not been run"
    assert "tree minus ensemble of three" in page


def test_the_page_says_what_has_not_been_run(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "records" / "clothing" / "tree", tmp_path / "clothing" / "tree")
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    page = clothing.page(tmp_path)
    assert page.count("not run yet") == 2 and page.count("Not run yet.") == 2
    monkeypatch.setattr(records, "RECORDS", tmp_path / "none")
    with pytest.raises(ValueError, match="run the step train first"):
        clothing.page(tmp_path)


def test_the_first_tree_is_published_in_half_precision(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    shutil.copy(clothing.ROOT / "docs" / "gallery.md", tmp_path / "docs")
    clothing.publish(clothing.Settings("publish", str(trained / "images"), trained / "runs"))
    folder = tmp_path / "models" / "clothing-tree"
    assert {str(t.dtype) for t in load_file(folder / "model.safetensors").values()} == {"torch.float16", "torch.int64"}
    model = hierens.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    original = hierens.from_pretrained(trained / "runs" / "clothing" / "tree" / "0" / "model")
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(model(x), original(x), atol=2e-2)
    assert len(load_policy(folder).thresholds) == model.depths - 1
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(clothing.CLASSES)
    card = (folder / "README.md").read_text()
    assert "(CC0)" in card and "license: apache-2.0" in card and "base_model: timm/tf_efficientnet_lite0.in1k" in card
    sections = gallery.read_sections((tmp_path / "docs" / "gallery.md").read_text())
    assert list(sections) == list(gallery.ORDER), "it is the gallery's first, and the others stay"


def test_a_tree_that_is_not_here_is_not_published(trained, tmp_path):
    with pytest.raises(ValueError, match="train the tree of seed 0 first"):
        clothing.publish(clothing.Settings("publish", str(trained / "images"), tmp_path))
    (tmp_path / "clothing" / "tree" / "0" / "model").mkdir(parents=True)
    (tmp_path / "validation" / "sock").mkdir(parents=True)
    with pytest.raises(ValueError, match="has the classes sock"):
        clothing.publish(clothing.Settings("publish", str(tmp_path), tmp_path))


def test_weights_too_large_for_half_precision_are_refused():
    model = hierens.hierensify(timm.create_model("resnet8_cifar", channels=(4, 4, 8)), 2)
    with torch.no_grad():
        next(model.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="half precision ends at 65504"):
        gallery.rounded(model)


def test_the_gallery_stays_as_it_is_when_nothing_new_is_given():
    text = (clothing.ROOT / "docs" / "gallery.md").read_text()
    assert gallery.page(gallery.read_sections(text)) == text


def test_copies_are_compared_at_every_depth(tmp_path):
    backbone = timm.create_model("resnet8_cifar", channels=(4, 4, 8)).eval()
    tree = hierens.hierensify(backbone, 3)
    batches = [(torch.randn(5, 3, 32, 32), torch.arange(5)) for _ in range(2)]
    same = pretrained.compared(backbone, tree, batches)
    assert same["test_images"] == 10 and same["right"] == [same["backbone_right"]] * 3
    assert same["same_class"] == [10] * 3 and max(same["max_abs_difference"]) < 1e-4
    tree.break_symmetry(1.0)
    other = pretrained.compared(backbone, tree, batches)["max_abs_difference"]
    assert other[0] < 1e-4 < min(other[1:]), "noise moves every network but the first"


def test_depths_are_compared_with_one_network_and_with_one_figure():
    more = Group("tree", [1, 2], [{"seed": s, "accuracy": [50 + s, 52 + s]} for s in (0, 1)])
    less = Group("single", [1], [{"seed": s, "accuracy": [49 + 2 * s]} for s in (0, 1)])
    assert [found.mean for found in over_last(more, less)] == [0.5, 2.5]
    assert [(found.mean, found.seeds) for found in over_one(more, 50.0)] == [(0.5, 2), (2.5, 2)]
