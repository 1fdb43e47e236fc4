"""Saving and loading: the same logits by every way in, nothing unpickled, and clear words about damaged files."""

import json
import shutil
import struct
import subprocess
import zipfile

import pytest
import timm
import torch

import hierens
from hierens.core.fetching import LoadError
from hierens.hub.cards import model_card
from hierens.hub.saving import SaveError
from support.hub_server import hub_server
from support.networks import independent_tree, tiny_backbone
from support.processes import environment, script


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model that tests leave as it is, and the folder that it was saved to."""
    model = independent_tree(tiny_backbone((8, 8, 16)), 3).to(memory_format=torch.channels_last)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder, results={"accuracy (%)": [90.0, 91.25, 92.5]})
    return model, folder


@pytest.fixture
def model(published):
    return published[0]


@pytest.fixture
def saved(published, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(published[1], tmp_path / "saved")


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


@pytest.fixture(scope="module")
def over_http(published, tmp_path_factory):
    """What `hub_client.py` found, the server it spoke to, and the model that it published."""
    model, saved = published
    folder = tmp_path_factory.mktemp("hub")
    with hub_server() as hub:
        own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder), "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        (folder / "cache").mkdir()
        command = script("hub_client", saved, hub.address, folder / "cache")
        done = subprocess.run(command, capture_output=True, text=True, env=environment(**own))
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1]), hub, model


def test_what_is_published_is_what_is_loaded(over_http, small_images):
    found, hub, model = over_http
    assert hub.private("somebody/digits")
    wanted = ["README.md", "accuracy.png", "config.json", "model.safetensors", "policy.json"]
    assert sorted(hub.files("main")) == wanted
    assert found["leaves"] == {"whole": 4, "again": 4, "timm": 4, "folder": 4, "small": 2, "pinned": 2}
    expected = model(small_images, depth=1).double().sum().item()
    assert found["logits"] == {name: pytest.approx(expected, abs=1e-3) for name in found["logits"]}
    assert found["names"] == "a 3"
    assert set(found["policies"]) == {"FixedDepth(depth=1, leaves=None)"}, "a branch has what main had"


def test_the_published_card_says_how_to_use_it_and_what_it_reaches(over_http):
    found, hub, _ = over_http
    card = found["card"]
    assert found["how to"] and b"(accuracy.png)" in hub.files("main")["README.md"]
    assert (card["license"], card["datasets"], card["pipeline_tag"]) == (
        "apache-2.0",
        ["digits"],
        "image-classification",
    )
    (index,) = card["model-index"]
    assert index["name"] == "somebody/digits"
    assert [metric["value"] for metric in index["results"][0]["metrics"]] == [1.0, 2.0, 3.0]


def test_interrupted_transfers_go_on(over_http):
    found, hub, _ = over_http
    assert not hub.trouble, "all of it happened"
    half = len(hub.files("main")["model.safetensors"]) // 2
    assert half - 2**12 < found["resumed at"] <= half


def test_downloads_lie_where_they_were_asked_for(over_http):
    found, _, _ = over_http
    assert found["cached in"] == ["a"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("damaged", "is damaged: its checksum is not the Hub's. Delete it"),
        ("damaged config", "config.json is not valid JSON"),
        ("token", "the token is invalid or has no permission (401); log in with `hf auth login`, or pass token=."),
        ("push token", "uploading somebody/digits failed: the token is invalid or has no permission (401)"),
        ("push reader", "uploading somebody/digits failed: the token is invalid or has no permission (403)"),
        ("no token", "no such repository, or it is private and the token gives no access."),
        ("repository", "not a local directory, nor available from the Hub: there is no such repository"),
        ("revision", "it has no branch, tag or commit 'nowhere'."),
        ("no policy", "not a local directory, nor available from the Hub: there is no such repository"),
        ("name", "not a local directory, nor available from the Hub: repository names have the form user/name."),
        ("server", "returned an error (501); try again later."),
        ("offline", "it is not in the cache, and HF_HUB_OFFLINE forbids downloads."),
    ],
)
def test_refusals_of_the_hub_are_one_clear_sentence(over_http, what, message):
    said = over_http[0]["refused"][what]
    assert message in said and "\n" not in said


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
        (lambda d: shutil.rmtree(d), "is not a local directory, nor available from the Hub"),
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
        SaveError, match=r"levels.0.*|conv1.weight differs from that of timm.create_model\('resnet8_cifar'\)"
    ):
        hierens.hierensify(changed, 3).save_pretrained(tmp_path)
    nameless = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3)
    with pytest.raises(SaveError, match=r"timm\.create_model"):
        hierens.hierensify(nameless, 2).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_description_that_could_not_be_loaded_is_not_saved_in_silence(small_backbone, tmp_path):
    model = hierens.hierensify(small_backbone, 2)
    model.pretrained_cfg["crop_pct"] = "0.9"
    with pytest.raises(SaveError, match=r"could not be loaded: .*config.json has no usable crop_pct: got '0.9'"):
        model.save_pretrained(tmp_path)
