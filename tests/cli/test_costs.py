"""`hierens profile` and `hierens zoo`."""

import json

import pytest
import timm

import hierens as library
from support.command_line import hierens

CIFAR = ["resnet8_cifar", "--size", 1, 32, 32, "--json"]


def test_a_saved_model_and_the_same_in_a_table(trained):
    directory, *_ = trained
    name = directory / "run0" / "model"
    done = hierens("profile", name, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["macs"] for row in rows] == list(library.from_pretrained(name).macs())
    shown = hierens("profile", name).out.splitlines()
    assert len(shown) == 4 and [cell.strip() for cell in shown[3].split("|")[1:3]] == ["1", "2"]


def test_a_backbone_becomes_a_tree_or_gets_exits():
    tree = json.loads(hierens("profile", *CIFAR, "--blocks", 3).out)
    expected = library.hierensify(timm.create_model("resnet8_cifar", in_chans=1).eval(), 3)
    assert [row["macs"] for row in tree["rows"]] == list(expected.macs((1, 32, 32))) and tree["unit"] == "networks"
    exits = json.loads(hierens("profile", *CIFAR, "--method", "multi_exit", "--exits", 2).out)
    assert [row["leaves"] for row in exits["rows"]] == [1, 2] and exits["unit"] == "exits"


def test_sizes_that_a_backbone_does_not_take():
    done = hierens("profile", "test_vit", "--size", 3, 50, 50, "--json")
    assert done.code == 1 and "takes no images of size (3, 50, 50)" in done.err and not done.out


def test_one_model_of_the_zoo_with_its_places():
    done = hierens("zoo", "resnet10t", "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["models"]
    backbone = timm.create_model("resnet10t")
    assert found["at"] == library.hierensify(backbone)._model_args["at"]
    assert [place["name"] for place in found["places"]] == [point.name for point in library.cut_points(backbone)]
    macs = library.hierensify(backbone).branch_macs((3, 176, 176))
    assert found["shares"] == pytest.approx([count / sum(macs[:4]) for count in macs[:4]], abs=0.01)
    assert "layer2" in hierens("zoo", "resnet10t").out


def test_many_models_of_the_zoo_and_those_that_cannot_be_cut():
    shown = hierens("zoo", "test_convnext*").out.splitlines()
    assert len(shown) == 5 and "test_convnext2" in shown[3]
    done = hierens("zoo", "test_resnet", "--blocks", 999)
    assert done.code == 1 and "cannot be cut into 999 blocks: --blocks 999 is more than" in done.err and not done.out
