"""Saving and loading: the same logits by every way in, nothing unpickled, and clear words about damaged files."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from hub_server import hub_server

import hierens
from hierens.hub import LoadError, SaveError, model_card


@pytest.fixture
def model(small_backbone):
    model = hierens.hierensify(small_backbone, 3, init="reinit", seed=2).eval()
    return model.to(memory_format=torch.channels_last)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", results={"accuracy (%)": [90.0, 91.25, 92.5]})
    return tmp_path / "saved"


def test_every_way_in_gives_the_same_logits(model, saved, small_images):
    name = f"local-dir:{saved}"
    for loaded in (
        hierens.from_pretrained(saved),
        hierens.from_pretrained(str(saved)),
        timm.create_model(name, pretrained=True).eval(),
    ):
        assert isinstance(loaded, hierens.HierarchicalEnsemble) and not loaded.training
        for depth in range(3):
            assert torch.allclose(loaded(small_images, depth=depth), model(small_images, depth=depth), atol=1e-5)


def test_a_fresh_process_loads_it(saved, small_images, model):
    code = (
        "import sys, timm, torch, hierens\n"
        "x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))\n"
        f"m = timm.create_model('local-dir:{saved}', pretrained=True).eval()\n"
        "print(m(x, depth=1).double().sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == pytest.approx(model(small_images, depth=1).double().sum().item(), abs=1e-3)


def test_publishing_and_loading_over_http(saved, model, small_images, tmp_path):
    """In a process of its own, since the Hub's address is read when huggingface_hub is imported."""
    code = f"""
import timm, torch, hierens
from hierens.hub import LoadError
from hierens.policies import FixedDepth, load_policy
model = hierens.from_pretrained({str(saved)!r})
x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
results = {{"accuracy (%)": [1.0, 2.0, 3.0]}}
first = model.push_to_hub("somebody/digits", private=True, results=results, policy=FixedDepth(1))
second = model.at_depth(1).push_to_hub("somebody/digits", revision="small")
whole = hierens.from_pretrained("somebody/digits")
small = hierens.from_pretrained("somebody/digits", revision="small")
pinned = hierens.from_pretrained("somebody/digits", revision=second.rpartition("/")[2])
by_timm = timm.create_model("hf-hub:somebody/digits", pretrained=True).eval()
print([m.tree.leaves for m in (whole, small, pinned, by_timm)])
print(load_policy("somebody/digits"), load_policy("somebody/digits", FixedDepth(), revision="small"))
for m in (whole, by_timm):
    print(m(x, depth=2).double().sum().item())
for name, revision in (("somebody/else", None), ("somebody/digits", "nowhere")):
    try:
        hierens.from_pretrained(name, revision=revision)
    except LoadError as error:
        print(error)
"""
    with hub_server() as hub:
        own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | own)
        assert done.returncode == 0, done.stderr
        leaves, policies, whole, by_timm, no_repository, no_revision = done.stdout.splitlines()
        wanted = hub.created["somebody/digits"]  # the word for it differs between versions of huggingface_hub
        assert wanted.get("visibility", wanted.get("private")) in ("private", True)
        assert sorted(hub.files("main")) == ["README.md", "config.json", "model.safetensors", "policy.json"]
        assert b" 3.00 |" in hub.files("main")["README.md"]
    assert leaves == "[4, 2, 2, 4]"
    assert policies == "FixedDepth(depth=1, leaves=None) FixedDepth(depth=1, leaves=None)", "a branch has what main had"
    expected = model(small_images, depth=2).double().sum().item()
    assert float(whole) == pytest.approx(expected, abs=1e-3) and float(by_timm) == pytest.approx(expected, abs=1e-3)
    assert "somebody/else" in no_repository and "nowhere" in no_revision


def test_the_files_are_timms_layout_and_hold_no_pickle(model, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config["architecture"] == "hne" and config["num_classes"] == 10
    assert config["model_args"]["backbone"] == "resnet8_cifar"
    assert config["model_args"]["at"] == model._model_args["at"] and len(config["model_args"]["at"]) == 2
    assert not zipfile.is_zipfile(saved / "model.safetensors")


def test_sub_trees_generalised_trees_and_new_classifiers_survive(small_backbone, small_images, tmp_path):
    whole = hierens.hierensify(small_backbone, branching=[1, 3, 2])
    whole.reset_classifier(4)
    for number, model in enumerate([whole, whole.at_depth(1), whole.at_depth(leaves=5)]):
        model.eval().save_pretrained(tmp_path / str(number))
        loaded = hierens.from_pretrained(tmp_path / str(number))
        assert loaded.tree == model.tree
        assert torch.allclose(loaded(small_images), model(small_images), atol=1e-5)


def test_looped_levels_stay_looped(small_backbone, tmp_path):
    model = hierens.hierensify(small_backbone, 3, looped={"1": "a reason"})
    model.save_pretrained(tmp_path)
    assert hierens.from_pretrained(tmp_path).looped == {"1": "a reason"}


def test_timm_adapts_what_it_loads(saved, small_images):
    other = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=3, in_chans=3).eval()
    assert other(small_images.repeat(1, 3, 1, 1)).shape == (4, 3)
    same = hierens.from_pretrained(saved)
    features = same.forward_head(same.forward_features(small_images), pre_logits=True)
    # timm sums the channels' weights over greyscale and spreads them over colour: equal on a grey image
    grey = other.forward_head(other.forward_features(small_images.repeat(1, 3, 1, 1)), pre_logits=True)
    assert torch.allclose(grey, features, atol=1e-4)


