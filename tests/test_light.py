"""Light members: branches that share the weights of their dense layers, against trees of explicit weights."""

import copy
import io
import json
import math
import pickle
from functools import cache

import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

import hierens
from hierens.branches.activations import Activations
from hierens.branches.light import LightConv2d, LightLayer, lighten, merge
from hierens.core.fetching import LoadError
from hierens.inference.confidence import Confidence
from support.networks import close, few_pixels, randomize, tiny_backbone, with_statistics

KINDS = {"rank1": None, "lora": 2}
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
BACKBONES = {
    "resnet8_cifar": lambda: with_statistics(tiny_backbone((4, 8, 8), in_chans=3), 32),
    "test_resnet": lambda: timm.create_model("test_resnet", num_classes=4).eval(),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **SMALL_VIT).eval(),
    "separable": lambda: timm.create_model("test_efficientnet", num_classes=4).eval(),
}


@cache
def _tree(name, blocks, members, rank):
    torch.manual_seed(0)
    return hierens.hierensify(BACKBONES[name](), blocks, members=members, rank=rank, looped={})


def light_tree(name="resnet8_cifar", kind="rank1", blocks=3, seed=0, rank=None):
    """A light tree with random factors, biases and norms, in float64."""
    model = copy.deepcopy(_tree(name, blocks, kind, rank or KINDS.get(kind))).double()
    torch.manual_seed(seed)
    randomize(model)
    return model.eval()


def explicit(layer):
    """The weight of a branch, from the definition."""
    own, weight = layer._parameters, layer.weight
    groups = getattr(layer, "groups", 1)
    parts = []
    for group, rows in enumerate(weight.chunk(groups)):  # (outputs, inputs, ...)
        if "r" in own:
            scale = torch.outer(own["s"].chunk(groups)[group], own["r"].chunk(groups)[group])
            parts.append(torch.einsum("oi...,oi->oi...", rows, scale))
        else:
            a, b = own["lora_a"].chunk(groups)[group], own["lora_b"].chunk(groups)[group]
            parts.append(rows + torch.einsum("ok,ki...->oi...", b, a))
    return torch.cat(parts)


def oracle(model, name, blocks=3):
    """A tree of full members with the explicit weights of a light one; and the names of its weights."""
    full = copy.deepcopy(_tree(name, blocks, "full", None)).double().eval()
    full.set_executor("looped")
    names = []
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, LightLayer):
                names.append(path)
                full.get_submodule(path).weight.copy_(explicit(module))
                if module.bias is not None:
                    full.get_submodule(path).bias.copy_(module.bias)
            else:
                for own in (module._parameters, module._buffers):
                    for key, tensor in own.items():
                        if tensor is not None:
                            getattr(full.get_submodule(path), key).copy_(tensor)
    return full, names


def from_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def images(size=32, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_equal_those_of_explicit_weights(name, kind, training):
    model = light_tree(name, kind).train(training)
    full, names = oracle(model, name)
    full.train(training)
    assert len(names) > 8
    x = images()
    logits, expected = model(x, reduce=False), full(x, reduce=False)
    assert close(logits, expected, 1e-10) and logits.std(1).min() > 1e-6
    logits.square().sum().backward()
    expected.square().sum().backward()
    shared = {}
    for path in names:
        layer, gradient = model.get_submodule(path), full.get_submodule(path).weight.grad
        explicit_weight = explicit(layer)
        factors = [layer._parameters[key] for key in layer.factors()]
        of_shared, *of_factors = torch.autograd.grad(explicit_weight, [layer.weight, *factors], gradient)
        for factor, wanted in zip(factors, of_factors, strict=True):
            assert torch.allclose(factor.grad, wanted, atol=1e-9)
        shared[layer.weight] = shared.get(layer.weight, 0) + of_shared
    assert all(torch.allclose(weight.grad, wanted, atol=1e-9) for weight, wanted in shared.items())
    others = dict(full.named_parameters())
    for path, parameter in model.named_parameters():
        if path in others and parameter not in shared:
            assert torch.allclose(parameter.grad, others[path].grad, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, 2, 1, groups=2),
        nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect", dilation=2, bias=False),
        nn.Conv1d(8, 12, 3),
        nn.Linear(16, 12),
        timm.layers.Linear(16, 12),
        timm.layers.Conv2dSame(8, 12, 3, 2),
    ],
)
def test_both_ways_to_run_a_layer(layer, kind):
    """With few inputs the factors multiply them, with many the weight."""
    layer = copy.deepcopy(layer).double()
    light = lighten(copy.deepcopy(layer), kind, KINDS[kind])
    randomize(light)
    merged = copy.deepcopy(light)
    merge(merged)
    assert isinstance(light, LightLayer) and type(merged) is type(layer)
    assert torch.allclose(merged.weight, explicit(light), atol=1e-12)
    shape = (16,) if layer.weight.ndim == 2 else (8,) + (9,) * (layer.weight.ndim - 2)
    for count in (1, 500):
        x = torch.randn(count, *shape, dtype=torch.float64)
        assert torch.allclose(light(x), merged(x), atol=1e-10)
        assert torch.allclose(light.with_factors(x), merged(x), atol=1e-10)


