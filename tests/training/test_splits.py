"""Splits and classes: what a mistyped split, a missing class folder or a link would spoil is refused, or said."""

import dataclasses
import json
import os
import warnings

import pytest
from PIL import Image

import hierens as library
from hierens.export.export import MANIFEST
from hierens.training.config import DataConfig
from hierens.training.data.loaders import class_names, count_classes, create_datasets, create_held_out, create_loaders
from support.command_line import hierens
from support.made_up import jpeg, write_cifar, write_folders, write_shards

SMALL = {"input_size": (3, 16, 16), "mean": (0.5,), "std": (0.25,), "workers": 0}
FLAGS = ["--input-size", 3, 16, 16, "--workers", 0, "--epochs", 1, "--batch-size", 6, "--cpu", "--blocks", 2]
FLAGS += ["--backbone", "resnet8_cifar"]


def config(root, **settings):
    return DataConfig("", str(root), **SMALL | settings)


def refused(*arguments, **settings):
    """The one line that the error says."""
    with pytest.raises(ValueError) as caught:
        create_datasets(config(*arguments, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which folder is which split ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "flags", "words"),
    [
        (("train", "test"), [], ("val_split", "'validation'", "it holds test, train", "validation, val, valid, eval")),
        (("train", "validation"), ["--val-split", "vaildation"], ("did you mean 'validation'", "'vaildation'")),
        (("train", "validation"), ["--train-split", "trian"], ("train_split", "did you mean 'train'")),
        (("cat", "dog"), [], ("train_split", "'train'", "it holds cat, dog")),
    ],
)
def test_a_split_without_a_folder_is_named(tmp_path, there, flags, words):
    root = write_folders(tmp_path / "data", {split: {"cat": 6, "dog": 6} for split in there})
    done = hierens("train", "--data-dir", root, "--output-dir", tmp_path / "run", *flags, *FLAGS)
    last = done.err.splitlines()[-1]
    assert done.code == 1 and last.startswith("error: ") and all(word in last for word in (*words, str(root))), done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "evaluation"])
def test_timms_other_names_are_found(tmp_path, name):
    root = write_folders(tmp_path, {"training": {"cat": 4}, name: {"cat": 3}})
    train, val = create_datasets(config(root))
    assert (len(train), len(val)) == (4, 3)
    assert len(create_datasets(config(root, val_split=name))[1]) == 3


def test_any_folder_can_be_named(tmp_path):
    root = write_folders(tmp_path / "a", {"train": {"cat": 4}, "deep/test": {"cat": 3}})
    elsewhere = write_folders(tmp_path / "b", {"held_out": {"cat": 2}})
    assert len(create_datasets(config(root, val_split="deep/test"))[1]) == 3
    assert len(create_datasets(config(root, val_split=str(elsewhere / "held_out")))[1]) == 2
    train, val = create_datasets(config(root / "train", train_split="", val_split="../deep/test"))
    assert (len(train), len(val)) == (4, 3)


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_both_splits_in_one_folder_are_refused(tmp_path, dataset):
    root = write_folders(tmp_path / "data", {"train": {"cat": 4}, "validation": {"cat": 3}})
    (root / "linked").symlink_to("train")
    for settings in ({"val_split": "train"}, {"val_split": "linked"}, {"train_split": "validation"}):
        said = refused(root, **settings) if not dataset else None
        with pytest.raises(ValueError, match="training and validation images are the same"):
            create_datasets(dataclasses.replace(config(root, **settings), dataset=dataset))
        assert said is None or str(root) in said
    assert "is a slice" in refused(root, train_split="train[:50%]")


def test_named_data_sets_with_one_split_twice_are_refused(tmp_path, monkeypatch):
    shards = write_shards(write_shards(tmp_path / "shards"), "validation", shards=3)
    wds = DataConfig("wds/made-up", str(shards), **SMALL)
    cases = [
        dataclasses.replace(wds, val_split="train"),
        dataclasses.replace(wds, train_split="train-{0000..0002}.tar|36", val_split="train-{0002..0003}.tar|24"),
        DataConfig("digits", train_split="validation", **SMALL),
    ]
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    cifar = DataConfig("torch/cifar10", str(write_cifar(tmp_path / "cifar")), **SMALL)
    cases += [dataclasses.replace(cifar, train_split="trian"), dataclasses.replace(cifar, val_split="train")]
    for case in cases:
        with pytest.raises(ValueError, match="training and validation images are the same"):
            create_datasets(case)
    with pytest.raises(ValueError, match="digits has the splits train and validation, not 'vaildation'"):
        create_datasets(DataConfig("digits", val_split="vaildation", **SMALL))
    assert len(create_datasets(cifar)[0]) == 100
    assert len(create_loaders(dataclasses.replace(wds, val_split="validation"), 4, 4, cpu=True)) == 2


# --- one class map --------------------------------------------------------------------------------------------------

