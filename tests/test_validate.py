"""An untrusted config gives a model or an error of one line, with little memory."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import hierens
from hierens.core.fetching import LoadError
from hierens.hub import validate
from hierens.hub.validate import check_arguments, read_config
from support.attempts import limited_memory, out_of_memory
from support.hostile_configs import saved_models


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with a saved tree and the text of its config, which tests overwrite."""
    folder, *_ = saved_models(tmp_path_factory.mktemp("saved"))
    return folder, (folder / "config.json").read_text()


def load(tree, **changes):
    folder, text = tree
    config = json.loads(text)
    config["model_args"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with limited_memory():
        return hierens.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_args": {"channels": [10**9] * 3}}, "channels is 1000000000, and at most 65536 is allowed"),
        ({"backbone_args": {"channels": [60_000] * 3}}, "far more computation or memory than its weights suggest"),
        ({"backbone_args": {"layers": [10**6]}}, "layers is 1000000, and at most 65536 is allowed"),
        (
            {"backbone": "resnet18", "backbone_args": {"layers": [60_000] * 4, "channels": [4] * 4}},
            "far more layers than its weights suggest",
        ),
        ({"backbone": "resnet18", "backbone_args": {"layers": [60_000] * 400}}, "more, or larger, values than"),
        (
            {"backbone": "eva_giant_patch14_560", "backbone_args": {}},
            "all weights in the file only|than its weights suggest",
        ),
        ({"backbone": "test_vit", "backbone_args": {"img_size": 4096, "patch_size": 1, "embed_dim": 1}}, "cannot be"),
        ({"backbone": "hne", "backbone_args": {"backbone": "hne"}}, "names the backbone 'hne', which is no backbone"),
        ({"backbone_args": {"pretrained": True}}, "a config must not set pretrained"),
        ({"backbone_args": {"checkpoint_path": "/etc/passwd"}}, "a config must not set checkpoint_path"),
        ({"backbone_args": {"pretrained_cfg": {"file": "x.pth"}}}, "a config must not set pretrained_cfg"),
        ({"backbone_args": [1]}, "no usable backbone_args"),
        ({"backbone_args": {"channels": [4, 4, float("nan")]}}, "it contains NaN"),
        ({"at": ["layer2"] * 10**6}, "is 10 MB long"),
        ({"at": ["layer2"] * 300}, "no usable list of cuts"),
        ({"branching": [1] * 60, "leaves": 1}, "branching has 60 levels"),
        ({"branching": [4096] * 60, "leaves": 4096}, "describes 4096 networks, and its weights can be those of"),
        ({"branching": [1, 1, 8], "leaves": 8}, "do not fit the config"),
        ({"num_classes": 10**7}, "elements, and all weights in the file only"),
        ({"looped": ["all"]}, "no usable reasons to loop"),
    ],
)
def test_what_would_explode_is_refused_first(tree, changes, message):
    with pytest.raises(LoadError, match=message) as refused:
        load(tree, **changes)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000 and not out_of_memory(refused.value)


