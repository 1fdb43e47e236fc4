"""timm's interface on trees and exits of backbones that differ from a plain one."""

import json

import pytest
import timm
import torch
from accelerate import init_empty_weights
from timm.models import get_pretrained_cfg, save_for_hf

import hierens
from hierens.models import msdnet, paper_networks, registry, small_resnets
from support.networks import difference, randomize

DISTILLED = {"deit_tiny_distilled_patch16_224": {"img_size": 32}, "levit_128s": {}}


def made(name, **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10, **kwargs).eval()
    randomize(backbone)
    return backbone


def images(model):
    return torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=DISTILLED)
def distilled(request):
    backbone = made(request.param, **DISTILLED[request.param])
    return backbone, hierens.hierensify(backbone, 2), hierens.multi_exit(backbone, 2)


@torch.no_grad()
def test_pooled_features_of_distilled_backbones_are_the_backbones_own(distilled):
    backbone, *models = distilled
    x = images(models[0])
    expected = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
    for model in models:
        found = model.forward_head(model.forward_features(x), pre_logits=True)
        if isinstance(expected, tuple):
            expected = sum(expected) / 2
        assert difference(found, expected) < 1e-5


def test_classifiers_of_distilled_backbones_are_named_replaced_and_loaded(distilled, tmp_path):
    _, *models = distilled
    for model in models:
        model.save_pretrained(tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
        assert loaded(images(model)).shape == (2, 3)
        loaded.reset_classifier(5)
        assert loaded(images(model)).shape == (2, 5)
        for network in (model, loaded):
            assert {f"{name}.weight" for name in network.pretrained_cfg["classifier"]} <= network.state_dict().keys()


@pytest.mark.sampled
def test_stems_of_several_convolutions_are_adapted_to_grey_images(tmp_path):
    model = hierens.hierensify(made("repvgg_a0"), 2)
    model.save_pretrained(tmp_path)
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    assert isinstance(model.pretrained_cfg["first_conv"], tuple)
    x = images(model)[:, :1]
    assert difference(grey(x), model(x.expand(-1, 3, -1, -1))) < 1e-3, "timm sums a first layer's weights over colours"


@pytest.mark.parametrize("name", ["resnet8_cifar", "resnet14_cifar"])
def test_cifar_resnets_checkpoint_and_return_features(name):
    model = timm.create_model(name, channels=(4, 8, 8))
    x = torch.randn(2, 3, 32, 32)
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    sizes = [(4, 32), (4, 32), (8, 16), (8, 8)]
    assert [(info["num_chs"], 32 // info["reduction"]) for info in model.feature_info] == sizes
    maps = timm.create_model(name, channels=(4, 8, 8), features_only=True)(x)
    assert [(m.shape[1], m.shape[2]) for m in maps] == sizes
    model.eval()
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [(m.shape[1], m.shape[2]) for m in maps] == sizes
    for indices in ([1, -1], 2):
        last = model.forward_intermediates(x, indices, intermediates_only=True)[-1]
        assert torch.equal(last, maps[-1])
    assert model.prune_intermediate_layers(2) == [2, 3]


@pytest.mark.parametrize("name", registry.__all__)
def test_an_entry_point_without_a_backbone_asks_for_one(name):
    with pytest.raises(ValueError, match=rf"timm.create_model\('{name}', backbone='resnet18'\)"):
        timm.create_model(name)


def test_every_entry_point_has_a_description():
    for name in (*registry.__all__, *small_resnets.__all__, *paper_networks.__all__, *msdnet.__all__):
        assert get_pretrained_cfg(name) is not None, name


def test_a_config_may_state_the_number_of_classes_at_its_top_alone(tmp_path):
    model = hierens.hierensify(made("resnet10t"), 2).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"].pop("num_classes") == config["num_classes"] == 10
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(hierens.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("convert", [hierens.hierensify, hierens.multi_exit, hierens.tree_with_exits])
def test_models_are_converted_without_weights_as_accelerate_does(convert, include_buffers):
    backbone = made("resnet10t")
    expected = convert(backbone, 2)
    with init_empty_weights(include_buffers):
        model = convert(timm.create_model("resnet10t", num_classes=10).eval(), 2)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta == include_buffers for part in model.backbone_parts() for buffer in part.buffers())
    model.load_state_dict(expected.state_dict(), assign=True)
    assert getattr(model, "looped", None) == getattr(expected, "looped", None)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("convert", [hierens.hierensify, hierens.multi_exit, hierens.tree_with_exits])
def test_tracers_that_cannot_work_are_refused_in_favour_of_export(convert):
    model = convert(made("resnet10t"), 2)
    all_of_it = {"depth": None, "leaves": None, "reduce": True}
    for tracer in (torch.jit.script, torch.fx.symbolic_trace, lambda m: torch.fx.symbolic_trace(m, all_of_it)):
        with pytest.raises(ValueError, match=r"cannot trace the choice of a depth: use model\.export"):
            tracer(model)


def test_unpooled_features_are_pointed_out():
    model = hierens.hierensify(made("resnet10t"), 2)
    with pytest.raises(ValueError, match=r"global_pool='' cannot be set.*forward_features"):
        model.reset_classifier(0, "")


@pytest.mark.parametrize("convert", [hierens.hierensify, hierens.multi_exit, hierens.tree_with_exits])
def test_the_core_of_timms_own_tests_of_models(convert):
    """What `tests/test_timm_suite.py` checks with a checkout of timm."""
    model = convert(made("test_resnet"), 2)
    x = torch.randn(2, 3, 64, 64)
    names = dict(model.named_parameters())
    for key in ("classifier", "first_conv"):
        named = model.default_cfg[key]
        assert {f"{name}.weight" for name in ((named,) if isinstance(named, str) else named)} <= names.keys()
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    expected = model(x)
    assert expected.shape == (2, 10) and expected.isfinite().all()
    model.set_grad_checkpointing()
    assert difference(model(x), expected) < 1e-5
    model.train()(x, reduce=False).mean().backward()
    assert all(parameter.grad is not None for parameter in names.values())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_recorded_trace_is_for_any_number_of_images():
    """timm's onnx_export.py records one image."""
    model = hierens.hierensify(made("test_resnet"), 2).eval()
    model.set_executor("grouped")
    x = torch.randn(3, 3, 64, 64)
    assert difference(torch.jit.trace(model, x[:1])(x), model(x)) < 1e-5