def test_what_stays_full():
    """Depthwise and standardised convolutions, tied weights, and layers too small to gain."""
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    for layer in (
        nn.Conv2d(8, 8, 3, groups=8),
        timm.layers.StdConv2d(8, 8, 3),
        nn.Linear(1, 16),
        nn.Linear(2, 2),
        tied,
        nn.LayerNorm(16),
    ):
        assert not any(isinstance(module, LightLayer) for module in lighten(layer, "rank1", None).modules())
    assert isinstance(lighten(nn.Conv2d(8, 8, 3), "lora", 3), LightConv2d)
    assert not isinstance(lighten(nn.Conv2d(8, 8, 3), "lora", 8), LightLayer)
    model = light_tree("separable")
    assert "shares the weights of" in repr(model)
    assert any("conv_dw.weight" in name for name in model.levels[2].full), [level.full for level in model.levels]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKBONES)
def test_copies_equal_the_backbone_at_every_depth(name, kind):
    backbone = BACKBONES[name]()
    x = images().float()
    expected = backbone(x)
    model = hierens.hierensify(backbone, 3, members=kind, rank=KINDS[kind], looped={})
    for depth in range(model.depths):
        assert torch.allclose(model(x, depth=depth), expected, atol=1e-5)
    assert not any(isinstance(module, LightLayer) for module in backbone.modules())
    assert not any(isinstance(module, LightLayer) for module in model.levels[0].modules())


@pytest.mark.parametrize("kind", KINDS)
def test_each_depth_is_a_model_and_the_first_is_ordinary(kind):
    model = light_tree(kind=kind)
    x = images()
    for leaves in (1, 2, 3):
        part = model.at_depth(leaves=leaves)
        assert close(part(x), model(x, leaves=leaves), 1e-10)
        assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in copy.deepcopy(part).parameters())
    first = model.at_depth(0)
    assert not any(isinstance(module, LightLayer) for module in first.modules())
    own = {name.split(".", 2)[-1] for name in first.levels.state_dict()}
    assert own < set(BACKBONES["resnet8_cifar"]().state_dict())


def test_parameters_are_counted_once():
    model = light_tree(kind=("full", "rank1", "full"))
    for depth, count in enumerate(model.parameter_counts()):
        assert count == sum(p.numel() for p in model.at_depth(depth).parameters())
    assert model.parameter_counts()[-1] == sum(p.numel() for p in model.parameters())
    exits = hierens.tree_with_exits(BACKBONES["resnet8_cifar"](), 3, members="lora", rank=1, looped={})
    assert exits.parameter_counts()[-1] == sum(p.numel() for p in exits.parameters())
    assert exits.parameter_counts()[0] == sum(p.numel() for p in exits.at_depth(0).parameters())


def test_eight_light_resnets_have_the_size_of_one():
    with torch.device("meta"):
        backbone = timm.create_model("resnet18")
        model = hierens.hierensify(backbone, 4, members="rank1", looped={})
    one = sum(parameter.numel() for parameter in backbone.parameters())
    assert model.parameter_counts()[-1] <= 1.1 * one
    saved = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert saved <= 1.1 * sum(tensor.numel() * tensor.element_size() for tensor in backbone.state_dict().values())


