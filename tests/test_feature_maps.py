"""Feature maps of trees and networks with exits: timm's interface, exactness, executors, depths, pruning."""

import copy
import pickle

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.models._features import FeatureGetterNet

import hierens
from hierens.branches.intermediates import tapped
from hierens.core.timm_info import example_input
from hierens.models import feature_maps
from support.networks import close, difference, randomize, tiny_backbone, tiny_tree

SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1,) * 4,
    "num_heads": (1, 1, 2, 2),
    "window_size": 2,
}
BACKBONES = {
    "resnet8_cifar": {"channels": (4, 8, 8)},
    "test_resnet": {},
    "test_vit": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "test_mambaout": {},
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "patch_size": 8},
    "pvt_v2_b0": {},
    "regnetx_002": {},
}
IN_EVERY_RUN = ("resnet8_cifar", "test_resnet", "test_vit", "test_convnext", "swin_tiny_patch4_window7_224")
CONVERSIONS = (hierens.hierensify, hierens.tree_with_exits, hierens.multi_exit)


def backbone_and_images(name):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=4, **BACKBONES[name]).eval()
    randomize(backbone)
    images = example_input(backbone, 2)
    return backbone, images if getattr(backbone, "pos_embed", None) is not None else images[..., :64, :64]


@pytest.mark.parametrize(
    "name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.slow) for n in BACKBONES]
)
@torch.no_grad()
def test_maps_of_copies_are_the_backbones_own(name):
    backbone, x = backbone_and_images(name)
    _, expected = backbone.forward_intermediates(x)
    tree = hierens.hierensify(backbone, 3, looped={})
    tree.set_executor("looped")  # grouped kernels round otherwise
    for model, depth in ((tree, 0), (tree, 2), (hierens.multi_exit(backbone, 3), 2)):
        features, maps = model.forward_intermediates(x, depth=depth)
        assert len(maps) == len(expected)
        assert all(map(torch.equal, maps, expected)), list(map(difference, maps, expected))
        if depth:
            assert torch.equal(features, model.forward_features(x))
        assert [(info["num_chs"], info["module"]) for info in model.feature_info] == [
            (info["num_chs"], info["module"]) for info in backbone.feature_info
        ]
    arguments = {"num_classes": 4, **BACKBONES[name]}
    theirs = timm.create_model(name, features_only=True, **arguments).feature_info
    ours = feature_maps.features_only(tree).feature_info
    assert (ours.channels(), ours.reduction()) == (theirs.channels(), theirs.reduction())


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_maps_are_means_over_networks_and_executors_agree(depth):
    model, x = tiny_tree(blocks=3).eval(), torch.randn(2, 1, 16, 16)
    last = tapped(model.level(2), tuple(stage.node for stage in model.stages if stage.level == 2))
    assert last.nodes and last.grouped_form() is not None
    found = {}
    for executor in ("looped", "grouped"):
        model.set_executor(executor)
        found[executor] = model.forward_intermediates(x, depth=depth, reduce=False)
    networks = 2**depth
    features, each = found["looped"]
    assert difference(found["grouped"][0], features) < 1e-5
    means = model.forward_intermediates(x, depth=depth, intermediates_only=True)
    for looped, grouped, mean, info in zip(each, found["grouped"][1], means, model.feature_info, strict=True):
        assert looped.shape == (2, networks, info["num_chs"], 16 // info["reduction"], 16 // info["reduction"])
        assert difference(grouped, looped) < 1e-5
        assert difference(mean, looped.mean(1)) < 1e-5
    backbone = tiny_backbone().eval()
    for leaf in range(networks):
        path = [level[leaf // model.tree.span(index)] for index, level in enumerate(model.levels)]
        parts = (*path, model.head[leaf], model.classifier[leaf])
        backbone.load_state_dict({name: tensor for part in parts for name, tensor in part.state_dict().items()})
        expected = backbone.forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(own[:, leaf], theirs) for own, theirs in zip(each, expected, strict=True))


@torch.no_grad()
def test_partial_trees_weigh_branches_by_their_leaves():
    model, x = tiny_tree(blocks=3), torch.randn(2, 1, 16, 16)
    stacked = model.forward_intermediates(x, leaves=3, reduce=False, intermediates_only=True)
    means = model.forward_intermediates(x, leaves=3, intermediates_only=True)
    for own, mean in zip(stacked, means, strict=True):
        assert own.shape[1] == 3
        assert difference(mean, own.mean(1)) < 1e-5


@torch.no_grad()
def test_arguments_are_timms():
    model, x = tiny_tree(blocks=2), torch.randn(2, 1, 16, 16)
    everything = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[1] for m in everything] == [info["num_chs"] for info in model.feature_info]
    for indices, expected in ((2, [2, 3]), ([-1, 0], [0, 3]), ([1], [1])):
        found = model.forward_intermediates(x, indices, intermediates_only=True)
        assert len(found) == len(expected)
        assert all(torch.equal(own, everything[i]) for own, i in zip(found, expected, strict=True))
    (last,) = model.forward_intermediates(x, [3], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(last, everything[3].flatten(2).transpose(1, 2))
    runs = []
    model.levels[1].register_forward_hook(lambda *_: runs.append(1))
    features, _ = model.forward_intermediates(x, [0], stop_early=True)
    assert not runs and features.shape[1] == 1
    assert model.forward_head(model.forward_intermediates(x)[0]).shape == (2, 10)
    for wrong in ({"indices": 5}, {"indices": [4]}, {"output_fmt": "CHW"}, {"depth": 5}):
        with pytest.raises(ValueError, match="must be"):
            model.forward_intermediates(x, **wrong)


def test_a_norm_of_leaves_is_refused_where_it_matters():
    backbone, x = backbone_and_images("test_vit")
    model = hierens.hierensify(backbone, 2, looped={})
    with pytest.raises(ValueError, match=r"norm=True would apply.*norm=False, or forward_features"):
        model.forward_intermediates(x, norm=True)
    model = hierens.multi_exit(tiny_backbone(), 2)
    assert len(model.forward_intermediates(torch.randn(1, 1, 16, 16), norm=True, intermediates_only=True)) == 4


@torch.no_grad()
def test_exits_compute_the_stages_before_them():
    x = torch.randn(2, 1, 16, 16)
    tree, chain = (convert(tiny_backbone().eval(), 3) for convert in (hierens.tree_with_exits, hierens.multi_exit))
    expected = tiny_backbone().eval().forward_intermediates(x, intermediates_only=True)
    for model in (tree, chain):
        counts = []
        for depth in range(model.depths):
            maps = model.forward_intermediates(x, depth=depth, intermediates_only=True)
            assert all(map(torch.equal, maps, expected[: len(maps)]))
            counts.append(len(maps))
            smaller = model.at_depth(depth).forward_intermediates(x, intermediates_only=True)
            assert all(map(torch.equal, maps, smaller))
        assert counts == sorted(counts) and counts[0] < counts[-1] == 4
    with pytest.raises(ValueError, match="indices must be"):
        chain.forward_intermediates(x, [3], depth=0)


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_maps(convert, checkpointing):
    model = convert(tiny_backbone(), 2).train()
    model.set_grad_checkpointing(checkpointing)
    sum(m.sum() for m in model.forward_intermediates(torch.randn(2, 1, 16, 16), intermediates_only=True)).backward()
    levels = [parameter for name, parameter in model.named_parameters() if "levels." in name]
    assert levels and all(parameter.grad is not None for parameter in levels)


@torch.no_grad()
def test_maps_follow_replaced_and_hooked_layers_and_survive_copies():
    model, x = tiny_tree(blocks=2), torch.randn(2, 1, 16, 16)
    before = model.forward_intermediates(x, intermediates_only=True)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle = model.levels[0][0].act1.register_forward_hook(lambda _, __, out: 2 * out)
    assert torch.equal(model.forward_intermediates(x, [0], intermediates_only=True)[0], 2 * before[0])
    handle.remove()
    model.levels[0][0].conv1.weight.mul_(3)
    assert not torch.equal(model.forward_intermediates(x, [0], intermediates_only=True)[0], before[0])
    for other in copies:
        assert all(map(torch.equal, other.forward_intermediates(x, intermediates_only=True), before))


@torch.no_grad()
def test_saved_and_grown_trees_have_the_same_maps(tmp_path):
    model = hierens.hierensify(tiny_backbone().eval(), 2, looped={})
    x = torch.randn(2, 1, 16, 16)
    expected = model.forward_intermediates(x, intermediates_only=True)
    model.save_pretrained(tmp_path)
    grown = model.grow()
    assert [info["module"] for info in grown.feature_info] == [info["module"] for info in model.feature_info]
    for other in (hierens.from_pretrained(tmp_path), grown, grown.at_depth(0)):
        assert all(map(close, other.forward_intermediates(x, intermediates_only=True), expected))
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    assert all(map(close, net(x), expected))


@torch.no_grad()
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_levels_are_the_stages_where_the_backbones_own_are_not_found(convert):
    backbone, x = tiny_backbone().eval(), torch.randn(2, 1, 32, 32)
    expected = backbone.forward_intermediates(x, intermediates_only=True)
    backbone.feature_info = None
    model = convert(backbone, at=["layer2", "layer3"])
    modules = [(f"levels.{i}", channels, 2**i) for i, channels in enumerate((4, 8, 8))]
    assert [(info["module"], info["num_chs"], info["reduction"]) for info in model.feature_info] == modules
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, maps, expected[1:]))