CLASSES = {"ape": 3, "bee": 4, "cat": 5, "dog": 6}


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("empty", [False, True])
def test_labels_do_not_shift_where_validation_lacks_a_class(tmp_path, dataset, empty):
    held_out = {"ape": 2, "cat": 3, "dog": 1}
    root = write_folders(tmp_path, {"train": CLASSES, "validation": held_out})
    if empty and not dataset:
        (root / "validation" / "bee").mkdir()
    data = dataclasses.replace(config(root), dataset=dataset)
    with pytest.warns(UserWarning, match="validation has no images of some classes of training: bee"):
        train, val = create_datasets(data)
    assert [val[i][1] for i in range(6)] == [0, 0, 2, 2, 2, 3]
    assert class_names(train) == class_names(val) == list(CLASSES) and count_classes(train) == 4


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_a_class_that_training_lacks_is_named_before_the_first_step(tmp_path, dataset):
    root = write_folders(tmp_path / "data", {"train": CLASSES, "validation": CLASSES | {"emu": 2}})
    flags = ["--dataset", dataset] if dataset else []
    done = hierens("train", *flags, "--data-dir", root, "--output-dir", tmp_path / "run", *FLAGS)
    assert done.code == 1 and not (tmp_path / "run").exists()
    assert done.err.splitlines()[-1].startswith("error: validation has classes that training does not have: emu.")


def test_a_class_folder_without_images_in_training_is_named(tmp_path):
    root = write_folders(tmp_path, {"train": CLASSES, "validation": CLASSES})
    (root / "train" / "emu" / "below").mkdir(parents=True)
    (root / "validation" / "emu").mkdir()
    (root / "train" / ".cache").mkdir()
    with pytest.warns(UserWarning, match="hold no images: emu") as caught:
        train, _ = create_datasets(config(root))
    assert count_classes(train) == 4 and len(caught) == 1


