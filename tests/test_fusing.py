"""Models made ready for inference: equal up to rounding in every family, and clear about what they are not for."""

import copy

import pytest
import timm
import torch
import zoo
from torch import nn

import hierens
from hierens.fused_layers import FusedConvolution, attachable, fused_convolution
from hierens.packed import Width

FAMILIES = {
    "resnet10t": "batch norm, ReLU",
    "test_efficientnet": "SiLU, squeeze and excitation, depthwise",
    "tf_mobilenetv3_small_075": "TensorFlow's padding, hard swish",
    "test_byobnet": "batch norm with activation",
    "repvgg_a0": "several convolutions of one input",
    "densenet121": "batch norm before the convolution",
    "resnetv2_50x1_bit": "standardised weights, group norm",
    "test_nfnet": "scaled standardised weights, no norm",
    "test_convnext": "channel layer norm",
    "test_vit": "no convolution but the first",
    "levit_128s": "batch norm after linear layers",
    "csatv2": "blocks without a grouped form",
}


def different(name, **settings):
    """A tree of networks that differ, none of their values trivial."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10).eval()
    zoo.enliven(backbone)
    x = zoo.few_pixels(backbone)
    model = hierens.hierensify(backbone, **settings).eval()
    model.break_symmetry(noise=0.3)
    return model, x


def close(a, b, tolerance=1e-4):
    return zoo._difference(a, b) < tolerance


@pytest.fixture(scope="module")
def small():
    return different("test_efficientnet", blocks=3)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fused_equals_plain_at_every_depth(name):
    model, x = different(name, blocks=3)
    fused = model.fuse()
    for leaves in range(1, 5):
        expected = model(x, leaves=leaves, reduce=False)
        assert close(fused(x, leaves=leaves, reduce=False), expected), leaves
        fused.set_executor("looped")
        assert close(fused(x, leaves=leaves, reduce=False), expected), leaves
        fused.set_executor("auto")
    for step in fused.anytime(x):
        assert close(step.logits, model(x, leaves=step.leaves))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_a_number_stays_so(name, value):
    """oneDNN's attached ReLU, ReLU6 and hard sigmoid make 0 of it."""
    model, x = different(name, blocks=2)
    x = torch.cat([x, x])
    x[0, :, 5, 5] = value
    expected, fused = model(x, reduce=False), model.fuse()
    assert expected[0].isnan().any()
    for executor in ("auto", "looped", "grouped"):
        fused.set_executor(executor)
        check_alike(fused(x, reduce=False), expected)
        check_alike(fused.forward_features(x), model.forward_features(x))
        for step in fused.anytime(x):
            check_alike(step.newest, expected[:, step.leaves - 1])
            assert close(fused(x[1:], leaves=step.leaves), model(x[1:], leaves=step.leaves)), (
                "outside a step all is as ever"
            )


def check_alike(found, expected):
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected[expected.isfinite()]
    assert torch.allclose(found[expected.isfinite()], finite, rtol=0, atol=1e-4 * max([1.0, *finite.abs().tolist()]))


@torch.no_grad()
def test_nor_is_it_lost_in_weights():
    model, x = different("resnet10t", blocks=2)
    next(model.parameters()).data[0] = float("nan")
    assert model(x).isnan().all() and model.fuse()(x).isnan().all()


@torch.no_grad()
def test_batch_norms_are_gone_and_activations_attached(small):
    model, _ = small
    kinds = [type(module) for module in model.fuse().modules()]
    assert nn.BatchNorm2d not in kinds and timm.layers.BatchNormAct2d not in kinds
    attached = [m for m in model.fuse().modules() if isinstance(m, FusedConvolution) and m.activation is not None]
    assert attached and all(m.attached for m in attached)


@torch.no_grad()
def test_the_model_is_left_as_it_is(small):
    model, x = small
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    fused = model.fuse()
    fused(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in fused.parameters():
        parameter.zero_()
    assert torch.equal(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_kernels_follow_the_weights(small):
    """Reordered weights are made anew when weights are written, moved or copied."""
    model, x = small
    fused = model.fuse()
    fused(x)
    for parameter in fused.parameters():
        parameter.mul_(0.5)
    changed = fused(x)
    for module in fused.modules():
        if isinstance(module, FusedConvolution):
            module._kernels.clear()
    assert torch.equal(fused(x), changed)
    assert torch.equal(copy.deepcopy(fused)(x), changed)
    assert close(fused.double()(x.double()), changed.double())
    assert close(fused.float()(x), changed)


@torch.no_grad()
def test_half_precision(small):
    model, x = small
    expected = model(x)
    assert close(model.fuse().bfloat16()(x.bfloat16()), expected, 0.1)
    assert close(copy.deepcopy(model).bfloat16().fuse()(x.bfloat16()), expected, 0.1)


@torch.no_grad()
def test_subtrees_of_a_fused_model(small):
    model, x = small
    fused = model.fuse()
    assert close(fused.at_depth(1)(x), model(x, depth=1))
    assert close(model.at_depth(1).fuse()(x), model(x, depth=1))
    assert close(model.at_depth(0).fuse()(x), model(x, depth=0))
    assert isinstance(fused.at_depth(1), hierens.FusedEnsemble) and not fused.at_depth(1).training
    assert fused.macs() == model.macs()


def test_what_a_fused_model_refuses(small):
    model, x = small
    fused = model.fuse()
    calls = (
        fused.train,
        fused.grow,
        lambda: fused.save_pretrained("anywhere"),
        lambda: fused.reorder([]),
        lambda: fused.reset_classifier(3),
        fused.break_symmetry,
        fused.fuse,
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"for inference only and cannot be .*then call fuse\(\) again"):
            call()
    assert fused.eval() is fused
    images = x.clone().requires_grad_()
    fused(images).sum().backward()  # with respect to the images there are gradients: saliency, adversarial examples
    own = x.clone().requires_grad_()
    model(own).sum().backward()
    assert close(images.grad, own.grad, 1e-3)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU6(),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.LeakyReLU(0.2),
        nn.Hardtanh(-0.5, 2.0),
    ],
    ids=repr,
)
@torch.no_grad()
def test_attached_activations_are_those_of_torch(activation):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    x = (3 * torch.randn(2, 24, 9, 9)).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(5 * 16, 4, 3, 3), torch.randn(5 * 16)
    fused = FusedConvolution(layer, weight, bias, activation)
    assert attachable(activation)
    width = Width(3, 5, start=1)
    plain = nn.functional.conv2d(x, weight[16:64], bias[16:64], padding=1, groups=6)
    torch.testing.assert_close(fused_convolution(fused, x, width), activation(plain), rtol=1e-4, atol=1e-4)
    assert len(fused._kernels) == 1, "oneDNN's own operator must have run"