def test_tokens_of_levels_become_maps():
    own = {"img_size": 32, "embed_dim": 24, "depth": 4, "class_token": False, "global_pool": "avg"}
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=4, **own).eval()
    expected = backbone.forward_intermediates(x := torch.randn(1, 3, 32, 32), intermediates_only=True)
    backbone.feature_info = None
    model = hierens.hierensify(backbone, at=["blocks.1", "blocks.3"], looped={})
    assert [info["reduction"] for info in model.feature_info] == [16, 16, 16]
    maps = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(map(close, maps, (expected[0], expected[2])))


@pytest.mark.parametrize("entry", ["hne", "hne_exits", "multi_exit"])
def test_features_only_prunes_what_the_maps_do_not_need(entry):
    own = {"channels": (4, 8, 8), "in_chans": 1}
    arguments = {"backbone": "resnet8_cifar", "backbone_args": own, "at": ["layer1", "layer3"]}
    if entry != "multi_exit":
        arguments["looped"] = {}
    torch.manual_seed(0)
    model = timm.create_model(entry, **arguments).eval()
    torch.manual_seed(0)
    net = timm.create_model(entry, features_only=True, out_indices=(0, 2), **arguments).eval()
    assert isinstance(net, FeatureGetterNet)
    assert net.feature_info.channels() == [4, 8] and net.feature_info.reduction() == [1, 2]
    assert net.feature_info.module_name() == ["act1", "layer2"]
    x = torch.randn(2, 1, 32, 32)
    assert all(map(torch.equal, net(x), model.forward_intermediates(x, [0, 2], intermediates_only=True)))
    names = {name for name, _ in net.named_parameters()}
    assert not any(part in name for name in names for part in ("layer3", "fc", "exits"))
    net.train()
    sum(m.sum() for m in net(x)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.model(x)  # features, as of timm's pruned models
    with pytest.raises(ValueError, match="save it before pruning"):
        net.model.arguments()
    with pytest.raises(ValueError, match="leave out feature_cls='list'"):
        timm.create_model(entry, features_only=True, feature_cls="list", **arguments)


def test_a_stage_per_layer_gives_the_last_three_maps_as_in_timm():
    own = {"img_size": 32, "embed_dim": 24, "depth": 7}
    net = timm.create_model(
        "hne", features_only=True, backbone="vit_tiny_patch16_224", backbone_args=own, blocks=2, looped={}
    )
    assert net.feature_info.module_name() == ["blocks.4", "blocks.5", "blocks.6"]
    assert [tuple(m.shape) for m in net(torch.randn(1, 3, 32, 32))] == [(1, 24, 2, 2)] * 3


def test_other_sizes_and_merged_layers_end_in_one_sentence():
    model, x = tiny_tree(blocks=2), torch.randn(1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"create the backbone with img_size=.*convert it then"):
        model.set_input_size(64)
    for other in (model.fuse(), hierens.multi_exit(tiny_backbone().eval(), 2).fold_norms()):
        with pytest.raises(ValueError, match="get feature maps from the model before fuse"):
            other.forward_intermediates(x)


def test_decoders_of_segmentation_models_take_a_tree_as_encoder(tmp_path):
    hierens.hierensify(timm.create_model("test_resnet", num_classes=4), 2, looped={}).save_pretrained(tmp_path)
    for decoder in (smp.Unet, smp.FPN):
        network = decoder(f"tu-local-dir:{tmp_path}", encoder_weights=None, classes=2)
        network(torch.randn(2, 3, 64, 64)).sum().backward()
        assert network.encoder.model.model.leaves == 2