@pytest.mark.parametrize("kind", [*KINDS, ("full", "lora", "rank1")])
@pytest.mark.parametrize("load", [hierens.from_pretrained, from_timm])
def test_saved_once_and_loaded_shared(kind, load, tmp_path):
    model = light_tree(kind=kind, rank=2 if "lora" in kind else None).float()
    model.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    x = images().float()
    assert torch.equal(again(x, reduce=False), model(x, reduce=False))
    assert again.member_kinds == model.member_kinds and shared(again) == shared(model) != set()
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert sum(map(torch.numel, stored.values())) == sum(map(torch.numel, (*model.parameters(), *model.buffers())))


def shared(model):
    """The names of the weights that several branches hold."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {tuple(own) for own in names.values() if len(own) > 1}


def test_sharing_survives_what_torch_does_with_modules():
    model = light_tree()
    before, x = shared(model), images()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    copies += [copy.deepcopy(model).to(memory_format=torch.channels_last)]
    meta = copy.deepcopy(model).to("meta")
    assert shared(meta) == before
    assigned = copy.deepcopy(meta)
    assigned.load_state_dict(model.state_dict(), assign=True)
    meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    for other in (*copies, assigned, meta):
        assert shared(other) == before and torch.allclose(other(x), expected)
    half = copy.deepcopy(model).half()
    assert shared(half) == before and half.levels[1][1].state_dict().keys() == model.levels[1][1].state_dict().keys()


def test_a_state_lists_shared_weights_once_and_accepts_all_of_them():
    model = light_tree()
    state = model.state_dict()
    assert state.keys() == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    name, *others = min(shared(model))
    other = light_tree(seed=1)
    other.load_state_dict(state | dict.fromkeys(others, state[name]))
    assert torch.allclose(other(images()), model(images()))
    with pytest.raises(RuntimeError, match="branches share one weight"):
        other.load_state_dict(state | dict.fromkeys(others, state[name] + 1))
    del state[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        other.load_state_dict(state)


def test_weight_decay_leaves_the_scales_alone():
    model = light_tree()
    scales = {name for name, _ in model.named_parameters() if name.endswith((".r", ".s"))}
    assert scales and scales <= model.no_weight_decay()
    exits = hierens.tree_with_exits(BACKBONES["resnet8_cifar"](), 3, members="rank1", looped={})
    assert all(exits.get_parameter(name) is not None for name in exits.no_weight_decay())


def test_symmetry_is_broken_by_noise_or_signs():
    x = images().float()
    for signs in (False, True):
        model = hierens.hierensify(BACKBONES["resnet8_cifar"](), 3, members="rank1", looped={})
        before, weights = model(x, depth=0), {name: model.get_parameter(name[0]).clone() for name in shared(model)}
        assert model.symmetric
        model.break_symmetry(0.01, 0, signs)
        assert not model.symmetric and torch.equal(model(x, depth=0), before)
        assert all(torch.equal(model.get_parameter(name[0]), value) for name, value in weights.items())
        scales = torch.cat([parameter for name, parameter in model.named_parameters() if name.endswith(".r")])
        changed = scales[scales != 1]
        assert (changed == -1).all() if signs else 0 < (changed - 1).abs().max() < 0.1
        assert changed.numel() > scales.numel() / 4
    lora = hierens.hierensify(BACKBONES["resnet8_cifar"](), 3, members="lora", rank=2, seed=3, looped={})
    assert not lora.symmetric


def test_new_networks_share_the_first_ones_weights():
    arguments = {"members": "rank1", "init": "reinit", "seed": 5, "looped": {}}
    backbone = tiny_backbone((4, 8, 8), in_chans=3)
    model = hierens.hierensify(backbone, 3, **arguments)
    torch.manual_seed(5)
    first = tiny_backbone((4, 8, 8), in_chans=3).train()
    assert shared(model) and model.train()(images().float(), depth=0).shape == (3, first.num_classes)
    assert model.symmetric  # norms and factors begin equal, so that training must break it


def test_classifiers_stay_light_when_they_are_reset():
    model = light_tree()
    counts = model.parameter_counts()
    model.reset_classifier(7)
    assert model(images()).shape == (3, 7) and any("classifier" in name[0] for name in shared(model))
    model.reset_classifier(0)
    model.reset_classifier(10)
    assert model.parameter_counts() == counts


def test_weights_of_other_classes_leave_out_their_factors(tmp_path):
    model = light_tree().float()
    model.save_pretrained(tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert other.eval()(images().float()).shape == (3, 3)
    assert torch.allclose(other.forward_features(images().float()), model.forward_features(images().float()))


@pytest.mark.parametrize(
    ("members", "rank", "message"),
    [
        ("rank2", None, "members must be full, rank1, lora"),
        (3, None, "members must be"),
        (("full", "rank1"), None, "members names 2 kinds, and the tree has 3 levels"),
        ("lora", None, "need a rank from 1"),
        ("lora", 0, "need a rank from 1"),
        ("rank1", 2, "rank=2 is for members 'lora'"),
    ],
)
def test_arguments_that_are_refused(members, rank, message):
    with pytest.raises(ValueError, match=message):
        hierens.hierensify(BACKBONES["resnet8_cifar"](), 3, members=members, rank=rank, looped={})


def test_full_members_are_saved_as_before():
    model = hierens.hierensify(tiny_backbone(), 2, members=("full", "full"), looped={})
    assert not {"members", "rank"} & set(model.arguments())


@pytest.mark.parametrize("kind", [*KINDS, ("full", "rank1", "full"), ("full", "full", "lora")])
def test_grown_trees_have_equal_outputs(kind):
    model = light_tree(kind=kind, rank=2 if "lora" in kind else None)
    grown, x = model.grow(), images()
    assert grown.leaves == 8 and grown.member_kinds[-1] == model.member_kinds[-1]
    for depth in range(model.depths):
        assert close(grown(x, depth=depth + 1), model(x, depth=depth), 1e-10)
    assert close(grown(x, depth=0), model(x, depth=0), 1e-10)
    if kind == "rank1":
        assert grown.parameter_counts()[-1] < 1.6 * model.parameter_counts()[-1] and grown.symmetric


def test_a_single_network_grows_into_light_ones():
    single = light_tree().at_depth(0)
    grown = single.grow()
    assert shared(grown) and close(grown(images()), single(images()), 1e-10)


@pytest.mark.parametrize("members", ["rank1", "lora"])
def test_values_of_a_config_that_are_refused(members, tmp_path):
    model = light_tree(kind=members).float()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in ({"members": "rank2"}, {"members": ["rank1"]}, {"members": {}}, {"rank": 10**9}, {"rank": "2"}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | changed}))
        with pytest.raises(LoadError, match="has no usable members and rank") as error:
            hierens.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    other = {"members": "full"} if members == "rank1" else {"rank": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | other}))
    with pytest.raises(LoadError, match="do not fit the config"):
        hierens.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", BACKBONES)
def test_all_ways_to_run_a_tree_agree(name):
    """Looped, grouped, fused, leaf by leaf, and each of them with fewer leaves."""
    model = light_tree(name).float()
    x, expected = images().float(), model(images().float(), reduce=False)
    assert not model.looped, model.looped
    models = {"plain": model, "fused": model.fuse(), "part of fused": model.fuse()}
    models["part of fused"] = models["part of fused"].at_depth(2)
    for executor in ("looped", "grouped"):
        for kind, one in models.items():
            one.set_executor(executor)
            with torch.no_grad():
                assert close(one(x, reduce=False), expected, 1e-4), (kind, executor)
                assert close(one(x, leaves=3, reduce=False), expected[:, :3], 1e-4), (kind, executor)
                assert close(one(x, depth=0), expected[:, 0], 1e-4), (kind, executor)
    steps = list(models["fused"].anytime(x))
    assert all(close(step.logits, expected[:, : step.leaves].mean(1), 1e-4) for step in steps)
    with torch.no_grad():
        assert close(model.fuse().at_depth(0)(x), expected[:, 0], 1e-4)


def test_a_fused_tree_holds_shared_weights_once():
    model = light_tree("test_resnet").float()
    fused = model.fuse()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(tensor.numel() for tensor in fused.state_dict().values()) < count
    assert fused.parameter_counts()[-1] == sum(parameter.numel() for parameter in fused.parameters())
    lora = light_tree("test_resnet", "lora").float()
    x = images().float()
    few, many = Activations([x] * 2), Activations([x.repeat(500, 1, 1, 1)] * 2)
    assert fused.levels[2]._branches_per_call(few, 4) == 4  # one call is faster, also on CPUs
    assert fused.levels[2]._branches_per_call(many, 4) == model.levels[2]._branches_per_call(few, 4) == 1
    with torch.no_grad():
        assert close(lora.fuse()(x), lora(x), 1e-4)


def test_training_grouped_equals_looped():
    results = []
    for executor in ("looped", "grouped"):
        model = light_tree().train()
        model.set_executor(executor)
        logits = model(images(), reduce=False)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    assert all(torch.allclose(a.double(), b.double(), atol=1e-9) for a, b in zip(*results, strict=True))


def test_reordering_moves_factors():
    model = light_tree().float()
    x, before = images().float(), model(images().float(), reduce=False)
    model.reorder([(images(count=20).float(), torch.arange(20) % 10)])
    after = model(x, reduce=False)
    assert close(after.mean(1), before.mean(1)) and shared(model)
    for leaf in range(4):
        assert min(float((after[:, leaf] - before[:, other]).abs().max()) for other in range(4)) < 1e-4


def test_an_average_of_weights_counts_shared_ones_once():
    model, other = light_tree().float(), light_tree(seed=1).float()
    average = ModelEmaV3(model, decay=0.75)
    average.update(other)
    for name, value in average.module.named_parameters():
        wanted = 0.75 * model.get_parameter(name) + 0.25 * other.get_parameter(name)
        assert torch.allclose(value, wanted, atol=1e-6), name


def test_policies_and_anytime_run_light_trees():
    model = light_tree().float().eval()
    policy = hierens.calibrate(model, [(images(count=16).float(), torch.arange(16) % 10)], budget=model.macs()[1])
    result = policy(model, images().float())
    assert result.logits.shape == (3, 10)


def test_torch_export_stores_shared_weights_once(tmp_path):
    model = light_tree().float()
    model.export(tmp_path, format="torch-export", depths=[2], check=False)
    program = torch.export.load(tmp_path / "depth_2.pt2")
    assert close(program.module()(images().float()), model(images().float()))
    stored = sum(tensor.numel() for tensor in program.state_dict.values())
    assert stored <= sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("policy", [None, Confidence((0.5,))])
def test_onnx_files_store_shared_weights_once(policy, tmp_path):
    model = light_tree(kind="rank1").float()
    what = {"policy": policy} if policy else {"depths": [2]}
    model.export(tmp_path, format="onnx", **what)  # compared with the model's outputs
    graphs = [onnx.load(next(tmp_path.glob("*.onnx"))).graph]
    stored = 0
    while graphs:
        graph = graphs.pop()
        stored += sum(math.prod(weight.dims) for weight in graph.initializer)
        graphs += [value.g for node in graph.node for value in node.attribute if value.HasField("g")]
    own = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9 * own < stored <= own  # a few less, because norms are folded


ZOO = {
    "resnet10t": {},
    "resnext50_32x4d": {},
    "seresnet18": {},
    "mobilenetv3_small_050": {},
    "tf_efficientnet_lite0": {},
    "regnety_002": {},
    "convnext_atto": {},
    "ghostnet_050": {},
    "repvgg_a0": {},
    "densenet121": {},
    "nf_regnet_b0": {},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 4},
    "beit_base_patch16_224": {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 112,
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 4),
    },
    "mixer_s32_224": {"img_size": 64},
    "poolformer_s12": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_families_of_the_zoo(name, kind):
    """A copy is exact; random factors give the outputs of merged branches, looped, grouped and fused."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=5, **ZOO[name]).eval()
    nn.init.normal_(backbone.get_classifier().weight, std=0.1)  # some begin with zeros
    x = few_pixels(backbone)
    model = hierens.hierensify(backbone, 3, members=kind, rank=KINDS[kind])
    with torch.no_grad():
        assert close(model(x), backbone(x), 1e-4)
        randomize(model.eval())
        merged = copy.deepcopy(model)
        for level in merged.all_levels():
            for branch in level:
                merge(branch)
        merged.set_executor("looped")
        expected = merged(x, reduce=False)
        assert expected.std(1).min() > 0
        for one in (model, model.fuse()):
            for executor in ("looped", "grouped"):
                one.set_executor(executor)
                assert close(one(x, reduce=False), expected, 1e-3), executor
    full = hierens.hierensify(backbone, 3, looped={}).parameter_counts()[-1]
    assert model.parameter_counts()[-1] < full