def test_hugging_face_sets_by_index_go_by_the_names_of_training(tmp_path):
    datasets = pytest.importorskip("datasets")
    for split, names in (("train", ["ape", "bee", "cat"]), ("validation", ["ape", "bee", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(6)], "label": [0, 1, 2] * 2}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    data = DataConfig(f"hfds/{tmp_path}", **SMALL)
    train, val = create_datasets(data)
    assert class_names(train) == ["ape", "bee", "cat"] and [val[i][1] for i in range(3)] == [0, 1, 2]
    streamed, _ = create_loaders(DataConfig(f"hfids/{tmp_path}", **SMALL, num_samples=6), 3, 3, cpu=True)
    assert class_names(streamed.dataset) == ["ape", "bee", "cat"]
    with pytest.raises(ValueError, match="images are the same"):
        create_datasets(dataclasses.replace(data, val_split="train"))
    assert len(create_datasets(dataclasses.replace(data, train_split="train[:4]", val_split="train[4:]"))[1]) == 2


# --- links and stray files ------------------------------------------------------------------------------------------


def linked_file(root):
    (root / "validation" / "cat" / "again.png").symlink_to("../../train/cat/1.png")


def hard_link(root):
    os.link(root / "train" / "cat" / "1.png", root / "validation" / "cat" / "again.png")


def linked_folder(root):
    (root / "validation" / "dog2").symlink_to("../train/dog")
    (root / "validation" / "dog2").rename(root / "validation" / "bee")


@pytest.mark.parametrize(("link", "count"), [(linked_file, 1), (hard_link, 1), (linked_folder, 6)])
def test_files_in_both_splits_are_refused_with_an_example(tmp_path, link, count):
    root = write_folders(tmp_path, {"train": CLASSES, "validation": {"cat": 2}})
    link(root)
    said = refused(root)
    assert said.startswith(f"{count} of the training images are validation images as well, such as {root}/train/")
    assert f"the same file as {root}/validation/" in said


def test_a_split_within_the_other_is_refused(tmp_path):
    root = write_folders(tmp_path, {"cat": {"here": 4}, "validation": {"cat": 3}})
    assert refused(root, train_split="").startswith("3 of the training images are validation images as well")


def test_links_that_lead_nowhere_near_the_other_split_are_fine(tmp_path):
    store = write_folders(tmp_path / "store", {"all": {"a": 3, "b": 3}})
    root = tmp_path / "data"
    for split, name in (("train", "a"), ("validation", "b")):
        (root / split).mkdir(parents=True)
        (root / split / "cat").symlink_to(store / "all" / name)
    os.link(store / "all" / "b" / "0.png", tmp_path / "kept.png")  # several names, but in one split alone
    (root / "validation" / "cat" / "gone.png").symlink_to("nowhere.png")
    train, val = create_datasets(config(root))
    assert (len(train), len(val)) == (3, 4)


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_links_in_circles_are_refused(tmp_path, target):
    root = write_folders(tmp_path / "data", {"train": {"cat": 4, "dog": 4}, "validation": {"cat": 4}})
    (root / "train" / "cat" / "loop").symlink_to(target)
    said = refused(root)
    assert ("is a link to" in said and "again and again" in said) or "validation images as well" in said
    with pytest.raises(ValueError, match="again and again"):
        create_held_out(config(root, val_split="train"))


def test_images_in_no_class_folder_are_refused(tmp_path):
    root = write_folders(tmp_path, {"train": {"cat": 4}, "validation": {"cat": 4}})
    (root / "train" / "stray.png").write_bytes((root / "train" / "cat" / "1.png").read_bytes())
    assert refused(root).startswith(f"{root}/train/stray.png is in no class folder")


def test_a_link_to_itself_is_an_image_that_cannot_be_read(tmp_path):
    root = write_folders(tmp_path, {"train": {"cat": 4}, "validation": {"cat": 4}})
    (root / "train" / "cat" / "self.png").symlink_to("self.png")
    assert len(create_datasets(config(root))[0]) == 5


# --- colours ----------------------------------------------------------------------------------------------------------


def test_lost_colours_are_said_once(tmp_path):
    root = write_folders(tmp_path, {"train": {"cat": 4}, "validation": {"cat": 4}})
    data = config(root, input_size=(1, 16, 16))
    for make in (create_datasets, create_held_out):
        with pytest.warns(UserWarning, match="the images have colours, and input_size has 1 channel") as caught:
            make(data)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_datasets(config(root))
        for file in root.rglob("*.png"):  # grey in everything but the format
            Image.open(file).convert("L").convert("RGB").save(file)
        create_datasets(data)


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A run on folders of red, green and blue images, which are no challenge."""
    directory = tmp_path_factory.mktemp("folders")
    root = write_folders(
        directory / "data", {"train": dict.fromkeys(COLOURS, 20), "validation": dict.fromkeys(COLOURS, 4)}
    )
    flags = ["--data-dir", root, "--output-dir", directory / "run", "--augment", "none", "--lr", 0.05]
    done = hierens("train", *flags, *FLAGS, "--epochs", 6)
    assert done.code == 0, done.err
    return directory


COLOURS = ("red", "green", "blue")


def test_class_names_are_saved_with_the_model_and_shown(folder_run, tmp_path):
    run = folder_run / "run"
    names = sorted(COLOURS)
    for folder in (run / "model", run / "checkpoints" / "best"):
        assert json.loads((folder / "config.json").read_text())["label_names"] == names
    assert "Classes, in order: blue, green, red." in (run / "model" / "README.md").read_text()
    image = folder_run / "data" / "validation" / "red" / "0.png"
    (answer,) = json.loads(hierens("predict", run / "model", image, "--json").out)["answers"]
    assert answer["top"][0]["name"] == "red" and answer["top"][0]["class"] == 2
    assert "| red " in hierens("predict", run / "model", image).out
    pytest.importorskip("onnxscript")
    assert hierens("export", run / "model", tmp_path, "--depths", 0).code == 0
    assert json.loads((tmp_path / MANIFEST).read_text())["label_names"] == names


def test_evaluation_goes_by_the_models_classes(folder_run, tmp_path):
    model = folder_run / "run" / "model"
    expected = json.loads(hierens("eval", model, "--json").out)["accuracy"]
    assert expected[-1] == 100
    root = write_folders(tmp_path / "data", {"validation": {"red": 3, "green": 3}})  # no training split, no blue
    with pytest.warns(UserWarning, match="no images of some classes of the model: blue"):
        done = hierens("eval", model, "--data-dir", root, "--json")
    assert done.code == 0 and json.loads(done.out)["accuracy"] == expected
    unnamed = library.from_pretrained(model)
    del unnamed.pretrained_cfg["label_names"]
    unnamed.save_pretrained(tmp_path / "unnamed")
    flags = ["--input-size", 3, 16, 16, "--workers", 0, "--augment", "none", "--data-dir"]
    done = hierens("eval", tmp_path / "unnamed", *flags, root)
    assert done.code == 1 and "has 2 classes and the model 3 without names" in done.err
    assert hierens("eval", tmp_path / "unnamed", *flags, folder_run / "data").code == 0
    (root / "validation" / "red").rename(root / "validation" / "pink")
    done = hierens("eval", model, "--data-dir", root)
    assert done.code == 1 and "has classes that the model does not have: pink. It has blue, green, red" in done.err
    for number, name in enumerate(sorted(COLOURS)):
        (folder := tmp_path / "wnids" / "validation" / f"n{number}").parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(folder_run / "data" / "validation" / name)
    with pytest.warns(UserWarning, match="have other names than the model's classes"):
        done = hierens("eval", model, "--data-dir", tmp_path / "wnids", "--json")
    assert json.loads(done.out)["accuracy"] == expected


def test_too_few_classes_are_refused_and_more_go_by_number(tmp_path):
    root = write_folders(tmp_path / "data", {"train": CLASSES, "validation": CLASSES})
    flags = ["--data-dir", root, "--output-dir", tmp_path / "run", *FLAGS]
    done = hierens("train", *flags, "--num-classes", 3)
    assert done.code == 1 and "num_classes is 3, but the data set has 4 classes" in done.err
    assert not (tmp_path / "run").exists()
    assert hierens("train", *flags, "--num-classes", 6).code == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["label_names"] == ["ape", "bee", "cat", "dog", "4", "5"]
