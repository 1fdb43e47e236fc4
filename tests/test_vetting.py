"""What strangers may write into a config: a model or one clear sentence, in little memory and time."""

import json
import resource

import pytest
import timm
import torch
from hostile import ROOM, bases, little_memory, starved, storm
from safetensors.torch import load_file, save_file

import hierens
from hierens.hub import LoadError
from hierens.vetting import check_arguments, read_config


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with a saved tree and the text of its config, which tests overwrite."""
    folder, *_ = bases(tmp_path_factory.mktemp("saved"))
    return folder, (folder / "config.json").read_text()


def load(tree, **changes):
    folder, text = tree
    config = json.loads(text)
    config["model_args"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with little_memory():
        return hierens.from_pretrained(folder)


def check(count, seed, seconds):
    said, slowest = storm(count, seed)
    assert slowest[0] < seconds, f"number {slowest[1]} of seed {seed} took {slowest[0]:.1f} s of CPU"
    assert said["loaded"] < count / 2 and len(said) > 20
    return said


def test_hostile_configs_end_in_a_model_or_one_sentence():
    check(150, seed=0, seconds=20)


@pytest.mark.slow
def test_ten_thousand_hostile_configs_end_in_a_model_or_one_sentence():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    check(10_000, seed=1, seconds=60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < before + 2 * ROOM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_args": {"channels": [10**9] * 3}}, "channels is 1000000000, and 65536 is the most"),
        ({"backbone_args": {"channels": [60_000] * 3}}, "has [0-9]+ elements, and all weights in the file only"),
        ({"backbone_args": {"layers": [10**6]}}, "layers is 1000000, and 65536 is the most"),
        (
            {"backbone": "resnet18", "backbone_args": {"layers": [60_000] * 4, "channels": [4] * 4}},
            "more than [0-9]+ layers",
        ),
        ({"backbone": "resnet18", "backbone_args": {"layers": [60_000] * 400}}, "more, or larger, values than"),
        ({"backbone": "eva_giant_patch14_560", "backbone_args": {}}, "all weights in the file only"),
        ({"backbone": "test_vit", "backbone_args": {"img_size": 4096, "patch_size": 1, "embed_dim": 1}}, "cannot be"),
        ({"backbone": "hne", "backbone_args": {"backbone": "hne"}}, "names the backbone 'hne', which is no backbone"),
        ({"backbone_args": {"pretrained": True}}, "pretrained is timm's to decide, not a config's"),
        ({"backbone_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path is timm's to decide"),
        ({"backbone_args": {"pretrained_cfg": {"file": "x.pth"}}}, "pretrained_cfg is timm's to decide"),
        ({"backbone_args": [1]}, "no usable backbone_args"),
        ({"backbone_args": {"channels": [4, 4, float("nan")]}}, "NaN is no JSON"),
        ({"at": ["layer2"] * 10**6}, "is 10 MB long"),
        ({"at": ["layer2"] * 300}, "no usable list of cuts"),
        ({"branching": [4096] * 60, "leaves": 4096}, "branching has 60 levels"),
        ({"branching": [1, 1, 4096], "leaves": 4096}, "do not fit the config"),
        ({"num_classes": 10**7}, "elements, and all weights in the file only"),
        ({"looped": ["all"]}, "no usable reasons to loop"),
    ],
)
def test_what_would_explode_is_refused_first(tree, changes, message):
    with pytest.raises(LoadError, match=message) as refused:
        load(tree, **changes)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000 and not starved(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\x00", "[[[]]]" + " " * 5 * 10**6])
def test_what_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError, match=r"not valid JSON|MB long"):
        read_config(tmp_path / "config.json")


def test_weights_must_have_the_shapes_of_the_config(tree):
    folder, _ = tree
    weights = load_file(folder / "model.safetensors")
    try:
        for change, message in (
            (
                {"levels.0.block.conv1.weight": torch.zeros(4, 1, 5, 5)},
                "is 4x1x5x5 in the file and 4x1x3x3 by",
            ),
            ({"surprise": torch.zeros(2)}, "surprise is 2 in the file and missing by the config"),
        ):
            save_file(weights | change, folder / "model.safetensors")
            with pytest.raises(LoadError, match=message):
                load(tree)
        save_file({name: tensor for name, tensor in weights.items() if "fc" not in name}, folder / "model.safetensors")
        with pytest.raises(LoadError, match="is missing in the file and 40x8 by the config, and 1 more differ"):
            load(tree)
    finally:
        save_file(weights, folder / "model.safetensors")
    assert load(tree).leaves == 4


def test_a_strangers_description_names_no_files(tree):
    folder, text = tree
    config = json.loads(text)
    config["pretrained_cfg"] |= {"file": "/etc/passwd", "url": "http://elsewhere", "mean": [0.25]}
    (folder / "config.json").write_text(json.dumps(config))
    cfg = hierens.from_pretrained(folder).pretrained_cfg
    assert cfg["mean"] == [0.25] and not cfg.get("file") and not cfg.get("url")


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "swinv2_large_window12to24_192to384", "efficientnet_b8"])
def test_what_networks_are_made_with_is_allowed(name):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=21_841)
    check_arguments(timm.models.get_model_args(network))
