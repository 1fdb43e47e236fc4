"""The papers' networks, layer by layer against their tables, and through timm's factory, disk and back."""

import pytest
import timm
import torch

import hierens

SIZES = {
    "hne_mobilenetv2_075": (3, 224, 224),
    "hne_resnet50_cifar": (3, 32, 32),
    "hne_resnet50_cifar_small": (3, 32, 32),
}
# Multiply-accumulates of every depth, for 1000 classes (MobileNetV2) and 100 (ResNets).
MACS = {
    "hne_mobilenetv2_075": (179_129_232, 211_960_928, 332_915_136, 602_257_280),
    "hne_resnet50_cifar": (50_820_096, 65_710_080, 107_171_840, 201_924_608, 402_358_272),
    "hne_resnet50_cifar_small": (13_089_280, 16_864_256, 27_371_520, 51_417_088, 102_350_848),
}
# Channels and pixels that the tables give after each block.
OUTPUTS = {
    "hne_mobilenetv2_075": [(24, 56), (24, 28), (72, 14), (720, 7)],
    "hne_resnet50_cifar": [(64, 32), (64, 32), (128, 16), (256, 8), (256, 8)],
    "hne_resnet50_cifar_small": [(32, 32), (32, 32), (64, 16), (128, 8), (128, 8)],
}


def make(name, **kwargs):
    return timm.create_model(name, num_classes=1000 if "mobilenet" in name else 100, seed=0, **kwargs).eval()


@pytest.mark.sampled
@pytest.mark.parametrize("name", MACS)
def test_networks_are_those_of_the_tables(name):
    model = make(name)
    assert model.tree == hierens.Tree.binary(len(OUTPUTS[name]))
    assert model.macs(SIZES[name]) == MACS[name]
    value, outputs = torch.randn(1, *SIZES[name]), []
    with torch.no_grad():
        for level in model.all_levels()[:-2]:
            value = level.run_branch(0, value)
            outputs.append((value.shape[1], value.shape[2]))
    assert outputs == OUTPUTS[name]
    assert model.looped == {}


def test_costs_are_in_the_ranges_that_the_paper_gives():
    first, *_, last = MACS["hne_mobilenetv2_075"]
    assert 150e6 < first < 200e6 and 590e6 < last < 610e6, "about 150 to 600 M (section 4.3)"
    for name in ("hne_resnet50_cifar", "hne_resnet50_cifar_small"):
        assert MACS[name][3] < 250e6, "8 networks below 250 M (section 4.3)"
    assert MACS["hne_resnet50_cifar"][4] > 250e6, "or all 16 could have been plotted"


@pytest.mark.sampled
def test_branches_are_independent_and_seeded():
    one, same, other = (timm.create_model("hne_resnet50_cifar_small", leaves=4, seed=seed) for seed in (1, 1, 2))
    name = "levels.4.3.layer4.0.conv1.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    branches = torch.stack([b.get_parameter("layer4.0.conv1.weight").detach() for b in one.levels[4]]).flatten(1)
    assert torch.linalg.matrix_rank(branches) == 4
    assert not one.symmetric and one.num_classes == 10


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["hne_resnet50_cifar_small", "hne_mobilenetv2_075"])
def test_arguments_reach_the_backbone_and_models_come_back_from_disk(name, tmp_path):
    model = timm.create_model(name, num_classes=5, in_chans=1, drop_rate=0.1, leaves=3).eval()
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.1 for module in model.modules())
    x = torch.randn(2, 1, 32, 32)
    logits = model(x, reduce=False)
    assert logits.shape == (2, 3, 5) and logits.std() > 0
    model.save_pretrained(tmp_path)
    for loaded in (
        hierens.from_pretrained(tmp_path),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
    ):
        assert torch.allclose(loaded(x, reduce=False), logits, atol=1e-5)


def test_other_sharing_of_the_same_blocks():
    model = make("hne_resnet50_cifar_small", branching=(1, 1, 1, 4, 1), leaves=3)
    assert model.tree.widths() == (1, 1, 1, 3, 3)


@pytest.mark.parametrize("name", ["resnet50dw_cifar_small", "mobilenetv2_075_lean"])
def test_plain_networks_are_timm_models(name):
    network = timm.create_model(name, num_classes=4, in_chans=1, drop_path_rate=0.1).eval()
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    features = timm.create_model(name, features_only=True)
    reductions = [64 // feature.shape[-1] for feature in features(torch.randn(2, 3, 64, 64))]
    assert reductions == features.feature_info.reduction()


def test_there_are_no_weights_to_load():
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("hne_mobilenetv2_075", pretrained=True)