def test_loading_changes_nothing_for_modules_of_other_threads(tree, monkeypatch):
    folder, text = tree
    (folder / "config.json").write_text(text)
    hooks = [value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_")]
    before, during = [len(value) for value in hooks if isinstance(value, dict)], []

    def note(*_):
        during.append([len(value) for value in hooks if isinstance(value, dict)])

    monkeypatch.setattr(validate, "_check_parameters", note)
    hierens.from_pretrained(folder)
    assert before and during == [before]


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
                {"levels.0.0.conv1.weight": torch.zeros(4, 1, 5, 5)},
                "is 4x1x5x5 in the file and 4x1x3x3 by",
            ),
            ({"surprise": torch.zeros(2)}, "surprise is 2 in the file and missing by the config"),
        ):
            save_file(weights | change, folder / "model.safetensors")
            with pytest.raises(LoadError, match=message):
                load(tree)
        save_file({name: tensor for name, tensor in weights.items() if "fc" not in name}, folder / "model.safetensors")
        with pytest.raises(LoadError, match="is missing in the file and 10x8 by the config, and 7 more differ"):
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_size", [1, 65_536, 65_536]),
        ("input_size", [3, 32, 32]),  # of another number of channels than in_chans
        ("input_size", [1, 32]),
        ("test_input_size", [1, 4096, 4096]),
        ("pool_size", [8, "8"]),
        ("mean", [0.5, 0.5]),
        ("mean", 0.5),
        ("mean", [True]),
        ("std", [0]),
        ("std", ["0.25"]),
        ("std", [1e-300]),
        ("crop_pct", 0),
        ("crop_pct", "0.9"),
        ("crop_pct", [1.0]),
        ("interpolation", "bycubic"),
        ("interpolation", ["bilinear"]),
        ("crop_mode", "centre"),
        ("fixed_input_size", 1),
        ("tags", "a"),
        ("license", 3),
        ("description", "x" * 100_000),
    ],
)
def test_what_a_description_cannot_say_is_named(tree, field, value):
    folder, text = tree
    config = json.loads(text)
    config["pretrained_cfg"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=rf"config.json has no usable {field}: got .*, allowed is ") as refused:
        hierens.from_pretrained(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_what_a_description_leaves_open_is_the_backbones(tree):
    folder, text = tree
    config = json.loads(text)
    config["pretrained_cfg"] |= {"input_size": None, "mean": None, "crop_mode": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert hierens.from_pretrained(folder).pretrained_cfg["input_size"] == (1, 32, 32)
    config["pretrained_cfg"] = [1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"no usable pretrained_cfg \(got \[1\]\)"):
        hierens.from_pretrained(folder)


def test_an_image_of_the_size_that_is_described_must_go_through(tmp_path):
    *_, folder = saved_models(tmp_path)  # a transformer
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 8, 8]  # less than a patch
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"config\.json describes a model that cannot be built: "):
        hierens.from_pretrained(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"label_names": [1.5]}, r"no usable label_names \(got 1.5\): allowed are texts"),
        ({"label_names": {"abc": "cat"}}, "label_names: 'abc' is not an index of 10 classes"),
        ({"label_names": {"10": "cat"}}, "label_names: '10' is not an index of 10 classes"),
        ({"label_names": "cat"}, "no usable label_names"),
        ({"label_descriptions": {"cat": []}}, r"no usable label_descriptions \(got \[\]\)"),
    ],
)
def test_names_of_classes_must_be_names(tree, labels, message):
    folder, text = tree
    (folder / "config.json").write_text(json.dumps(json.loads(text) | labels))
    with pytest.raises(LoadError, match=message):
        hierens.from_pretrained(folder)


@pytest.fixture
def weights(tree):
    """The weights of the tree, and a file to write others to."""
    folder, text = tree
    (folder / "config.json").write_text(text)
    file = folder / "model.safetensors"
    whole = load_file(file)
    yield whole, file
    save_file(whole, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_real_numbers_of_another_precision_are_loaded_right(weights, dtype):
    whole, file = weights
    save_file({name: part.to(dtype) if part.is_floating_point() else part for name, part in whole.items()}, file)
    loaded = hierens.from_pretrained(file.parent).state_dict()
    for name, part in whole.items():
        assert loaded[name].dtype == part.dtype and torch.equal(loaded[name], part.to(dtype).to(part.dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_are_no_real_numbers_are_refused(weights, dtype):
    whole, file = weights
    save_file(whole | {"levels.0.0.conv1.weight": whole["levels.0.0.conv1.weight"].to(dtype)}, file)
    with pytest.raises(LoadError, match=r"model.safetensors stores levels.0.0.conv1.weight as \w+; a model of .* F32"):
        hierens.from_pretrained(file.parent)


def test_counts_that_are_no_whole_numbers_are_refused(weights):
    whole, file = weights
    name = next(name for name in whole if name.endswith("num_batches_tracked"))
    save_file(whole | {name: whole[name].double()}, file)
    with pytest.raises(LoadError, match=rf"stores {name} as F64; a model of hierens has I64 there"):
        hierens.from_pretrained(file.parent)


def test_names_in_messages_do_not_break_the_line(tree):
    with pytest.raises(LoadError, match="model_args that hierens does not know") as refused:
        load(tree, **{"a\nb\ud800": 1})
    assert "\n" not in str(refused.value) and str(refused.value).encode()