def test_entry_points_make_new_models():
    model = timm.create_model("hne", backbone="resnet8_cifar", blocks=2, num_classes=4, in_chans=1, seed=0)
    assert model.tree.leaves == 2 and not model.symmetric and model.num_classes == 4
    assert "hne" in timm.list_models("hne*") and "resnet20_cifar" in timm.list_models("*cifar*")


def test_the_card_holds_the_table_of_depths(model, saved):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "hierens.from_pretrained" in card
    rows = [line.split("|")[1:-1] for line in card.splitlines() if line.startswith("|")][2:]
    macs = model.macs((1, 32, 32))
    for depth, row in enumerate(rows):
        assert [cell.strip() for cell in row[:2]] == [str(depth), str(2**depth)]
        assert row[2].strip() == f"{macs[depth] / 1e6:.2f} M"
    assert [row[-1].strip() for row in rows] == ["90.00", "91.25", "92.50"]
    with pytest.raises(ValueError, match="a value per depth \\(3\\): loss"):
        model_card(model, {"loss": [1.0]})


def edit(saved, **changes):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(config))


def truncate(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def lengthen_header(file):
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**40) + data[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").write_text('{"architecture": "hne",'), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[1, 2]"), "not the config of a hierens model"),
        (lambda d: (d / "config.json").write_text("{}"), "not the config of a hierens model"),
        (lambda d: edit(d, architecture="resnet18"), "names the architecture 'resnet18'"),
        (lambda d: edit(d, model_args__backbone="resnet_of_tomorrow"), "names the backbone 'resnet_of_tomorrow'"),
        (lambda d: edit(d, model_args__backbone=3), "names the backbone 3"),
        (lambda d: edit(d, model_args__branching=[1, 10**9]), "no usable branching and leaves"),
        (lambda d: edit(d, model_args__branching=[1, 2]), "cannot be built"),
        (lambda d: edit(d, model_args__leaves="4"), "no usable branching and leaves"),
        (lambda d: edit(d, model_args__leaves=64), "cannot be built.*leaves must be from 1 to 4"),
        (lambda d: edit(d, model_args__num_classes=-1), "no usable num_classes"),
        (lambda d: edit(d, model_args__num_classes=11), "do not fit the config"),
        (lambda d: edit(d, model_args__at="layer2"), "no usable list of cuts"),
        (lambda d: edit(d, model_args__at=["layer9", "layer3"]), "cannot be built.*no module named 'layer9'"),
        (lambda d: edit(d, model_args__surprise=1), "does not know: surprise"),
        (lambda d: truncate(d / "model.safetensors", 0.7), "model.safetensors is damaged"),
        (lambda d: truncate(d / "model.safetensors", 0), "model.safetensors is damaged"),
        (lambda d: lengthen_header(d / "model.safetensors"), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: shutil.rmtree(d), "is no directory here, and the Hub did not give it"),
    ],
)
def test_damaged_models_say_what_is_wrong(saved, damage, message):
    damage(saved)
    with pytest.raises(LoadError, match=message):
        hierens.from_pretrained(saved)


def test_what_could_not_be_loaded_is_not_saved(small_backbone, tmp_path):
    changed = timm.create_model("resnet8_cifar", in_chans=1)
    changed.conv1 = torch.nn.Conv2d(1, 16, 5, padding=2)
    with pytest.raises(
        SaveError, match=r"levels.0.*|conv1.weight is not what timm.create_model\('resnet8_cifar'\) makes"
    ):
        hierens.hierensify(changed, 3).save_pretrained(tmp_path)
    nameless = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3)
    with pytest.raises(SaveError, match=r"timm\.create_model"):
        hierens.hierensify(nameless, 2).save_pretrained(tmp_path)
    headless = hierens.hierensify(small_backbone, 2)
    headless.reset_classifier(0)
    with pytest.raises(SaveError, match="the classifier was removed"):
        headless.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
